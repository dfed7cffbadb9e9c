"""Settings that cannot work are refused, and each message quotes its value."""

from __future__ import annotations

import pytest

from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import DataConfig, ModelConfig, ProbesConfig, RopeConfig, RunConfig, TextSource, TrainerConfig
from endprompt_megatron.config.validation import find_problems
from endprompt_megatron.planning.architecture import ModelArchitecture

ARCHITECTURE = ModelArchitecture(8, 64, 128, 8, 4, 8, 512, 8192, 10000.0, 1e-5, False)


def facts_of(world_size: int = 1, **changes: object) -> Facts:
    """A good config with some keys (dots as double underscores) changed."""
    config = RunConfig(
        name="test",
        model=ModelConfig("m", "models/m"),
        rope=RopeConfig("pi", 2.0, 16384),
        data=DataConfig("datasets", 512, [TextSource("a.jsonl")]),
        trainer=TrainerConfig(max_steps=100),
        probes=ProbesConfig(lengths=[512], text=[TextSource("b.jsonl")]),
    )
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        target = config
        for name in path:
            target = getattr(target, name)
        assert hasattr(target, last), dotted
        setattr(target, last, value)
    return Facts(config, world_size, ARCHITECTURE, ("contiguous", "endprompt"))


def problems_of(world_size: int = 1, **changes: object) -> list[str]:
    return find_problems(facts_of(world_size, **changes))


def test_the_config_these_start_from_is_good():
    assert problems_of() == []


@pytest.mark.parametrize(
    ("world_size", "changes", "quoted"),
    [
        pytest.param(1, {"rope__type": "longrope"}, "rope.type=longrope", id="unknown rope.type: found after the process group is up"),
        pytest.param(1, {"accelerator": "tpu"}, "accelerator=tpu", id="unknown accelerator: a dry run plans it"),
        pytest.param(1, {"backend": "cuda"}, "backend=cuda", id="unknown backend: a dry run plans it"),
        pytest.param(1, {"model__source": "hub"}, "model.source=hub", id="unknown model.source: a dry run plans it"),
        pytest.param(
            *(2, {"parallel__virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2"),
            id="virtual stages without pipeline stages: megatron raises",
        ),
        pytest.param(
            2,
            {
                "parallel__pipeline_model_parallel_size": 2,
                "parallel__virtual_pipeline_model_parallel_size": 2,
                "trainer__global_batch_size": 3,
            },
            "virtual_pipeline_model_parallel_size=2",
            id="3 micro-batches over 2 interleaved stages: megatron raises",
        ),
        pytest.param(1, {"trainer__log_interval": 0}, "trainer.log_interval=0", id="log_interval=0: documented as off, divides by zero"),
        pytest.param(1, {"rope__type": "abf"}, "rope.theta=None", id="abf without its base"),
        pytest.param(1, {"rope__theta": 1e6}, "rope.theta=1000000.0", id="a base that pi does not read"),
        pytest.param(1, {"probes__lengths": [512, 32768]}, "32768 is beyond rope.target_context_length=16384", id="beyond the target"),
        pytest.param(
            *(1, {"probes__tasks": ["word"], "probes__planted_words": 99}, "probes.planted_words=99: must be between 1 and 24"),
            id="more facts than can be written",
        ),
        pytest.param(1, {"probes__perplexity_tail": 512}, "probes.perplexity_tail=512", id="a tail as long as the shortest context"),
        pytest.param(1, {"probes__long_texts": 0}, "probes.long_texts=0", id="no long text"),
        pytest.param(1, {"data__num_workers": -1}, "data.num_workers=-1", id="negative num_workers: torch raises"),
    ],
)
def test_settings_that_cannot_work_are_refused(world_size, changes, quoted):
    assert any(quoted in problem for problem in problems_of(world_size, **changes))


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"method__attention": "s3"}, "method.attention=s3: choose full or s2"),
        ({"method__attention": "s2", "method__attention_groups": 0}, "attention_groups=0: must be between 1 and"),
        (
            {"method__attention": "s2", "data__seq_length": 500},
            "multiple of 2*attention_groups=8: groups are shifted by half a group. Set data.seq_length=504",
        ),
        ({"adapter__type": "dora"}, "adapter.type=dora: choose none or lora"),
        ({"adapter__type": "lora", "adapter__rank": 0}, "adapter.rank=0: must be between 1 and"),
        ({"adapter__type": "lora", "adapter__rank": 65}, "adapter.rank=65: must be at most the model's hidden size of 64"),
        (
            {"adapter__type": "lora", "adapter__alpha": float("nan")},
            "adapter.alpha=nan: must be between 1e-06 and 1000000. The default is 16.0.",
        ),
        ({"adapter__type": "lora", "adapter__alpha": -1.0}, "adapter.alpha=-1.0"),
        ({"adapter__type": "lora", "adapter__target_modules": []}, "adapter.target_modules=[]: name at least one of q_proj"),
        ({"adapter__type": "lora", "adapter__target_modules": ["q_proj", "q_proj"]}, "each once"),
        ({"adapter__type": "lora", "adapter__target_modules": ["gate_proj"]}, "adapter.target_modules=['gate_proj']"),
    ],
)
def test_adapters_and_attention(changes, quoted):
    (problem,) = problems_of(**changes)
    assert quoted in problem


def test_s2_attention_requires_whole_groups_on_a_rank():
    problems = problems_of(2, method__attention="s2", parallel__context_parallel_size=2)
    assert problems == [
        "method.attention=s2 with parallel.context_parallel_size=2: a group has to stand whole on a rank. Set parallel.context_parallel_size=1."
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"method__attention": "s2"},
        {"method__attention": "s2", "method__attention_groups": 1, "data__seq_length": 511},
        {"method__attention": "s2", "adapter__type": "lora", "adapter__target_modules": ["o_proj"]},
        {"adapter__type": "none", "adapter__rank": 65},
        {"method__attention": "full", "data__seq_length": 500},
    ],
)
def test_adapters_and_attention_that_work(changes):
    assert problems_of(**changes) == []


def test_other_adapters_make_another_run():
    from endprompt_megatron.config.resume import resume_differences

    stored, current = RunConfig().to_dict(), RunConfig().to_dict()
    current["adapter"]["alpha"], current["method"]["attention"] = 32.0, "s2"
    assert resume_differences(stored, current, RunConfig().to_dict()) == [("adapter.alpha", 16.0, 32.0), ("method.attention", "full", "s2")]


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"probes__needle_trials": 0}, "needle_trials=0"),
        ({"probes__needle_digits": 0}, "needle_digits=0"),
        ({"probes__perplexity_tokens": 0}, "perplexity_tokens=0"),
        ({"probes__perplexity_stride": -1}, "perplexity_stride=-1"),
        ({"probes__perplexity_stride": 512}, "perplexity_stride=512: must be less than the shortest window of 512"),
        ({"probes__perplexity_stride": 64, "probes__perplexity_lengths": [64, 512]}, "the shortest window of 64"),
        ({"probes__prefill_chunk": -1}, "prefill_chunk=-1"),
        ({"data__train": [TextSource("a.jsonl", -2.0)]}, "-2"),
    ],
)
def test_messages_quote_the_value(changes, quoted):
    (problem,) = problems_of(**changes)
    assert quoted in problem


def test_a_key_that_came_later_meant_its_default_before():
    """A run of an earlier version resumes as long as new keys say what it did then."""
    from endprompt_megatron.config.resume import resume_differences

    defaults = RunConfig().to_dict()
    stored = RunConfig().to_dict()
    del stored["adapter"], stored["method"]["attention"]
    assert resume_differences(stored, RunConfig().to_dict(), defaults) == []
    current = RunConfig().to_dict()
    current["adapter"]["rank"], current["method"]["attention"] = 4, "s2"
    assert resume_differences(stored, current, defaults) == [("adapter.rank", 8, 4), ("method.attention", "full", "s2")]
