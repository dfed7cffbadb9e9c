"""Compute the uncertainty of scores and of their differences: bootstrap intervals over samples, paired comparisons of two models on the
same samples, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

from endprompt_megatron.comparison.statistics import sign_flip_test, summarize
from endprompt_megatron.errors import DataError

_SampleId = TypeVar("_SampleId", bound=Hashable)
CONFIDENCE = 0.95
_RESAMPLES = 9999
_BATCH = 2**22  # number of resampled values in memory at a time
_FEWEST_SEEDS = 3


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean.

    Equal values give (mean, mean), because all resamples are equal. Such an interval does not mean that the mean is certain, especially for
    a few samples that all score 0 or 100.

    Args:
        values: one score per sample.
        confidence: confidence level, between 0 and 1.
        seed: seed of the resampling.
        resamples: number of resamples.
    Returns:
        (lower, upper); both NaN for fewer than two values, which have no spread.
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
    """Comparison of two models on the same samples.

    Attributes:
        difference: score of the first model minus score of the second, mean over common samples.
        interval: percentile bootstrap interval of the difference over samples; NaN for fewer than two samples.
        p: p-value of a two-sided sign-flip permutation test with the sample as unit; NaN for fewer than two samples.
        samples: number of samples common to both.
        left_out: number of samples that only one of the models has.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    samples: int
    left_out: int


def paired_comparison(
    first: Mapping[_SampleId, float], second: Mapping[_SampleId, float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> PairedComparison:
    """Compare two models on the samples that both have.

    Args:
        first, second: {sample id: score}; equal ids must be the same prompt.
        confidence: confidence level of the interval.
        seed: seed of the resampling.
    Raises:
        DataError: the models have no common sample.
    """
    common = [sample for sample in first if sample in second]
    if not common:
        raise DataError(
            f"{len(first)} and {len(second)} samples have none in common: a paired comparison needs the same samples. "
            f"Evaluate both models with the same task, length, seed and tokenizer."
        )
    differences = np.array([first[sample] - second[sample] for sample in common], dtype=np.float64)
    return PairedComparison(
        float(differences.mean()),
        bootstrap_interval(differences.tolist(), confidence=confidence, seed=seed),
        sign_flip_test(differences),
        len(common),
        len(first) + len(second) - 2 * len(common),
    )


@dataclass(frozen=True)
class SeedSummary:
    """A score over seeds.

    Attributes:
        mean: mean over seeds.
        deviation: standard deviation (n - 1) over seeds; NaN for one seed.
        interval: Student's t interval of the mean with the seed as unit; NaN for fewer than three seeds.
        seeds: number of seeds.
    """

    mean: float
    deviation: float
    interval: tuple[float, float]
    seeds: int


def combine_seeds(values: Sequence[float], *, confidence: float = CONFIDENCE) -> SeedSummary:
    """Return the mean, the deviation and the interval over seeds.

    The interval is Student's t interval, because a bootstrap interval over so few seeds is far too narrow (three seeds have ten different
    resamples). For two seeds, the t interval would be 18 standard deviations wide and therefore useless, so the function returns NaN.

    Args:
        values: one score per seed; NaN for a score that was not measured.
        confidence: confidence level of the interval.
    """
    found = summarize(list(values))
    interval = (math.nan, math.nan)
    if found.count >= _FEWEST_SEEDS:
        half = float(stats.t.ppf((1 + confidence) / 2, found.count - 1)) * found.deviation / math.sqrt(found.count)
        interval = (found.mean - half, found.mean + half)
    return SeedSummary(found.mean, found.deviation, interval, found.count)
