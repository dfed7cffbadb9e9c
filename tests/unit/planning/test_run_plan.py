"""The plan's lines, on layouts of the two ends: a laptop and a cluster."""

import dataclasses
import re

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.run_plan import PlanRequest, describe_plan, plan_memory

SMOLLM2_135M = ModelArchitecture(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, tied_embeddings=True)
LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
LAPTOP = PlanRequest(
    experiment="smollm2_135m_16k_cpu", architecture=SMOLLM2_135M, world_size=2, micro_batch_size=1, global_batch_size=8, max_steps=100,
    seq_length=512, num_prompt_tokens=10, target_context_length=16384, original_context_length=8192, rope_factor=2.0,
)  # fmt: skip
CLUSTER = PlanRequest(
    experiment="llama3_8b_64k_h100", architecture=LLAMA3_8B, world_size=32, tensor_model_parallel_size=4, pipeline_model_parallel_size=2,
    sequence_parallel=True, use_distributed_optimizer=True, recompute_granularity="selective", micro_batch_size=1, global_batch_size=64,
    max_steps=1900, seq_length=8192, num_prompt_tokens=20, target_context_length=65536, original_context_length=8192, rope_factor=8.0,
    hardware="H100-80GB",
)  # fmt: skip


def _plan(request, **changes):
    return "\n".join(describe_plan(dataclasses.replace(request, **changes)))


def test_laptop_plan_states_layout_batch_and_positions():
    plan = _plan(LAPTOP)
    for stated in (
        "2 ranks = TP 1 x PP 1 x CP 1 x DP 2",
        "1 sequence x 4 micro-batches x DP 2 = 8 sequences per step",
        "8 x 512 = 4,096 per step; x 100 steps = 409,600 in total",
        "context 0..501, end prompt 16,374..16,383 (b = 10)",
        "8,192 -> 16,384 positions; RoPE pi, factor 2",
        "134,515,008 parameters",
        "the estimate is not compared",
        "not estimated: no known GPU",
        "training on all 16,384 tokens",
    ):
        assert stated in plan


def test_cluster_plan_states_compute_memory_and_time():
    plan = _plan(CLUSTER)
    for stated in (
        "32 ranks = TP 4 x PP 2 x CP 1 x DP 4",
        "sequence parallel, distributed optimizer, selective recomputation, bf16",
        "context 0..8,171, end prompt 65,516..65,535 (b = 20)",
        "51.5 GFLOP per token",
        "This fits into the 79.1 GiB of one H100-80GB",
        "tokens/s and ",
        "predicted from rates that published runs reached",
        "matrix products",
        "by pipeline stage, first to last: ",
        "96.6 GFLOP per token (1.88x)",
    ):
        assert stated in plan


@pytest.mark.parametrize(("gib", "verdict"), [(1.0, "does NOT fit"), (3.0, "tight"), (8.0, "This fits")])
def test_verdict_follows_the_device_memory(gib, verdict):
    assert verdict in _plan(LAPTOP, device_memory_gib=gib)


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({"position_scheme": "contiguous", "num_prompt_tokens": 0}, "contiguous: 0..511"),
        ({"position_scheme": "pose", "num_prompt_tokens": 0}, "drawn for each sample within 0..16,383"),
        ({"position_scheme": "endprompt_pose"}, "drawn for each sample within 0..16,383"),
        ({"num_prompt_tokens": None}, "its length b needs the tokenizer"),
    ],
)
def test_positions_of_other_schemes(changes, stated):
    assert stated in _plan(LAPTOP, **changes)


def test_the_memory_line_adds_up():
    """Weights, gradients, optimizer, activations and the larger of the last two: the total of the line, stage by stage, rounding apart."""
    for pipeline in (1, 2):
        request = dataclasses.replace(CLUSTER, pipeline_model_parallel_size=pipeline)
        line = next(line for line in describe_plan(request) if line.startswith("  memory"))
        total, weights, gradients, optimizer, activations, logits, working = map(float, re.findall(r" ([\d.]+)(?= GiB|,| and|$)", line))
        assert total == pytest.approx(weights + gradients + optimizer + activations + max(logits, working), abs=0.3)
        stages = plan_memory(request)
        assert len(stages) == pipeline and total == pytest.approx(max(stage.total_gib for stage in stages), abs=0.05)


def test_fp8_weighs_more_and_is_faster():
    bf16, fp8 = (dataclasses.replace(CLUSTER, precision=name) for name in ("bf16", "fp8"))
    copies = 2 * (LLAMA3_8B.matrix_parameters_per_layer * 15) / 4 / 2**30  # of the first stage's 16 layers one stays bf16
    assert plan_memory(fp8)[0].weights_gib - plan_memory(bf16)[0].weights_gib == pytest.approx(copies)
    assert "no mxfp8 peak for H100-80GB" in _plan(CLUSTER, precision="mxfp8")


def test_fp32_on_a_gpu_estimates_no_time():
    assert "no fp32 peak for H100-80GB" in _plan(CLUSTER, precision="fp32")


@pytest.mark.parametrize(("changes", "key"), [({"world_size": 12}, "world size 12"), ({"global_batch_size": 6}, "global_batch_size=6")])
def test_layouts_that_do_not_divide_are_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        _plan(CLUSTER, **changes)
