"""Read the results of a study: the scores and the cost of its finished runs, by method and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from endprompt_megatron.comparison.paired_evaluations import FOLDER, Evaluation, read_evaluation
from endprompt_megatron.comparison.runner import RunOutcome
from endprompt_megatron.errors import ConfigError, DamagedFileError, DataError
from endprompt_megatron.log import read_metrics
from endprompt_megatron.output_files import read_json

TASKS = ("needle", "number", "word", "multi_key", "multi_value", "variable_tracking")
BASE = "base, untouched"
# file -> keys that are read, and their types
_RESULTS: dict[str, dict[str, type | UnionType]] = {
    "summary.json": {
        "experiment": str, "method": str, "seed": int, "steps": int, "tokens": int, "target_length": int, "rope_factor": int | float,
    },
    "evaluation.json": {"systems": dict, "conditions": dict},
}  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """The results of one run.

    Attributes:
        label: label of the run's row in tables.
        seed: seed of the run.
        summary: content of the run's summary.json.
        system: the trained system in the run's evaluation.json, the untrained system if the method trains nothing, or the base system if
            the label is BASE.
        conditions: the conditions in the run's evaluation.json.
        step_seconds: time of the fastest step in seconds; NaN without training. Other jobs on the machine can only slow steps down.
        peak_memory_gib: peak memory of one rank in training, over all attempts of the run.
        suites: scores of recipes/evaluate.py in the run's evaluation_suites/; empty if there are none.
    """

    label: str
    seed: int
    summary: dict[str, Any]
    system: dict[str, Any]
    conditions: dict[str, Any]
    step_seconds: float
    peak_memory_gib: float
    suites: Evaluation = field(default_factory=dict)

    @property
    def train_seconds(self) -> float:
        """Training time in seconds without other load on the machine: number of steps times the time of the fastest step."""
        return self.summary["steps"] * self.step_seconds if self.summary["steps"] else 0.0

    def scores(self, task: str) -> dict[int, dict[str, Any]]:
        """Return {length: scores} of a retrieval task."""
        return {int(length): found for length, found in (self.system.get(task) or {}).items()}

    def perplexity(self) -> dict[int, float]:
        """Return {window: perplexity}."""
        return {int(length): value for length, value in (self.system.get("perplexity") or {}).items()}


def read_run(directory: Path, *, label: str | None = None, seed: int | None = None, with_suites: bool = True) -> list[RunResult]:
    """Read the result of a finished run. If the run also probed the unchanged base, return a second result for the base.

    Args:
        directory: output directory of recipes/extend.py.
        label: label of the row; None uses the run's method.
        seed: seed of the result; None uses the run's seed.
        with_suites: whether to read the scores of recipes/evaluate.py as well.
    Raises:
        DataError: the directory has no finished run with probes, or its scores cannot be read.
    """
    missing = [name for name in _RESULTS if not (Path(directory) / name).exists()]
    if missing:
        raise DataError(
            f"{directory} has no finished run with probes ({' and '.join(missing)} not found). Finish it with recipes/extend.py and "
            f"probes.enabled=true."
        )
    summary, evaluation = (_read_result(Path(directory) / name, keys) for name, keys in _RESULTS.items())
    systems = evaluation["systems"]
    own = systems.get("trained" if summary["steps"] else "untrained")
    if own is None:
        raise DataError(f"{directory} did not probe its result. Start it again with probes.systems=[trained].")
    steps = [record for record in read_metrics(Path(directory) / "metrics.jsonl") if "step_seconds" in record]
    seed, conditions = summary["seed"] if seed is None else seed, evaluation["conditions"]
    seconds = min((record["step_seconds"] for record in steps), default=math.nan)
    memory = max((record["peak_memory_gib"] for record in steps), default=math.nan)
    suites = read_evaluation(Path(directory) / FOLDER) if with_suites else {}
    results = [RunResult(label or summary["method"], seed, summary, own, conditions, seconds, memory, suites)]
    if "base" in systems:
        untrained = {**summary, "steps": 0, "tokens": 0}
        results.append(RunResult(BASE, seed, untrained, systems["base"], conditions, math.nan, math.nan))
    return results


def _read_result(path: Path, keys: dict[str, type | UnionType]) -> dict[str, Any]:
    way_out = "Start the run's command again: it resumes and writes the file anew."
    found = read_json(path, way_out=way_out)
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind):
            raise DamagedFileError(path, f"does not have the content that was written: {key} is {found.get(key)!r}", way_out)
    return found


def fault_of(directory: Path) -> str | None:
    """Return why the results of a run cannot be read, or None if they can. The function ignores the scores of recipes/evaluate.py, because
    a new run would not repair them."""
    try:
        read_run(directory, with_suites=False)
    except DataError as error:
        return str(error)
    return None


def read_outcomes(outcomes: Iterable[RunOutcome]) -> tuple[list[RunResult], list[RunOutcome]]:
    """Return (results of finished runs, runs that failed)."""
    results, failed = [], []
    for outcome in outcomes:
        if outcome.failure is None:
            results += read_run(outcome.directory, label=outcome.request.label, seed=outcome.request.seed)
        else:
            failed.append(outcome)
    return results, failed


def distinct(results: list[RunResult]) -> list[RunResult]:
    """Keep one result per label and seed. Many runs may have probed the unchanged base, so its first result is kept.

    Raises:
        ConfigError: two runs have the same label and seed, and would count as two seeds.
    """
    kept: dict[tuple[str, int], RunResult] = {}
    for result in results:
        if (result.label, result.seed) not in kept:
            kept[result.label, result.seed] = result
        elif result.label != BASE:
            raise ConfigError(
                f"two runs are {result.label} with seed {result.seed} ({kept[result.label, result.seed].summary['experiment']} and "
                f"{result.summary['experiment']}): give one of them another label with collect=['LABEL=DIR']."
            )
    return list(kept.values())


def check_comparable(results: list[RunResult]) -> list[str]:
    """Return one line for each run whose windows or probes differ from those of the first run. Scores of such runs are not comparable."""
    if not results:
        return []
    notes = []
    first = results[0]
    free = {"seed", "end_prompt_tokens", "learning_rate", "global_batch_size", "device"}
    for result in results[1:]:
        differing = [key for key, value in first.conditions.items() if key not in free and result.conditions.get(key, value) != value]
        if result.summary["target_length"] != first.summary["target_length"]:
            differing.append("target_length")
        differing += [task for task in TASKS if result.scores(task).keys() != first.scores(task).keys()]
        if result.perplexity().keys() != first.perplexity().keys():
            differing.append("perplexity windows")
        if differing:
            notes.append(f"{result.label} seed {result.seed} differs from {first.label} seed {first.seed} in {', '.join(differing)}")
    return notes


def by_label(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Return {label: its runs sorted by seed}, with the labels in order of appearance."""
    grouped: dict[str, list[RunResult]] = {}
    for result in results:
        grouped.setdefault(result.label, []).append(result)
    return {label: sorted(runs, key=lambda run: run.seed) for label, runs in grouped.items()}


def log_perplexity(run: RunResult) -> float:
    """Return the mean over windows of the logarithm of the perplexity, in nats per token; NaN without measurements."""
    values = list(run.perplexity().values())
    return float(np.mean(np.log(values))) if values else math.nan


def task_mean(run: RunResult, task: str, figure: str, *, beyond: int = 0) -> float:
    """Return the mean over lengths > `beyond` of a score (exact_match, digit_accuracy, key_log_probability); NaN without measurements."""
    values = [found[figure] for length, found in run.scores(task).items() if length > beyond]
    return float(np.mean(values)) if values else math.nan


def native_window(run: RunResult) -> int:
    """Return the native window of the base, in positions."""
    return round(run.summary["target_length"] / run.summary["rope_factor"])


def equal_time_steps(runs: list[RunResult], reference: list[RunResult], *, within: float) -> int | None:
    """Return the number of steps with which a method trains as long as the reference.

    Args:
        runs, reference: runs of the method and of the reference.
        within: relative difference up to which times count as equal.
    Returns:
        The number of steps; None if the times are already equal or if one of the two trains nothing.
    """
    own = min((run.step_seconds for run in runs if run.summary["steps"]), default=math.nan)
    theirs = min((run.step_seconds for run in reference if run.summary["steps"]), default=math.nan)
    if math.isnan(own) or math.isnan(theirs):
        return None
    allowed = reference[0].summary["steps"] * theirs
    if abs(runs[0].summary["steps"] * own / allowed - 1) <= within:
        return None
    return max(1, round(allowed / own))
