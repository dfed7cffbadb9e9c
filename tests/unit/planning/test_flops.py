"""Parameter counts against the published checkpoints, FLOPs against hand-worked values and published throughputs."""

import pytest

from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.flops import count_parameters, forward_flops_per_token, training_flops_per_token

LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
LLAMA3_70B = ModelArchitecture(80, 8192, 28672, 64, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
SMOLLM2_135M = ModelArchitecture(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, tied_embeddings=True)
TINY = ModelArchitecture(2, 8, 16, 4, 2, 2, 32, 128, 10000.0, 1e-5, tied_embeddings=False)


@pytest.mark.parametrize(
    ("architecture", "parameters"), [(LLAMA3_8B, 8_030_261_248), (LLAMA3_70B, 70_553_706_496), (SMOLLM2_135M, 134_515_008)]
)
def test_parameters_of_published_checkpoints(architecture, parameters):
    assert count_parameters(architecture) == parameters


def test_parameters_by_hand():
    # Layer: q 8*8 + kv 8*8 + o 8*8 + MLP 3*8*16 + norms 16 = 592; embeddings 2 * 32*8; final norm 8.
    assert count_parameters(TINY) == 2 * 592 + 2 * 256 + 8


@pytest.mark.parametrize(
    ("architecture", "seq_length", "gflops"),
    [(LLAMA3_8B, 8192, 51.5), (LLAMA3_8B, 65536, 96.6), (LLAMA3_70B, 8192, 449), (LLAMA3_70B, 65536, 675)],
)
def test_training_flops_of_the_published_pairs(architecture, seq_length, gflops):
    assert training_flops_per_token(architecture, seq_length) == pytest.approx(gflops * 1e9, rel=0.01)


# NVIDIA's Megatron-Bridge performance summaries (25.09, 25.11, 26.02; DGX-H100, FP8, 8K): tokens/s/GPU and TFLOP/s/GPU of one run.
@pytest.mark.parametrize(
    ("architecture", "tokens_per_second", "tflops"),
    [(LLAMA3_8B, 14_451, 744), (LLAMA3_8B, 14_079, 725), (LLAMA3_70B, 1_602, 719), (LLAMA3_70B, 1_619, 727), (LLAMA3_70B, 1_621, 728)],
)
def test_published_speed_times_flops_is_the_published_rate(architecture, tokens_per_second, tflops):
    assert tokens_per_second * training_flops_per_token(architecture, 8192) == pytest.approx(tflops * 1e12, rel=0.01)


def test_forward_flops_by_hand():
    # Two layers of 576 matrix parameters and the 32 x 8 output layer, 2 FLOPs each; causal attention 2 * 10 * 8 a layer.
    assert forward_flops_per_token(TINY, 10) == 2 * (2 * 576 + 256) + 2 * 160
    assert training_flops_per_token(TINY, 10) == 3 * forward_flops_per_token(TINY, 10)
