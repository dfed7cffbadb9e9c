"""Bootstrap intervals against what is known of means."""

from __future__ import annotations

import numpy as np
import pytest

from endprompt_megatron.comparison.bootstrap import bootstrap_interval


def test_interval_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(0).normal(50, 10, 2000)
    low, high = bootstrap_interval(list(values))
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05) and high == pytest.approx(values.mean() + half, abs=0.05)


def test_equal_values_have_no_width_and_a_seed_repeats_itself():
    assert bootstrap_interval([100.0] * 5) == (100.0, 100.0)
    assert bootstrap_interval([0.0, 100.0, 100.0], seed=3) == bootstrap_interval([0.0, 100.0, 100.0], seed=3)
