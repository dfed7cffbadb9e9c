"""How sure is a score, and a difference of two? Bootstrap intervals over samples, paired comparison of two models on the same samples, and
several seeds combined, where the seed is the unit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from endprompt_megatron.comparison.statistics import sign_flip_test, summarize
from endprompt_megatron.errors import DataError

CONFIDENCE = 0.95
_RESAMPLES = 9999
_BATCH = 2**22  # resampled values held at once
_FEWEST_SEEDS = 3


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Equal values give (mean, mean): no resample differs. That is no certainty, least of all for few samples that all score 0 or 100.

    Args:
        values: a score each; at least two, or there is no spread to learn from.
        confidence: between 0 and 1.
        seed: of the resamples.
        resamples: how many.
    Returns:
        (lower, upper); both NaN for fewer than two values.
    """
    if len(values) < 2:
        return math.nan, math.nan
    known = np.asarray(values, dtype=np.float64)
    if np.ptp(known) == 0:
        return float(known[0]), float(known[0])
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BATCH // len(known)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """One model against another on the same samples.

    Attributes:
        difference: first minus second, mean over common samples.
        interval: percentile bootstrap interval of it over samples; NaN for fewer than two.
        p: two-sided sign-flip permutation test, a sample is a unit; NaN for fewer than two.
        samples: common to both.
        left_out: that only one of them has.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    samples: int
    left_out: int


def paired_comparison(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> PairedComparison:
    """Compare two models by the samples that both answered.

    Args:
        first, second: {sample id: score}; equal ids must be the same prompt.
        confidence: of the interval.
        seed: of the resamples.
    Raises:
        DataError: no sample in common.
    """
    common = [sample for sample in first if sample in second]
    if not common:
        raise DataError(
            f"none of {len(first)} and {len(second)} samples is common to both: a paired comparison needs the same samples. "
            f"Evaluate both models with the same task, length, seed and tokenizer."
        )
    differences = np.array([first[sample] - second[sample] for sample in common], dtype=np.float64)
    return PairedComparison(
        float(differences.mean()),
        bootstrap_interval(differences, confidence=confidence, seed=seed),
        sign_flip_test(differences),
        len(common),
        len(first) + len(second) - 2 * len(common),
    )


@dataclass(frozen=True)
class SeedSummary:
    """A score over seeds.

    Attributes:
        mean: over seeds.
        deviation: standard deviation (n - 1) over seeds; NaN for one.
        interval: Student's t interval of the mean, a seed is a unit; NaN for fewer than three.
        seeds: how many.
    """

    mean: float
    deviation: float
    interval: tuple[float, float]
    seeds: int


def combine_seeds(values: Sequence[float], *, confidence: float = CONFIDENCE) -> SeedSummary:
    """Mean, deviation and interval over seeds.

    With as few units as there are seeds a bootstrap is far too narrow (three seeds have ten different resamples), so the interval is
    Student's. For two seeds it would be 18 standard deviations wide, which says nothing; they get none.

    Args:
        values: a score a seed; NaN where one was not measured.
        confidence: of the interval.
    """
    found = summarize(list(values))
    interval = (math.nan, math.nan)
    if found.count >= _FEWEST_SEEDS:
        half = float(stats.t.ppf((1 + confidence) / 2, found.count - 1)) * found.deviation / math.sqrt(found.count)
        interval = (found.mean - half, found.mean + half)
    return SeedSummary(found.mean, found.deviation, interval, found.count)
