"""Sliced cross-entropy against torch.nn.functional.cross_entropy, forward and backward.

Shapes: r rows (tokens), v vocabulary with padding.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from endprompt_megatron.model import cross_entropy
from endprompt_megatron.model.cross_entropy import sliced_cross_entropy


def make(rows: int, vocab: int, real: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(logits, labels, weight of each row)"""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits, torch.randint(0, real, (rows,), generator=generator), torch.rand(rows, generator=generator)


def reference(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of the weighted sum, by torch in float64."""
    whole = logits.double().requires_grad_()
    losses = F.cross_entropy(whole[:, :real], labels, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), whole.grad


def ours(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0  # the logits of a model are not a leaf
    losses = sliced_cross_entropy(hidden, labels, num_real_tokens=real)
    (losses * weights).sum().backward()
    return losses.detach(), leaf.grad


@settings(max_examples=30)
@given(rows=st.integers(1, 40), real=st.integers(1, 50), padding=st.integers(0, 20), seed=st.integers(0, 100))
def test_equals_torch_in_float32(rows, real, padding, seed):
    logits, labels, weights = make(rows, real + padding, real, seed=seed)
    losses, gradient = ours(logits, labels, weights, real)
    expected_losses, expected_gradient = reference(logits, labels, weights, real)
    assert losses.dtype == torch.float32 and losses.shape == (rows,)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_equals_torch_in_bfloat16():
    logits, labels, weights = make(50, 512, 500, dtype=torch.bfloat16)
    losses, gradient = ours(logits, labels, weights, 500)
    expected_losses, expected_gradient = reference(logits, labels, weights, 500)
    assert losses.dtype == torch.float32, "the loss is not rounded"
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-4)


def test_several_slices_with_a_rest():
    vocab, real = 2**16, 2**16 - 100
    assert cross_entropy._SLICE_ELEMENTS // vocab == 64
    logits, labels, weights = make(70, vocab, real)
    losses, gradient = ours(logits, labels, weights, real)
    expected_losses, expected_gradient = reference(logits, labels, weights, real)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


def test_a_vocabulary_larger_than_a_slice(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_SLICE_ELEMENTS", 10)
    logits, labels, weights = make(5, 64, 60)
    losses, gradient = ours(logits, labels, weights, 60)
    expected_losses, expected_gradient = reference(logits, labels, weights, 60)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_padding_gets_no_probability_and_no_gradient():
    logits, labels, weights = make(6, 40, 30)
    logits[:, 30:] = 1e4  # arbitrary values in the padding
    losses, gradient = ours(logits, labels, weights, 30)
    assert torch.equal(gradient[:, 30:], torch.zeros(6, 10))
    assert gradient[:, :30].abs().sum(dim=1).min() > 0
    torch.testing.assert_close(losses.double(), reference(logits[:, :30], labels, weights, 30)[0], rtol=1e-5, atol=1e-6)


def test_rows_without_weight_get_no_gradient():
    logits, labels, weights = make(6, 20, 20)
    weights[2] = 0.0
    assert not ours(logits, labels, weights, 20)[1][2].any()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    losses, gradient = ours(logits, torch.tensor([1, 0]), torch.ones(2), 3)
    torch.testing.assert_close(
        losses, torch.tensor([2e4, 3.0]).where(torch.tensor([True, False]), torch.tensor(3.0).log()), rtol=1e-5, atol=1e-3
    )
    assert gradient.isfinite().all()


def test_the_gradient_takes_the_place_of_the_logits():
    logits, labels, _ = make(4, 16, 16)
    hidden = logits.requires_grad_() * 1.0
    address = hidden.data_ptr()
    found = []
    hidden.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    sliced_cross_entropy(hidden, labels, num_real_tokens=16).sum().backward()
    assert found == [address]


def test_a_second_backward_pass_is_refused():
    logits, labels, _ = make(4, 16, 16)
    loss = sliced_cross_entropy(logits.requires_grad_() * 1.0, labels, num_real_tokens=16).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiate this loss only once"):
        loss.backward()
