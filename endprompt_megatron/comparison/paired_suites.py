"""Compare models by their scores of recipes/evaluate.py, for each task and length. Seeds are combined, and differences are paired by
sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.comparison.bootstrap import PairedComparison, SeedSummary, combine_seeds, paired_comparison
from endprompt_megatron.comparison.paired_evaluations import Evaluation, Key, SampleId, TaskScore
from endprompt_megatron.evaluation.tasks import PERPLEXITY

# conditions that change scores although the questions are the same
_COMPARED_CONDITIONS = ("harness", "backend", "dtype", "bos", "chat_template", "seed")


@dataclass(frozen=True)
class TaskComparison:
    """A model's score in one task at one length, and its difference to a reference.

    Attributes:
        key: suite, task and length.
        score: score over the training seeds.
        difference: difference to the reference on the samples that both have, with each sample's score averaged over the common seeds. Its
            interval includes the noise of the samples but not the noise of training. None if no sample is common, or if this model is the
            reference.
        seeds: number of seeds common to both.
        differing: names of the evaluation conditions that differ. If there are any, the difference is not due to the models alone.
    """

    key: Key
    score: SeedSummary
    difference: PairedComparison | None
    seeds: int
    differing: tuple[str, ...]


def compare_evaluations(models: Mapping[str, Mapping[int, Evaluation]], reference: str) -> dict[str, list[TaskComparison]]:
    """Compare every model with the reference in each task and length of the model.

    Args:
        models: {label: {training seed: scores}}.
        reference: label of the reference. Tasks for which the reference has no score get no difference.
    Returns:
        {label: comparisons, sorted by suite, task and length}.
    """
    of_reference = models.get(reference, {})
    found = {}
    for label, own in models.items():
        keys = sorted({key for scores in own.values() for key in scores})
        found[label] = [_task_comparison(key, own, {} if label == reference else of_reference) for key in keys]
    return found


def _task_comparison(key: Key, model: Mapping[int, Evaluation], reference: Mapping[int, Evaluation]) -> TaskComparison:
    score = combine_seeds([scores[key].score for scores in model.values() if key in scores])
    seeds = [seed for seed in model if key in model[seed] and key in reference.get(seed, {})]
    pairs = [(model[seed][key], reference[seed][key]) for seed in seeds]
    differing = {name for own, other in pairs for name in _differing(key, own, other)}
    first, second = (_mean_over_seeds(pair[side].samples for pair in pairs) for side in (0, 1))
    difference = paired_comparison(first, second) if first.keys() & second.keys() else None
    return TaskComparison(key, score, difference, len(seeds), tuple(sorted(differing)))


def _differing(key: Key, own: TaskScore, other: TaskScore) -> set[str]:
    """Return the names of the conditions in which two scores of a task differ."""
    conditions, others = own.conditions, other.conditions
    found = {name for name in _COMPARED_CONDITIONS if conditions.get(name) != others.get(name)}
    settings = [("num_fewshot", own.entry["task_id"])] + ([("perplexity", "stride")] if key.suite == PERPLEXITY else [])
    for group, name in settings:
        if (conditions.get(group) or {}).get(name) != (others.get(group) or {}).get(name):
            found.add(f"{group}.{name}")
    return found


def _mean_over_seeds(seeds: Iterable[Mapping[SampleId, float]]) -> dict[SampleId, float]:
    """Return the mean score of every sample that all seeds have."""
    scored: Sequence[Mapping[SampleId, float]] = list(seeds)
    if not scored:
        return {}
    common = [sample for sample in scored[0] if all(sample in other for other in scored)]
    return {sample: float(np.mean([scores[sample] for scores in scored])) for sample in common}
