"""Normalised loss weights: the loss is the mean of eq. 11 over samples, for every micro-batch size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endprompt_megatron.data.batch import to_micro_batch
from endprompt_megatron.training.step import LOSS_FIGURES, weighted_loss

CPU = torch.device("cpu")


def batch_of(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    count, length = weights.shape
    zeros = torch.zeros(count, length, dtype=torch.int64)
    return {
        "tokens": zeros,
        "labels": zeros,
        "position_ids": torch.arange(length),
        "loss_weights": weights,
        "prompt_mask": torch.zeros(count, length, dtype=torch.bool),
        "sample_index": torch.arange(count),
    }


def random_batch(count: int, seed: int, weight: float = 0.1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch whose samples have end prompts of different lengths, as a set of several end prompts produces, and a random loss per token."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(count, 24)
    masks = torch.zeros(count, 24, dtype=torch.bool)
    for row in range(count):
        b = int(torch.randint(1, 12, (), generator=generator))
        weights[row, 23 - b : 23], weights[row, 23] = weight, 0.0
        masks[row, 23 - b : 23] = True
    return batch_of(weights) | {"prompt_mask": masks}, torch.rand(count, 24, generator=generator) * 5


@given(count=st.integers(1, 6), seed=st.integers(0, 1000), weight=st.floats(0, 3))
def test_each_sample_weighs_one_share(count, seed, weight):
    batch, _ = random_batch(count, seed, weight)
    normalised = to_micro_batch(batch, CPU).loss_weights
    torch.testing.assert_close(normalised.sum(dim=1), torch.full((count,), 1 / count), rtol=1e-5, atol=0)
    assert (normalised >= 0).all()
    # proportions within a sample are unchanged
    torch.testing.assert_close(normalised / normalised[:, :1], batch["loss_weights"] / batch["loss_weights"][:, :1])


def test_hand_worked_weights():
    batch = to_micro_batch(batch_of(torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.25, 0.25, 0.0]])), CPU)
    expected = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.0], [1.5, 0.75, 0.375, 0.375, 0.0]]) / 6
    torch.testing.assert_close(batch.loss_weights, expected)
    assert batch.counted.tolist() == [[True] * 4 + [False]] * 2


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_the_loss_does_not_depend_on_the_micro_batch(micro):
    """Gradient accumulation divides the sum over micro-batches by their number, as Megatron's schedule does."""
    batch, losses = random_batch(6, seed=5)
    weights = batch["loss_weights"].double()
    expected = ((weights * losses.double()).sum(dim=1) / weights.sum(dim=1)).mean()  # eq. 11, then the mean over samples
    total = torch.zeros(())
    for start in range(0, 6, micro):
        part = {key: value if key == "position_ids" else value[start : start + micro] for key, value in batch.items()}
        total += weighted_loss(to_micro_batch(part, CPU), losses[start : start + micro])[0]
    torch.testing.assert_close(total / (6 // micro), expected.float(), rtol=1e-6, atol=0)


def test_a_padding_sample_adds_nothing_and_no_nan():
    batch = to_micro_batch(batch_of(torch.zeros(2, 4)), CPU)
    assert batch.loss_weights.tolist() == [[0.0] * 4] * 2 and not batch.counted.any()
    loss, figures = weighted_loss(batch, torch.ones(2, 4))
    assert float(loss) == 0.0 and figures["figures"].tolist() == [0.0] * 5


def test_figures_separate_context_from_prompt():
    batch = batch_of(torch.tensor([[1.0, 1.0, 0.1, 0.1, 0.0]]))
    batch["prompt_mask"] = torch.tensor([[False, False, True, True, False]])
    losses = torch.tensor([[3.0, 1.0, 10.0, 20.0, 99.0]], requires_grad=True)
    loss, extra = weighted_loss(to_micro_batch(batch, CPU), losses)
    figures = dict(zip(LOSS_FIGURES, extra["figures"].tolist(), strict=True))
    assert figures == pytest.approx(
        {"loss": 7 / 2.2, "context_loss_sum": 4, "context_tokens": 2, "prompt_loss_sum": 30, "prompt_tokens": 2}
    )
    loss.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([[1.0, 1.0, 0.1, 0.1, 0.0]]) / 2.2)
    assert not extra["figures"].requires_grad


def test_positions_and_indices_pass_through():
    batch = batch_of(torch.ones(2, 3)) | {"position_ids": torch.tensor([[0, 1, 9], [0, 8, 9]])}
    made = to_micro_batch(batch, CPU)
    assert made.position_ids.tolist() == [[0, 1, 9], [0, 8, 9]] and made.sample_indices.tolist() == [0, 1]
