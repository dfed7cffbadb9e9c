"""The limits of FP8 and of backends that numbers alone decide: what is quoted, and that the way out leads out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.config.resolved import fill_in
from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    ProbesConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.config.validation import find_problems
from endprompt_megatron.planning.architecture import ModelArchitecture

LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, False)
SMOLLM2 = ModelArchitecture(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, True)


def config_of(**changes: object) -> RunConfig:
    """A good FP8 run of Llama-3-8B with some keys (dots as double underscores) changed."""
    config = RunConfig(
        name="test",
        accelerator="gpu",
        model=ModelConfig("m", "models/m"),
        rope=RopeConfig("pi", 8.0, 65536),
        precision=PrecisionConfig("fp8", 1, 1),
        data=DataConfig("datasets", 8192, [TextSource("a.jsonl")]),
        trainer=TrainerConfig(max_steps=100, global_batch_size=64),
        probes=ProbesConfig(enabled=False),
    )
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        target = config
        for name in path:
            target = getattr(target, name)
        assert hasattr(target, last), dotted
        setattr(target, last, value)
    return config


def problems_of(*, world_size: int = 8, architecture: ModelArchitecture = LLAMA3_8B, **changes: object) -> list[str]:
    return find_problems(Facts(config_of(**changes), world_size, architecture, ("contiguous", "endprompt")))


@pytest.mark.parametrize("name", FP8_MULTIPLES)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_llama3_8b_at_8192_tokens_is_good_in_every_precision_and_layout(name, tensor):
    layers = (1, 1) if name == "fp8" else (0, 0)
    parallel = {"parallel__tensor_model_parallel_size": tensor, "parallel__sequence_parallel": tensor > 1}
    assert problems_of(precision=PrecisionConfig(name, *layers), **parallel) == []
    assert problems_of(precision=PrecisionConfig(name, *layers), parallel__context_parallel_size=4) == []


@pytest.mark.parametrize(
    ("changes", "quoted", "way_out"),
    [
        ({"precision__name": "fp16"}, "precision.name=fp16", "auto, bf16, fp32, fp8, fp8_attention, fp8_blockwise, mxfp8"),
        ({"backend": "cuda"}, "backend=cuda", "auto, te, torch"),
        ({"backend": "torch"}, "precision.name=fp8 with backend=torch", "Set backend=te, or precision=bf16"),
        ({"accelerator": "cpu"}, "precision.name=fp8 with accelerator=cpu", "accelerator=gpu"),
        ({"accelerator": "cpu", "backend": "te", "precision": PrecisionConfig("bf16")}, "backend=te with accelerator=cpu", "backend=auto"),
        ({"backend": "te", "precision": PrecisionConfig("fp32")}, "backend=te with precision.name=fp32", "precision=bf16, or backend=torch"),
        # 8184 tokens are what a = S and b on top of it would make; none of the precisions takes them
        ({"data__seq_length": 8184}, "= 8184, must be a multiple of 16", "data.seq_length=8192"),
        (
            {"data__seq_length": 8208, "parallel__context_parallel_size": 2},
            "data.seq_length=8208 / CP 2 = 4104, must be a multiple of 16",
            "data.seq_length=8224",
        ),
        (
            {"data__seq_length": 8256, "parallel__tensor_model_parallel_size": 8, "parallel__sequence_parallel": True},
            "/ CP 1 / TP 8 (sequence_parallel) = 1032, must be a multiple of 16",
            "data.seq_length=8320",
        ),
        ({"precision": PrecisionConfig("fp8_blockwise"), "data__seq_length": 8256}, "= 8256, must be a multiple of 128", "data.seq_length=8320"),
        ({"precision": PrecisionConfig("mxfp8"), "data__seq_length": 8208}, "= 8208, must be a multiple of 32", "data.seq_length=8224"),
        ({"precision": PrecisionConfig("fp8_attention", 1, 1)}, "num_layers_at_start_in_bf16=1", "Set both to 0"),
        ({"precision": PrecisionConfig("fp8", 16, 16)}, "num_layers_at_start_in_bf16=16", "must be left for FP8. Set both to 1"),
        ({"precision": PrecisionConfig("fp8", -1, 0)}, "num_layers_at_start_in_bf16=-1", "between 0 and"),
        ({"precision": PrecisionConfig("fp8", 5, 0), "parallel__pipeline_model_parallel_size": 8}, "between 0 and the 4 layers", "Set both"),
        (
            {"precision": PrecisionConfig("fp8_attention"), "data__seq_length": 8240},
            "data.seq_length=8240 must be a multiple of 128",
            "data.seq_length=8320",
        ),
        (
            {"precision": PrecisionConfig("fp8_attention"), "data__seq_length": 8320, "parallel__context_parallel_size": 2},
            "data.seq_length=8320 must be a multiple of 512",
            "data.seq_length=8704",
        ),
        (
            {"precision": PrecisionConfig("fp8_attention"), "parallel__recompute_granularity": "selective"},
            "recompute_granularity=selective",
            "null or full",
        ),
        ({"precision": PrecisionConfig("fp8_attention"), "method__attention": "s2"}, "method.attention=s2", "precision=fp8"),
    ],
)  # fmt: skip
def test_each_rule(changes, quoted, way_out):
    problems = problems_of(**changes)
    assert any(quoted in problem and way_out in problem for problem in problems), problems


@pytest.mark.parametrize("name", FP8_MULTIPLES)
@pytest.mark.parametrize("length", [8190, 8200, 8208, 8224, 1000])
@pytest.mark.parametrize(("tensor", "context", "samples"), [(1, 1, 1), (2, 2, 1), (8, 1, 2), (1, 4, 3)])
def test_the_length_that_an_error_names_is_a_good_one(name, length, tensor, context, samples):
    changes = {
        "precision": PrecisionConfig(name), "parallel__tensor_model_parallel_size": tensor, "parallel__context_parallel_size": context,
        "parallel__sequence_parallel": tensor > 1, "trainer__micro_batch_size": samples, "trainer__global_batch_size": 48 * samples,
    }  # fmt: skip
    world_size = 2 * tensor * context
    for _ in range(4):  # each error may raise the length once more
        problems = problems_of(world_size=world_size, data__seq_length=length, **changes)
        if not problems:
            return
        longest = max(int(found) for problem in problems for found in re.findall(r"data\.seq_length=(\d+)\.$", problem))
        assert longest > length
        length = longest
    raise AssertionError(problems)


def test_heads_of_64_have_no_fp8_attention():
    problems = problems_of(architecture=SMOLLM2, precision=PrecisionConfig("fp8_attention"), rope=RopeConfig("pi", 8.0, 65536))
    assert any("heads are 64 wide" in problem and "precision=fp8, whose attention is bf16" in problem for problem in problems)


def test_widths_that_a_scale_does_not_fill():
    assert problems_of(architecture=SMOLLM2) == []
    assert problems_of(architecture=SMOLLM2, precision=PrecisionConfig("mxfp8")) == []
    (problem,) = problems_of(architecture=SMOLLM2, precision=PrecisionConfig("fp8_blockwise"))
    assert "hidden size 576 and width of all heads 576 and width of query, key and value 960 must be a multiple of 128" in problem
    assert problem.endswith("Set precision=fp8, or precision=bf16.")
    odd = replace(LLAMA3_8B, ffn_hidden_size=14336 + 16)
    (problem,) = problems_of(architecture=odd, parallel__tensor_model_parallel_size=8)
    assert "ffn_hidden_size 14352 / TP 8 must be a multiple of 16" in problem and "a smaller parallel.tensor_model_parallel_size" in problem


def test_layers_in_bf16_are_of_fp8_alone():
    config = config_of(precision=PrecisionConfig("bf16", 1, 1))
    assert any("precision.name=bf16" in note and "not used" in note for note in fill_in(config, window=8192)[1])
    assert fill_in(config_of(), window=8192)[1] == []


@pytest.mark.parametrize(("name", "weights"), [("fp32", "fp32"), ("bf16", "bf16"), *((name, "bf16") for name in FP8_MULTIPLES)])
def test_fp8_keeps_bf16_weights(name, weights):
    assert PrecisionConfig(name).weights == weights
