"""The weighted loss, hand-worked, and the learning rate of each step."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from endprompt_megatron.config.schema import OptimConfig
from endprompt_megatron.data.batch import MicroBatch
from endprompt_megatron.training.optimizer import build_scheduler
from endprompt_megatron.training.step import LOSS_FIGURES, weighted_loss


def test_weighted_loss_by_hand():
    """Two context labels of weight 1, one prompt label of weight 0.5, one token without a label: (2 + 4 + 0.5 * 8) / 2.5 = 4."""
    raw = torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    batch = MicroBatch(
        tokens=torch.zeros(1, 4, dtype=torch.long),
        labels=torch.zeros(1, 4, dtype=torch.long),
        position_ids=torch.arange(4),
        loss_weights=raw / raw.sum(),
        prompt_mask=torch.tensor([[False, False, True, False]]),
        counted=raw > 0,
        sample_indices=torch.tensor([0]),
    )
    losses = torch.tensor([[2.0, 4.0, 8.0, 100.0]], requires_grad=True)
    loss, reported = weighted_loss(batch, losses)
    assert float(loss) == pytest.approx(4.0)
    assert dict(zip(LOSS_FIGURES, reported["figures"].tolist(), strict=True)) == pytest.approx(
        {"loss": 4.0, "context_loss_sum": 6.0, "context_tokens": 2.0, "prompt_loss_sum": 8.0, "prompt_tokens": 1.0}
    )
    loss.backward()
    assert losses.grad.tolist() == [pytest.approx([0.4, 0.4, 0.2, 0.0])]


def _rates(optim: OptimConfig, *, max_steps: int, first_step: int = 1) -> list[float]:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "lr_mult": 1.0, "wd_mult": 1.0}])
    scheduler = build_scheduler(optimizer, optim, max_steps=max_steps, global_batch_size=8, consumed_samples=(first_step - 1) * 8)
    rates = []
    for _ in range(first_step, max_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=8)
    return rates


def test_constant_rate_after_a_warm_up_without_a_zero_step():
    assert _rates(OptimConfig(lr=1.0, warmup_steps=4), max_steps=6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_rates_end_at_the_minimum(schedule):
    rates = _rates(OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, lr_schedule=schedule), max_steps=10)
    assert rates[1] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert all(earlier > later for earlier, later in pairwise(rates[1:]))
    middle = rates[5]  # halfway between the peak at step 2 and the end at step 10
    assert middle == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_resumed_run_has_the_rates_of_the_undisturbed_one(schedule):
    optim = OptimConfig(lr=3e-4, warmup_steps=3, lr_schedule=schedule)
    assert _rates(optim, max_steps=12, first_step=6) == pytest.approx(_rates(optim, max_steps=12)[5:])
