"""Paired tests of methods against a reference. A t-test has the seed as unit, because each seed repeats training and probes. A sign-flip
permutation test has the haystack as unit, because both models read the same haystacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from endprompt_megatron.comparison.results import TASKS, RunResult

_RESAMPLES = 9999
MEASURES = ("log_perplexity", *TASKS)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1) over seeds. The deviation is NaN for one seed."""

    mean: float
    deviation: float
    count: int


def summarize(values: list[float]) -> Summary:
    """Return the mean and standard deviation of the values. NaN values are ignored."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Summary(math.nan, math.nan, 0)
    return Summary(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))


@dataclass(frozen=True)
class PairedTest:
    """Comparison of a method with the reference in one measure.

    Attributes:
        label: label of the method.
        measure: log_perplexity in nats per token (lower is better), or the name of a task, which stands for the log-probability of its
            answers in nats (higher is better). Both are means over lengths.
        difference: method minus reference on common questions, mean over common seeds.
        seeds: number of common seeds.
        p_seeds: p-value of a two-sided paired t-test over seeds; NaN with fewer than two seeds.
        haystacks: number of haystacks that both models read (0 for perplexity).
        p_haystacks: p-value of a two-sided sign-flip permutation test of the difference over haystacks; NaN with fewer than two haystacks.
            The test covers the variation between haystacks but not between training runs, so its result holds only for these trained
            models.
    """

    label: str
    measure: str
    difference: float
    seeds: int
    p_seeds: float
    haystacks: int
    p_haystacks: float


def paired_tests(groups: dict[str, list[RunResult]], reference: str) -> list[PairedTest]:
    """Compare every label with the reference in every measure that both have.

    Args:
        groups: {label: runs}, as returned by results.by_label.
        reference: a key of groups.
    """
    theirs = {run.seed: run for run in groups.get(reference, [])}
    tests = []
    for label, runs in groups.items():
        pairs = [(run, theirs[run.seed]) for run in runs if run.seed in theirs]
        for measure in MEASURES if label != reference else ():
            shares = [_shares(run, other, measure) for run, other in pairs]
            shares = [share for share in shares if len(share)]
            if shares:
                differences = [float(share.sum()) for share in shares]
                units = np.concatenate(shares) / len(shares) if measure in TASKS else np.array([])
                tests.append(
                    PairedTest(
                        label,
                        measure,
                        float(np.mean(differences)),
                        len(differences),
                        _t_test(differences),
                        len(units),
                        sign_flip_test(units),
                    )
                )
    return tests


def _shares(run: RunResult, other: RunResult, measure: str) -> np.ndarray:
    """Return the contribution of each haystack (for perplexity, of each window) to the difference of two runs. The contributions add up to
    the difference. The difference is a mean over common lengths; for a task, the value of a length is the mean difference over its
    haystacks. The result is empty if the runs have no common questions."""
    if measure not in TASKS:
        own, others = run.perplexity(), other.perplexity()
        windows = sorted(own.keys() & others.keys())
        return np.array([math.log(own[window] / others[window]) / len(windows) for window in windows])
    mine, theirs = run.scores(measure), other.scores(measure)
    by_length = []
    for length in sorted(mine.keys() & theirs.keys()):
        rows, other_rows = mine[length].get("records", []), theirs[length].get("records", [])
        if rows and [row[0] for row in rows] == [row[0] for row in other_rows]:
            differences = [row[3] - other_row[3] for row, other_row in zip(rows, other_rows, strict=True)]
            by_length.append(_by_haystack([row[0] for row in rows], differences, several=measure == "multi_key"))
    return np.concatenate([np.array(found) / (len(found) * len(by_length)) for found in by_length]) if by_length else np.array([])


def _by_haystack(depths: list[float | None], differences: list[float], *, several: bool) -> list[float]:
    """Return the mean difference per haystack. With `several`, a haystack may have several questions. Their depths ascend, so a depth that
    is not larger than the previous depth starts a new haystack. Without `several`, every question has its own haystack."""
    haystacks: list[list[float]] = []
    previous: float | None = None
    for depth, difference in zip(depths, differences, strict=True):
        if not (several and haystacks and depth is not None and previous is not None and depth > previous):
            haystacks.append([])
        haystacks[-1].append(difference)
        previous = depth
    return [float(np.mean(found)) for found in haystacks]


def _t_test(differences: list[float]) -> float:
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:  # t is undefined without spread: equal runs, or the same difference for every seed
        return 1.0 if differences[0] == 0 else math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip_test(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the sum of differences under sign flips; NaN for fewer than two differences. The test uses all flips
    if there are few differences, and random flips otherwise."""
    if len(differences) < 2:
        return math.nan
    test = stats.permutation_test(
        (differences,),
        lambda values, axis: np.sum(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
