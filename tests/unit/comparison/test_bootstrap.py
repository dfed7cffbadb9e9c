"""Intervals against simulation, scipy and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from endprompt_megatron.comparison.bootstrap import bootstrap_interval, combine_seeds, paired_comparison
from endprompt_megatron.errors import DataError


@pytest.mark.parametrize(
    ("draw", "mean"), [(lambda random: random.normal(3.0, 2.0, 40), 3.0), (lambda random: 100.0 * (random.random(60) < 0.7), 70.0)]
)
def test_the_interval_covers_the_mean_as_often_as_it_says(draw, mean):
    """300 experiments: a 90 % interval covers 270 of them, give or take 5 (one standard deviation) and what the percentile bootstrap is
    known to be short of for few samples."""
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(draw(random), confidence=0.9, seed=index, resamples=599) for index in range(300)]
    covered = np.mean([low <= mean <= high for low, high in intervals])
    assert 0.85 <= covered <= 0.94


def test_the_interval_is_near_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).normal(50.0, 10.0, 2000)
    expected = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / math.sqrt(2000))
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.05)
    assert bootstrap_interval(values, confidence=0.5)[0] > bootstrap_interval(values)[0]


def test_the_interval_by_hand():
    """Two values 0 and 1: the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0, 5.0], seed=3) == bootstrap_interval([0.0, 1.0, 5.0], seed=3)


def test_many_samples_are_resampled_piece_by_piece():
    values = np.random.default_rng(2).random(20_000)
    low, high = bootstrap_interval(values, resamples=999)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(20_000), rel=0.1)


def test_degenerate_samples():
    assert bootstrap_interval([100.0] * 7) == (100.0, 100.0)
    assert all(math.isnan(end) for values in ([], [3.0]) for end in bootstrap_interval(values))


def test_paired_comparison_by_hand():
    """Differences 1, 2, 3 and 4: of the 16 sign patterns two reach a sum of 10 in size. Three samples have no partner."""
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "only first": 90.0}
    second = {"d": 0.0, "c": 0.0, "b": 0.0, "a": 0.0, "x": 7.0, "y": 8.0}
    found = paired_comparison(first, second)
    assert (found.difference, found.p, found.samples, found.left_out) == (2.5, pytest.approx(2 / 16), 4, 3)
    assert found.interval == bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    turned = paired_comparison(second, first)
    assert (turned.difference, turned.p) == (-2.5, pytest.approx(2 / 16))


def test_paired_p_agrees_with_the_t_test():
    random = np.random.default_rng(3)
    base = random.normal(0.0, 5.0, 200)
    gain = random.normal(0.2, 1.0, 200)
    first, second = (dict(enumerate(values)) for values in (base + gain, base))
    expected = stats.ttest_rel(base + gain, base).pvalue
    assert 0.0005 < expected < 0.2
    assert paired_comparison(first, second).p == pytest.approx(expected, rel=0.2, abs=0.003)


def test_equal_models_differ_by_nothing():
    scores = {index: 100.0 * (index % 2) for index in range(20)}
    found = paired_comparison(scores, scores)
    assert (found.difference, found.interval, found.p) == (0.0, (0.0, 0.0), pytest.approx(1.0))


def test_one_common_sample_gives_a_difference_and_no_more():
    found = paired_comparison({1: 5.0}, {1: 3.0})
    assert (found.difference, found.samples) == (2.0, 1) and math.isnan(found.p) and math.isnan(found.interval[0])


def test_samples_that_do_not_match_are_refused():
    with pytest.raises(DataError, match="2 and 1 samples have none in common"):
        paired_comparison({1: 5.0, 2: 6.0}, {3: 5.0})


def test_seeds_combined():
    """70, 72, 77: mean 73, deviation sqrt(13); t with 2 degrees of freedom at 97.5 % is 4.3027."""
    found = combine_seeds([70.0, 72.0, 77.0])
    half = 4.302653 * math.sqrt(13 / 3)
    assert (found.mean, found.seeds) == (73.0, 3) and found.deviation == pytest.approx(math.sqrt(13))
    assert found.interval == pytest.approx((73 - half, 73 + half))
    values = np.random.default_rng(4).normal(size=6)
    assert combine_seeds(values).interval == pytest.approx(stats.t.interval(0.95, 5, values.mean(), stats.sem(values)))
    two = combine_seeds([1.0, 3.0, math.nan])
    assert (two.mean, two.seeds) == (2.0, 2) and two.deviation == pytest.approx(math.sqrt(2)) and math.isnan(two.interval[0])
    assert math.isnan(combine_seeds([4.0]).deviation) and math.isnan(combine_seeds([]).mean)


def test_the_interval_over_seeds_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(5)
    intervals = [combine_seeds(random.normal(60.0, 2.0, 3)).interval for _ in range(2000)]
    assert np.mean([low <= 60.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)
