"""Models compared by their scores of recipes/evaluate.py: by task and length, seeds combined, and paired on the samples that two of them
answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt_megatron.comparison.bootstrap import PairedComparison, SeedSummary, combine_seeds, paired_comparison
from endprompt_megatron.comparison.paired_evaluations import Evaluation, Key, SampleId

# conditions under which equal questions can still get other scores
_DECISIVE = ("harness", "backend", "dtype", "bos", "chat_template", "seed")


@dataclass(frozen=True)
class TaskComparison:
    """One task at one length: a model's score, and against a reference.

    Attributes:
        key: what was asked.
        score: over the seeds of the training.
        difference: to the reference, on the samples that both answered, each sample's score averaged over the common seeds: it knows the
            noise of the samples, not that of training. None where nothing is common, or this is the reference.
        seeds: common to both.
        differing: conditions that are not the same, so that the difference is not of the models alone.
    """

    key: Key
    score: SeedSummary
    difference: PairedComparison | None
    seeds: int
    differing: tuple[str, ...]


def compare_evaluations(models: Mapping[str, Mapping[int, Evaluation]], reference: str) -> dict[str, list[TaskComparison]]:
    """Every model against the reference in every task and length that it was put to.

    Args:
        models: {label: {seed of the training: scores}}.
        reference: a label; where it has no scores there are no differences.
    Returns:
        {label: in the order of suite, task, length}.
    """
    theirs = models.get(reference, {})
    found = {}
    for label, mine in models.items():
        keys = sorted({key for scores in mine.values() for key in scores})
        found[label] = [_task_comparison(key, mine, {} if label == reference else theirs) for key in keys]
    return found


def _task_comparison(key: Key, mine: Mapping[int, Evaluation], theirs: Mapping[int, Evaluation]) -> TaskComparison:
    score = combine_seeds([scores[key].score for scores in mine.values() if key in scores])
    seeds = [seed for seed in mine if key in mine[seed] and key in theirs.get(seed, {})]
    pairs = [(mine[seed][key], theirs[seed][key]) for seed in seeds]
    differing = {name for own, other in pairs for name in _differing(key, own.conditions, other.conditions)}
    first, second = (_mean_over_seeds(pair[side].samples for pair in pairs) for side in (0, 1))
    difference = paired_comparison(first, second) if first.keys() & second.keys() else None
    return TaskComparison(key, score, difference, len(seeds), tuple(sorted(differing)))


def _differing(key: Key, own: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Names of the conditions of two evaluations that are not the same."""
    found = {name for name in _DECISIVE if own.get(name) != other.get(name)}
    for group, name in (("num_fewshot", key.task), ("perplexity", "stride")):
        applies = group == "num_fewshot" or group == key.suite
        if applies and (own.get(group) or {}).get(name) != (other.get(group) or {}).get(name):
            found.add(f"{group}.{name}")
    return found


def _mean_over_seeds(seeds: Iterable[Mapping[SampleId, float]]) -> dict[SampleId, float]:
    """The mean score of every sample that was put to all seeds."""
    scored: Sequence[Mapping[SampleId, float]] = list(seeds)
    if not scored:
        return {}
    common = [sample for sample in scored[0] if all(sample in other for other in scored)]
    return {sample: float(np.mean([scores[sample] for scores in scored])) for sample in common}
