"""Rules of the configuration: what is quoted, and what way out is named."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    ProbesConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
    with_expanded_paths,
)
from endprompt_megatron.config.validation import find_problems
from endprompt_megatron.planning.architecture import ModelArchitecture

ARCHITECTURE = ModelArchitecture(8, 64, 128, 8, 4, 8, 512, 8192, 10000.0, 1e-5, False)
SCHEMES = ("contiguous", "endprompt")


def _config() -> RunConfig:
    return RunConfig(
        name="test",
        model=ModelConfig("m", "models/m"),
        rope=RopeConfig("pi", 2.0, 16384),
        data=DataConfig("datasets", 512, [TextSource("a.jsonl")]),
        trainer=TrainerConfig(max_steps=100),
        probes=ProbesConfig(lengths=[512], text=[TextSource("b.jsonl")]),
    )


def facts_of(changes: dict, *, world_size: int = 1, prompt_lengths: list[int] | None = None) -> Facts:
    config = copy.deepcopy(_config())
    for dotted, value in changes.items():
        target = config
        *path, last = dotted.split(".")
        for name in path:
            target = getattr(target, name)
        assert hasattr(target, last), dotted
        setattr(target, last, value)
    return Facts(config, world_size, ARCHITECTURE, SCHEMES, prompt_lengths)


def _problems(changes: dict, **options) -> list[str]:
    return find_problems(facts_of(changes, **options))


def test_a_good_config_passes():
    assert _problems({}, prompt_lengths=[11]) == []
    assert _problems({"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 4}, world_size=8) == []


@pytest.mark.parametrize(
    ("changes", "quoted", "way_out"),
    [
        ({"rope.target_context_length": 8192, "rope.factor": 1.0}, "rope.target_context_length=8192", "rope.target_context_length=16384"),
        ({"rope.factor": 4.0}, "rope.factor=4.0", "Set rope.factor=2"),
        ({"rope.type": "none"}, "rope.factor=2.0 with rope.type=none", "Set rope.type=pi"),
        ({"rope.original_context_length": 4096}, "rope.original_context_length=4096", "Leave it null"),
        ({"data.seq_length": 20000}, "data.seq_length=20000", "Set data.seq_length=8192"),
        ({"data.seq_length": 1}, "data.seq_length=1", "between 2 and 16777216"),
        ({"method.position_scheme": "pose2"}, "method.position_scheme=pose2", "contiguous, endprompt"),
        ({"method.end_prompts": []}, "method.end_prompts=[]", "at least one text"),
        ({"method.end_prompt_loss_weight": -0.1}, "end_prompt_loss_weight=-0.1", "default is 0.1"),
        ({"method.end_prompt_length": 0}, "method.end_prompt_length=0", "null"),
        ({"method.end_prompt_length": 512}, "an end prompt of 512 tokens", "shorten the end prompt"),
        ({"parallel.tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0", "must be between 1 and 65536"),
        ({"parallel.tensor_model_parallel_size": 8}, "4 KV heads", "Choose one of [1, 2, 4]"),
        ({"parallel.pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size=3", "8 layers"),
        ({"parallel.context_parallel_size": 2, "data.seq_length": 510}, "data.seq_length=510", "Set data.seq_length=512"),
        ({"parallel.sequence_parallel": True}, "sequence_parallel=true", "Set it to false"),
        ({"parallel.recompute_granularity": "some"}, "recompute_granularity=some", "choose selective or full. The default is null."),
        ({"parallel.context_parallel_size": 2}, "world size 1", "must be a multiple of TP x PP x CP"),
        ({"trainer.global_batch_size": 0}, "trainer.global_batch_size=0", "between 1 and 1000000. The default is 8."),
        ({"trainer.micro_batch_size": 3}, "trainer.global_batch_size=8", "3 x 1 = 3"),
        ({"trainer.max_steps": 0}, "trainer.max_steps=0", ">= 1"),
        ({"optim.lr": 0.0}, "optim.lr=0.0", "between 1e-20 and 10"),
        ({"optim.min_lr": 1.0}, "optim.min_lr=1.0", "at most optim.lr=2e-05"),
        ({"optim.lr_schedule": "step"}, "optim.lr_schedule=step", "constant, cosine or linear"),
        ({"optim.lr_schedule": "cosine", "optim.warmup_steps": 100}, "optim.warmup_steps=100", "less than trainer.max_steps=100"),
        ({"precision.name": "fp16"}, "precision.name=fp16", "auto, bf16, fp32, fp8, fp8_attention, fp8_blockwise, mxfp8"),
        ({"data.train": []}, "data.train is empty", "data.train="),
        ({"data.train": [TextSource("a", 0.0)]}, "data.train[0].weight=0.0", "between 1e-06 and"),
        ({"data.split": "98"}, "data.split=98", "98,2,0"),
        ({"probes.lengths": []}, "probes.lengths=[]", "at least one length"),
        ({"probes.text": []}, "probes.text is empty", "probes.enabled=false"),
        ({"probes.needle_depths": [1.5]}, "needle_depths=1.5", "between 0 and 1"),
        ({"probes.needle_trials": 0}, "needle_trials", "between 1"),
    ],
)
def test_each_rule(changes, quoted, way_out):
    problems = _problems(changes)
    assert any(quoted in problem and way_out in problem for problem in problems), problems


def test_prompt_lengths_of_the_tokenizer_count():
    (problem,) = _problems({"data.seq_length": 10}, prompt_lengths=[3, 11])
    assert "a = S - b = -1" in problem


def test_all_problems_come_at_once():
    assert len(_problems({"rope.factor": 4.0, "optim.lr": 0.0, "trainer.max_steps": 0, "data.train": []})) == 4


def test_batches_and_ranks():
    config = _config()
    config.parallel = replace(config.parallel, tensor_model_parallel_size=2)
    assert config.data_parallel_size(8) == 4
    assert config.num_micro_batches(8) == 2


def test_every_path_of_the_config_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = _config()
    config.output_dir, config.model.hf_path, config.data.directory = "~/x", "$SCRATCH/m", "${HOME}/d"
    config.data.train = [TextSource("indexed:~/i"), TextSource("package:tiny/train")]
    config.probes.text = [TextSource("$SCRATCH/a[1].jsonl")]
    found = with_expanded_paths(config)
    assert (found.output_dir, found.model.hf_path, found.data.directory) == ("/home/me/x", "/scratch/m", "/home/me/d")
    assert [source.path for source in found.data.train] == ["indexed:/home/me/i", "package:tiny/train"]
    assert found.probes.text[0].path == "/scratch/a[1].jsonl"
