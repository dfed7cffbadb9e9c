"""Step time against published speeds and hand-worked bubbles."""

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape
from endprompt_megatron.planning.throughput import HARDWARE, estimate_step_seconds, get_hardware, pipeline_bubble_factor

LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied_embeddings=False)
H100 = HARDWARE["H100-80GB"]
RUN = {"seq_length": 8192, "global_batch_size": 64, "world_size": 8, "hardware": H100, "precision": "fp8", "num_micro_batches": 8}


def test_published_utilization_gives_the_published_speed():
    # NVIDIA, Llama-3 8B at 8K on 8 H100 (TP1 PP1), FP8: 744 TFLOP/s/GPU and 14,451 tokens/s/GPU.
    seconds = estimate_step_seconds(LLAMA3_8B, **RUN, model_flops_utilization=744 / 1979)
    assert 64 * 8192 / seconds / 8 == pytest.approx(14_451, rel=0.01)


def test_full_recomputation_runs_the_forward_pass_twice():
    plain = estimate_step_seconds(LLAMA3_8B, **RUN, model_flops_utilization=0.4)
    again = estimate_step_seconds(LLAMA3_8B, **RUN, model_flops_utilization=0.4, recompute_granularity="full")
    assert again == pytest.approx(plain * 4 / 3)


def test_bubble_by_hand():
    assert pipeline_bubble_factor(1, 4) == 1
    assert pipeline_bubble_factor(4, 6) == pytest.approx(1.5)
    assert pipeline_bubble_factor(4, 6, 3) == pytest.approx(1 + 3 / 18)


@pytest.mark.parametrize("utilization", [0, -0.1, 1.5])
def test_impossible_utilization_is_refused(utilization):
    with pytest.raises(ConfigError, match="model_flops_utilization"):
        estimate_step_seconds(LLAMA3_8B, **RUN, model_flops_utilization=utilization)


def test_a_precision_without_peak_is_refused():
    with pytest.raises(ConfigError, match="A100"):
        estimate_step_seconds(LLAMA3_8B, **{**RUN, "hardware": HARDWARE["A100-80GB"]}, model_flops_utilization=0.4)


def test_unknown_hardware_lists_what_there_is():
    with pytest.raises(ConfigError, match="H100-80GB"):
        get_hardware("V100")
