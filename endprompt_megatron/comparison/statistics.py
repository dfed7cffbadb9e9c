"""Is a difference more than chance? Two paired tests against a reference, each of which says what it counts: a t-test whose unit is the
seed (training and probes anew), and a sign-flip permutation test whose unit is the question (the same prompt put to both models)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from endprompt_megatron.comparison.results import TASKS, RunResult, log_perplexity, task_mean

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
        difference: method minus reference, mean over common seeds.
        seeds: common seeds.
        p_seeds: two-sided paired t-test over seeds; NaN with fewer than two.
        questions: questions put to both (0 for perplexity).
        p_questions: two-sided sign-flip permutation test over these; NaN without any. It knows the noise of the prompts, not that of
            training: read it as what these very models do.
    """

    label: str
    measure: str
    difference: float
    seeds: int
    p_seeds: float
    questions: int
    p_questions: float


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
            differences = [_value(run, measure) - _value(other, measure) for run, other in pairs]
            differences = [value for value in differences if not math.isnan(value)]
            if differences:
                questions = np.concatenate([_question_differences(run, other, measure) for run, other in pairs])
                tests.append(
                    PairedTest(
                        label,
                        measure,
                        float(np.mean(differences)),
                        len(differences),
                        _t_test(differences),
                        len(questions),
                        _sign_flip_test(questions),
                    )
                )
    return tests


def _value(run: RunResult, measure: str) -> float:
    return log_perplexity(run) if measure == "log_perplexity" else task_mean(run, measure, "key_log_probability")


def _question_differences(run: RunResult, other: RunResult, measure: str) -> np.ndarray:
    """Differences of log-probability, question by question."""
    found: list[float] = []
    if measure in TASKS:
        mine, theirs = run.scores(measure), other.scores(measure)
        for length in sorted(mine.keys() & theirs.keys()):
            rows, other_rows = mine[length].get("records", []), theirs[length].get("records", [])
            if [row[0] for row in rows] == [row[0] for row in other_rows]:
                found += [row[3] - other_row[3] for row, other_row in zip(rows, other_rows, strict=True)]
    return np.array(found)


def _t_test(differences: list[float]) -> float:
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) == 0:  # no spread, no t: equal runs, or one difference repeated to the bit
        return 1.0 if differences[0] == 0 else math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _sign_flip_test(differences: np.ndarray) -> float:
    if len(differences) < 2:
        return math.nan
    test = stats.permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
