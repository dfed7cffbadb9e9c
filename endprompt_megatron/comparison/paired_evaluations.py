"""Read the scores of recipes/evaluate.py by task, length and sample. recipes/compare.py uses them for runs whose models were also evaluated
on RULER, LongBench or other suites, and for evaluations that are compared without runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.earlier_results import with_identity
from endprompt_megatron.output_files import path_inside

FOLDER = "evaluation_suites"  # folder in the directory of a run; contains one output_dir of recipes/evaluate.py, or one per suite
_RESULTS = "results.json"
SampleId = tuple[int, str]


@dataclass(frozen=True, order=True)
class Key:
    """Identifies a score by suite, task and length.

    Attributes:
        suite: e.g. ruler.
        task: name of the task in results.json, e.g. niah_single_2, or niah_single_2 (stand-in haystack) if the haystack is not the
            benchmark's. This package never parses the name.
        length: length of prompts in tokens; 0 for tasks without lengths.
    """

    suite: str
    task: str
    length: int = 0


@dataclass(frozen=True)
class TaskScore:
    """The score of one model in one task at one length.

    Attributes:
        score: mean over samples, in the task's unit.
        samples: {(number, references): score}. Questions about one text are not independent of each other, so they form one sample, whose
            score is their mean. The number is that of the text, or of the question if every question has its own text. The same questions
            have the same (number, references) for every model.
        conditions: conditions of the evaluation.
        entry: the score's entry in results.json, with `task_id` and `haystack`.
    """

    score: float
    samples: dict[SampleId, float]
    conditions: dict[str, Any]
    entry: dict[str, Any] = field(default_factory=dict)


Evaluation = Mapping[Key, TaskScore]


def read_evaluation(directory: Path) -> dict[Key, TaskScore]:
    """Read the scores of one model. The result is empty if there are none.

    Args:
        directory: directory that is searched recursively for results.json of recipes/evaluate.py.
    Raises:
        DataError: a file is damaged or missing, or a task and length has two scores.
    """
    found: dict[Key, TaskScore] = {}
    for path in sorted(Path(directory).rglob(_RESULTS)):
        try:
            results = json.loads(path.read_text())
            scores = {
                Key(entry["suite"], entry["task"], entry["length"] or 0): TaskScore(
                    float(entry["score"]), _samples(_records(path, entry["records"])), results["conditions"], with_identity(entry)
                )
                for entry in results["scores"]
            }
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path} or the records it names cannot be read ({error!r}). Run recipes/evaluate.py on it again.") from error
        twice = found.keys() & scores.keys()
        if twice:
            raise DataError(f"{path}: {min(twice)} is scored elsewhere in {directory} as well. Keep one of them.")
        found |= scores
    return found


def _records(results: Path, name: object) -> Path:
    path = path_inside(results.parent, name)
    if path is None:
        raise DataError(f"{results} names the records {name!r}, which are not in its directory. Run recipes/evaluate.py on it again.")
    return path


def _samples(path: Path) -> dict[SampleId, float]:
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    by_text: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_text.setdefault(record.get("haystack", record["index"]), []).append(record)
    return {
        (number, json.dumps([record.get("references") for record in group])): fmean(float(record["score"]) for record in group)
        for number, group in by_text.items()
    }
