"""Is a difference more than chance? Two paired tests against a reference, each of which says what it counts: a t-test whose unit is the
seed (training and probes anew), and a sign-flip permutation test whose unit is the haystack (the same one put to both models)."""

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
    """Mean and standard deviation (n - 1) over seeds; the deviation is NaN for one."""

    mean: float
    deviation: float
    count: int


def summarize(values: list[float]) -> Summary:
    """Mean and standard deviation of the values that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Summary(math.nan, math.nan, 0)
    return Summary(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else math.nan, len(known))


@dataclass(frozen=True)
class PairedTest:
    """A method against the reference in one measure.

    Attributes:
        label, measure: what is compared; log_perplexity in nats a token (less is better), tasks by the log-probability of the answer in
            nats (more is better), means over lengths.
        difference: method minus reference over what both were asked, mean over common seeds.
        seeds: common seeds.
        p_seeds: two-sided paired t-test over seeds; NaN with fewer than two.
        haystacks: put to both (0 for perplexity).
        p_haystacks: two-sided sign-flip permutation test of the same difference over these; NaN with fewer than two. It knows the noise of
            the haystacks, not that of training: read it as what these very models do.
    """

    label: str
    measure: str
    difference: float
    seeds: int
    p_seeds: float
    haystacks: int
    p_haystacks: float


def paired_tests(groups: dict[str, list[RunResult]], reference: str) -> list[PairedTest]:
    """Every label against the reference in every measure that both have.

    Args:
        groups: from results.by_label.
        reference: a label of it.
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
    """What each haystack (for perplexity: each window) adds to the difference of two runs: they sum to the mean over common lengths of
    the mean over a length's haystacks. Empty where the runs have nothing in common."""
    if measure not in TASKS:
        mine, theirs = run.perplexity(), other.perplexity()
        windows = sorted(mine.keys() & theirs.keys())
        return np.array([math.log(mine[window] / theirs[window]) / len(windows) for window in windows])
    mine, theirs = run.scores(measure), other.scores(measure)
    by_length = []
    for length in sorted(mine.keys() & theirs.keys()):
        rows, other_rows = mine[length].get("records", []), theirs[length].get("records", [])
        if rows and [row[0] for row in rows] == [row[0] for row in other_rows]:
            differences = [row[3] - other_row[3] for row, other_row in zip(rows, other_rows, strict=True)]
            by_length.append(_by_haystack([row[0] for row in rows], differences, several=measure == "multi_key"))
    return np.concatenate([np.array(found) / (len(found) * len(by_length)) for found in by_length]) if by_length else np.array([])


def _by_haystack(depths: list[float | None], differences: list[float], *, several: bool) -> list[float]:
    """Means over the questions of a haystack. Those of one haystack go from its start to its end, so a depth that is not behind the one
    before begins the next haystack."""
    haystacks: list[list[float]] = []
    previous = None
    for depth, difference in zip(depths, differences, strict=True):
        if not (several and haystacks and depth is not None and depth > previous):
            haystacks.append([])
        haystacks[-1].append(difference)
        previous = depth
    return [float(np.mean(found)) for found in haystacks]


def _t_test(differences: list[float]) -> float:
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:  # no spread, no t: equal runs, or one difference repeated to the bit
        return 1.0 if differences[0] == 0 else math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip_test(differences: np.ndarray) -> float:
    """Two-sided p of a sum of differences under flips of their signs: all of them where they are few, else random ones. NaN for fewer than
    two."""
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
