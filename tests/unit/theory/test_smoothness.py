"""S(d) against transformers' own rotation, its derivatives against differences, and eq. 3 on random sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.theory.smoothness import (
    ScoreFunctions,
    frequency_held_across,
    measure_smoothness,
    outside_of_observed,
    reach_of_bound,
    score_functions,
)

ROPES = {
    "none": RopeScaling("none", 10000.0, 32),
    "pi": RopeScaling("pi", 10000.0, 32, factor=4.0),
    "ntk": RopeScaling("ntk", 10000.0, 32, factor=4.0),
    "yarn": RopeScaling("yarn", 10000.0, 32, factor=4.0, original_context_length=256),
    "llama3": RopeScaling("llama3", 10000.0, 32, factor=8.0, original_context_length=256),
}


def random_vectors(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal(shape), random.standard_normal(shape)


def rotated(vectors: np.ndarray, positions: np.ndarray, rope: RopeScaling) -> torch.Tensor:
    """transformers' rotation of [tokens, head_dim], float64."""
    angles = torch.from_numpy(positions.astype(np.float64))[:, None] * torch.from_numpy(rope.inv_freq().astype(np.float64))
    angles = torch.cat([angles, angles], dim=-1)[None]
    there = torch.from_numpy(vectors)[None, None]
    turned, _ = apply_rotary_pos_emb(there, there, angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)
    return turned[0, 0]


@pytest.mark.parametrize("name", ROPES)
def test_score_is_the_product_of_the_rotated_vectors(name):
    rope = ROPES[name]
    query, key = random_vectors(0, 40, 32)
    random = np.random.default_rng(1)
    distances = random.integers(0, 1000, 40)
    positions = distances + random.integers(0, 1000, 40)
    expected = (rotated(query, positions, rope) * rotated(key, positions - distances, rope)).sum(-1) / 32**0.5
    functions = score_functions(query, key, rope)
    found = [functions.at(np.array([distance]))[row, 0] for row, distance in enumerate(distances)]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("name", ROPES)
def test_derivatives_are_those_of_finite_differences(name):
    query, key = random_vectors(2, 3, 5, 32)
    functions = score_functions(query, key, ROPES[name])
    distances, step = np.linspace(0, 300, 101), 1e-5
    for order in (1, 2):
        after, before = (functions.at(distances + sign * step, derivative=order - 1) for sign in (1, -1))
        np.testing.assert_allclose(functions.at(distances, derivative=order), (after - before) / (2 * step), atol=1e-8)


def test_one_cosine_by_hand():
    """q = k = (1, 0) with theta_0 = 1: S = cos(d) / sqrt(2), and the bound is attained."""
    found = measure_smoothness(score_functions([1.0, 0.0], [1.0, 0.0], RopeScaling("none", 10000.0, 2)), last_distance=100)
    for value in (found.sup_score, found.sup_slope, found.sup_curvature, found.amplitude_sum, found.slope_sum):
        assert value == pytest.approx(0.5**0.5, rel=0.002)
    assert found.ratio == pytest.approx(1, rel=0.002) and found.ratio_everywhere == pytest.approx(1)
    assert found.grid_step <= 0.125


@pytest.mark.parametrize("name", ROPES)
def test_linear_interpolation_divides_slope_and_curvature(name):
    """Over a window s times as long PI shows the same scores, and divides slopes by s and curvatures by s^2."""
    query, key = random_vectors(3, 6, 32)
    own = measure_smoothness(score_functions(query, key, ROPES["none"]), last_distance=500)
    stretched = measure_smoothness(score_functions(query, key, ROPES["pi"]), last_distance=2000)
    np.testing.assert_allclose(stretched.sup_score, own.sup_score, rtol=1e-6)
    np.testing.assert_allclose(stretched.sup_slope, own.sup_slope / 4, rtol=1e-6)
    np.testing.assert_allclose(stretched.sup_curvature, own.sup_curvature / 16, rtol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6))
def test_bernstein_on_a_long_window(seed, count):
    """Sums of cosines with frequencies in [0.05, 1] over hundreds of periods: eq. 3 holds up to what a window can miss."""
    random = np.random.default_rng(seed)
    coefficients = random.standard_normal(count) + 1j * random.standard_normal(count)
    functions = ScoreFunctions(coefficients, random.uniform(0.05, 1, count))
    found = measure_smoothness(functions, last_distance=6000)
    assert found.sup_slope <= found.bound_slope * 1.03
    assert found.sup_curvature <= found.bound_curvature * 1.06
    assert found.sup_score <= found.amplitude_sum and found.sup_slope <= found.slope_sum
    assert found.slope_sum <= found.highest_frequency * found.amplitude_sum * (1 + 1e-12)


def test_a_short_window_can_violate_the_bound_and_the_ratio_shows_it():
    """sin(d / 100) on [0, 10]: steepest at 0, and far from its supremum."""
    found = measure_smoothness(ScoreFunctions(np.array([-1j]), np.array([0.01])), last_distance=10)
    assert found.ratio == pytest.approx(1 / np.sin(0.1), rel=1e-6) and found.ratio > 10
    assert found.ratio_everywhere == 1


def test_many_pairs_are_measured_as_each_alone(monkeypatch):
    """Also where the grid is taken in parts."""
    query, key = random_vectors(4, 2, 3, 32)
    together = measure_smoothness(score_functions(query, key, ROPES["pi"]), last_distance=300)
    monkeypatch.setattr("endprompt_megatron.theory.smoothness._VALUES_AT_ONCE", 100)
    alone = measure_smoothness(score_functions(query[1, 2], key[1, 2], ROPES["pi"]), last_distance=300)
    assert together.sup_slope.shape == (2, 3)
    for name in ("sup_score", "sup_slope", "sup_curvature", "ratio", "slope_sum"):
        assert getattr(together, name)[1, 2] == pytest.approx(float(getattr(alone, name)))


def test_what_the_gap_shows():
    """cos(2 pi d / 40) over 0 .. 40 without 10 .. 30: the trough is never seen, 0 at 10 and 30 is (to rounding)."""
    functions = ScoreFunctions(np.array([[1.0 + 0j]]), np.array([2 * np.pi / 40]))
    share, excess = outside_of_observed(functions, (11, 29), last_distance=40)
    assert share.tolist() == [1.0]
    assert excess[0] == pytest.approx(1.0)
    share, excess = outside_of_observed(functions, (25, 29), last_distance=40)
    assert share.tolist() == [0.0] and excess.tolist() == [0.0]


def test_reach():
    assert reach_of_bound(0.5) == 4
    assert frequency_held_across((11, 29)) == 4 / 20  # known at 10 and 30: ten positions from either edge to the middle, 2 / 10
    functions = ScoreFunctions(np.array([3.0, 1.0j]), np.array([1.0, 0.1]))
    assert functions.amplitude_share_below(0.2) == 0.25


def test_sizes_must_agree():
    with pytest.raises(ConfigError, match="head_dim=32"):
        score_functions(np.zeros(16), np.zeros(16), ROPES["none"])
