"""Our RMSNorm against torch's and transformers'."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from endprompt_megatron.model.norm import RMSNorm

SIZE = 64


def config_of(**changes: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=SIZE, num_attention_heads=4, **changes)


def norms(dtype: torch.dtype, eps: float) -> tuple[torch.nn.Module, ...]:
    """Our norm, torch's and transformers', with the same random weight."""
    torch.manual_seed(0)
    found = (
        RMSNorm(config_of(params_dtype=dtype), SIZE, eps=eps),
        torch.nn.RMSNorm(SIZE, eps=eps, dtype=dtype),
        LlamaRMSNorm(SIZE, eps=eps).to(dtype),
    )
    weight = torch.randn(SIZE).to(dtype)
    for norm in found:
        norm.weight.data.copy_(weight)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_equals_torch_and_transformers(dtype, eps):
    ours, by_torch, by_transformers = norms(dtype, eps)
    hidden = (0.1 * torch.randn(7, 3, SIZE)).to(dtype)
    assert ours.weight.dtype == dtype and ours(hidden).dtype == dtype
    assert torch.equal(ours(hidden), by_torch(hidden))
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(ours(hidden), by_transformers(hidden), **tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [(7, 3), (5,)])
def test_gradients_equal_those_of_autograd(dtype, tolerance, rows):
    """Also for a non-contiguous gradient, as attention returns it."""
    ours, by_torch, _ = norms(torch.float32, 1e-5)
    hidden, upstream = torch.randn(*rows, SIZE), torch.randn(SIZE, *rows[::-1]).permute(*range(len(rows), -1, -1))
    gradients = []
    for norm, kind in ((ours.to(dtype), dtype), (by_torch, torch.float32)):
        leaf = hidden.to(kind).requires_grad_()
        norm(leaf).backward(upstream.to(kind))
        gradients.append((leaf.grad.float(), norm.weight.grad.float()))
    for mine, expected in zip(*gradients, strict=True):
        assert (mine - expected).abs().max() <= tolerance * expected.abs().max()


def test_weight_starts_at_one_and_has_the_sequence_parallel_flag():
    norm = RMSNorm(config_of(), SIZE)
    assert torch.equal(norm.weight, torch.ones(SIZE)) and norm.weight.sequence_parallel is False
    assert RMSNorm(config_of(sequence_parallel=True, tensor_model_parallel_size=2), SIZE).weight.sequence_parallel is True
