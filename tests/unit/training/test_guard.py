"""Which steps count as bad."""

from __future__ import annotations

import math

import pytest

from endprompt_megatron.training.guard import WINDOW, StepGuard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_no_finite_numbers(value):
    guard = StepGuard(0.0, [])
    assert guard.fault(value, 1.0) == f"its loss is {value}"
    assert guard.fault(1.0, value) == f"its gradient norm is {value}"
    assert guard.recent_norms == [] and guard.fault(1.0, 1.0) is None and guard.recent_norms == [1.0]


def test_a_spike_is_far_above_the_median_of_its_like():
    guard = StepGuard(3.0, [])
    for norm in (1.0, 100.0, 1.0, 1.0):
        assert guard.fault(2.0, norm) is None, "too few steps to tell"
    assert guard.fault(2.0, 1.2) is None
    assert "is more than trainer.grad_spike_factor=3 times 1," in guard.fault(2.0, 3.1)
    assert guard.fault(2.0, 2.9) is None
    assert 3.1 not in guard.recent_norms, "a spike does not make the next one look normal"


def test_no_spikes_are_looked_for_by_default():
    guard = StepGuard(0.0, [1.0] * 10)
    assert guard.fault(2.0, 1e9) is None


def test_the_window_forgets():
    norms = [1.0]
    guard = StepGuard(2.0, norms)
    for _ in range(50):
        guard.fault(1.0, 1.5)
    assert norms == [1.5] * WINDOW, "the list of the checkpoint is the guard's own"
