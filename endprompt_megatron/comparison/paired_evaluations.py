"""Scores of recipes/evaluate.py by task, length and sample: what recipes/compare.py reads of runs whose models were also put to RULER,
LongBench or short tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.errors import DataError

FOLDER = "evaluation_suites"  # in a run's directory: an output_dir of recipes/evaluate.py, or one for each suite
_RESULTS = "results.json"
SampleId = tuple[int, str]


@dataclass(frozen=True, order=True)
class Key:
    """What was asked.

    Attributes:
        suite, task: e.g. ruler, niah_single_1.
        length: of prompts in tokens; 0 where the task has no lengths.
    """

    suite: str
    task: str
    length: int = 0


@dataclass(frozen=True)
class TaskScore:
    """How one model did in one task at one length.

    Attributes:
        score: mean over samples, 0 to 100.
        samples: {(index, what would have been right): score}; the same question to two models has the same key. Questions about one
            haystack are one sample, whose score is their mean: they are not independent of each other.
        conditions: of the evaluation.
        entry: its row of results.json.
    """

    score: float
    samples: dict[SampleId, float]
    conditions: dict[str, Any]
    entry: dict[str, Any] = field(default_factory=dict)


Evaluation = Mapping[Key, TaskScore]


def read_evaluation(directory: Path) -> dict[Key, TaskScore]:
    """The scores of one model; empty where there are none.

    Args:
        directory: that holds results.json of recipes/evaluate.py, or folders that do.
    Raises:
        DataError: a file is damaged or missing, or one task and length was scored twice.
    """
    found: dict[Key, TaskScore] = {}
    for path in sorted(Path(directory).rglob(_RESULTS)):
        try:
            results = json.loads(path.read_text())
            scores = {
                Key(entry["suite"], entry["task"], entry["length"] or 0): TaskScore(
                    float(entry["score"]), _samples(path.parent / entry["records"]), results["conditions"], entry
                )
                for entry in results["scores"]
            }
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} or the records it names cannot be read ({error!r}). Run recipes/evaluate.py on it again.") from error
        twice = found.keys() & scores.keys()
        if twice:
            raise DataError(f"{path}: {min(twice)} is scored elsewhere in {directory} as well. Keep one of them.")
        found |= scores
    return found


def _samples(path: Path) -> dict[SampleId, float]:
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    together: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        together.setdefault(record.get("haystack", record["index"]), []).append(record)
    return {
        (number, json.dumps([record.get("references") for record in group])): fmean(float(record["score"]) for record in group)
        for number, group in together.items()
    }
