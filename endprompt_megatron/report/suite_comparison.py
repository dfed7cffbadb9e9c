"""Write the page that compares results of recipes/evaluate.py for several models. The page contains tables of paired differences, maps, and
curves by length. The page of a study contains the same tables if its runs were evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.comparison.paired_evaluations import Evaluation
from endprompt_megatron.comparison.paired_suites import TaskComparison, compare_evaluations
from endprompt_megatron.comparison.statistics import Summary
from endprompt_megatron.evaluation.tasks import LOG_PERPLEXITY, NEEDLE, PERPLEXITY, RULER, RULER_OFFLINE
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.report.figures.by_length import length_picture
from endprompt_megatron.report.figures.run import length_label
from endprompt_megatron.report.probes import (
    NEEDLE_NOTE,
    PERPLEXITY_NOTE,
    needle_maps,
    needle_table,
    perplexity_picture,
    perplexity_table,
    perplexity_windows,
    region_table,
)
from endprompt_megatron.report.tables import MISSING, p_value, signed, spread, table, without_nan

PAGE, NUMBERS = "comparison.md", "comparison.json"
_SHOWN_CONDITIONS = ("harness", "backend", "dtype", "bos", "samples", "seed", "window", "native_window", "hardware", "torch")


def write_suite_comparison(
    output_dir: Path, name: str, models: Mapping[str, Mapping[int, Evaluation]], *, reference: str, commands: Sequence[str]
) -> Path:
    """Write comparison.md, comparison.json and the figures.

    Args:
        output_dir: directory of these files.
        name: name of the comparison.
        models: {label: {training seed: scores}}, each with at least one score.
        reference: label of the model that the others are compared with.
        commands: command lines that reproduce the page.
    Returns:
        Path of the page.
    """
    compared = compare_evaluations(models, reference)
    shown = {label: next(iter(next(iter(seeds.values())).values())).conditions for label, seeds in models.items()}
    windows = {
        "native_window": min(conditions["native_window"] for conditions in shown.values()),
        "window": max(conditions["window"] for conditions in shown.values()),
    }
    counts = {label: len(seeds) for label, seeds in models.items()}
    opening = (
        f"Scores are from recipes/evaluate.py and range from 0 to 100. The reference is `{reference}`. Number of training seeds: "
        + ", ".join(f"{label} {count}" for label, count in counts.items())
        + (". With fewer than three seeds, no number here includes the noise of training." if min(counts.values()) < 3 else ".")
    )
    parts = [f"# {name}: evaluations compared", opening, "\n".join(f"    {command}" for command in commands)]
    for suite in dict.fromkeys(key.suite for seeds in models.values() for found in seeds.values() for key in sorted(found)):
        panels = {label: _merged(seeds, suite) for label, seeds in models.items()}
        panels = {label: scores for label, scores in panels.items() if scores}
        parts += [f"## {suite}", *_section(Path(output_dir), suite, panels, {**_conditions_of(models, suite), **windows})]
        of_suite = {label: [found for found in tasks if found.key.suite == suite] for label, tasks in compared.items()}
        parts += suite_tables(of_suite, reference)
    rows = [[label, *(str(conditions.get(key, MISSING)) for key in _SHOWN_CONDITIONS)] for label, conditions in shown.items()]
    parts += ["## Conditions", table(["", *(key.replace("_", " ") for key in _SHOWN_CONDITIONS)], rows, numbers_from=None)]
    page = Path(output_dir) / PAGE
    replace_text(page, "\n\n".join(part for part in parts if part) + "\n")
    numbers = {"reference": reference, "models": {label: [asdict(found) for found in tasks] for label, tasks in compared.items()}}
    replace_text(Path(output_dir) / NUMBERS, json.dumps(without_nan(numbers), indent=1) + "\n")
    return page


def _section(output_dir: Path, suite: str, panels: Mapping[str, list[dict[str, Any]]], conditions: Mapping[str, Any]) -> list[str]:
    if suite == NEEDLE:
        tables = [part for label, scores in panels.items() for part in (f"**{label}**", needle_table(scores))]
        return [*tables, NEEDLE_NOTE, *needle_maps(output_dir, panels, conditions), region_table(panels)]
    if suite == PERPLEXITY:
        windows = perplexity_windows(conditions)
        return [perplexity_table(panels), f"{windows} {PERPLEXITY_NOTE}", perplexity_picture(output_dir, panels, conditions)]
    return [length_picture(output_dir, suite, panels, conditions)] if suite in (RULER, RULER_OFFLINE) else []


def _conditions_of(models: Mapping[str, Mapping[int, Evaluation]], suite: str) -> dict[str, Any]:
    """Return the conditions of the suite's first score. Other suites of a model may come from separate evaluations."""
    scores = (found for seeds in models.values() for scores in seeds.values() for key, found in scores.items() if key.suite == suite)
    return next(scores).conditions


def _merged(seeds: Mapping[int, Evaluation], suite: str) -> list[dict[str, Any]]:
    """Return the entries of results.json for a suite, averaged over seeds. Entries of several seeds have no interval over samples."""
    found = []
    for key in sorted({key for scores in seeds.values() for key in scores if key.suite == suite}):
        entries = [scores[key].entry for scores in seeds.values() if key in scores]
        merged = {**entries[0], "score": fmean(entry["score"] for entry in entries)}
        if len(entries) > 1:
            merged["interval"] = None
            if "graded" in merged:
                merged["graded"] = _mean_of([entry["graded"] for entry in entries])
        found.append(merged)
    return found


def _mean_of(values: Sequence[Any]) -> Any:
    """Average the floats of nested dicts. Other values are taken from the first dict."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean_of([value[key] for value in values if key in value]) for key in first}
    return fmean(values) if isinstance(first, float) else first


def suite_tables(suites: Mapping[str, Sequence[TaskComparison]], reference: str) -> list[str]:
    """Return the table of tasks by model with differences to the reference, and its note; empty if nothing was evaluated.

    Args:
        suites: {label: comparisons of this model}.
        reference: label of the reference.
    """
    compared = sorted(((label, found) for label, tasks in suites.items() for found in tasks), key=lambda pair: pair[1].key)
    if not compared:
        return []
    header = ["task", "method", "seeds", "score", "Δ", "95 % interval", "p (sign flips, samples)", "common samples"]
    note = (
        f"Scores are from recipes/evaluate.py. Δ is the difference to `{reference}` on the samples that both have, averaged over their "
        "common seeds. Questions about one text form one sample. The interval (bootstrap) and p have a sample as their unit and do not "
        "include the noise of training."
    )
    differing = dict.fromkeys(f"{label} in {name}" for label, found in compared for name in found.differing)
    if differing:
        note += f" **Evaluated under other conditions than the reference: {', '.join(differing)}.**"
    better = ["higher is better"] if any(found.key.task != LOG_PERPLEXITY for _, found in compared) else []
    if any(found.key.task == LOG_PERPLEXITY for _, found in compared):
        better.append(f"{LOG_PERPLEXITY}: nats per token, lower is better")
    return [f"### Suites ({'; '.join(better)})", table(header, [_suite_row(label, found) for label, found in compared]), note]


def _suite_row(label: str, found: TaskComparison) -> list[str]:
    key, score, difference = found.key, found.score, found.difference
    digits = 3 if key.task == LOG_PERPLEXITY else 1
    task = key.task + (f" at {length_label(key.length)}" if key.length else "")
    cells = [MISSING] * 4
    if difference is not None:
        low, high = difference.interval
        interval = MISSING if math.isnan(low) else f"{signed(low, digits)} to {signed(high, digits)}"
        cells = [signed(difference.difference, digits), interval, p_value(difference.p), str(difference.samples)]
    return [task, label, str(score.seeds), spread(Summary(score.mean, score.deviation, score.seeds), f".{digits}f"), *cells]
