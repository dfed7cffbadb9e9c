"""The page of an evaluation: RULER by task and length, LongBench by group, short tasks, each beside the paper's numbers; planted facts and
perplexity; what did not run and why; the conditions. It is made from results.json alone."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.evaluation.tasks import BUILT_IN, LONGBENCH, NEEDLE, PERPLEXITY, PROBES, RULER, SHORT, SUITES, TASKS
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.report.figures.by_length import ESSAYS_MARK, PAPER_LENGTHS, STAND_IN_MARK, length_picture
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
from endprompt_megatron.report.tables import MISSING, table

PAGE = "evaluation.md"
_SOURCE = "EndPrompt, arXiv 2605.14589: Llama-3-8B, 8K → 64K, one run each"
# RULER: mean of 13 tasks over 4K to 64K; LongBench: mean; short: mean of MMLU, GSM8K, HellaSwag and HumanEval after supervised fine-tuning
_PAPER: dict[str, dict[str, float]] = {
    "EndPrompt": {RULER: 76.03, LONGBENCH: 38.30, SHORT: 52.41},
    "EndPrompt (PoSE)": {RULER: 79.44, LONGBENCH: 39.65, SHORT: 53.56},
    "PoSE": {RULER: 78.91, LONGBENCH: 38.51, SHORT: 52.32},
    "LongLoRA": {RULER: 72.95, LONGBENCH: 36.84, SHORT: 48.64},
    "LCEG": {RULER: 72.24, LONGBENCH: 36.61, SHORT: 49.74},
    "full fine-tuning": {RULER: 69.23, LONGBENCH: 35.63, SHORT: 50.98},
}
_RULER_NOTE = (
    "Made by lm-eval, whose tasks are not NVIDIA's in every point: question answering counts the share of the accepted answers found where "
    "NVIDIA counts any, common words lacks its worked example, and the answer prefix comes on top of the length. The means are ours: over "
    "tasks, then over lengths. A mean of fewer than 13 tasks is no RULER score."
)
_PROBES_NOTE = (
    "Synthetic tasks in RULER's form (arXiv 2404.06654) with names and sentences of our own, on Megatron-Core: no RULER scores. Needles "
    "hide in repeated sentences where a row does not say otherwise; prompt and answer fit the length together; an answer counts when it "
    "occurs in the output, and of a question's accepted answers any one is enough, as NVIDIA's program has it."
)
_LONGBENCH_NOTE = (
    "Made by lm-eval, which cuts prompts longer than the window at their start, where LongBench's own program cuts the middle out. "
    "The mean is that of the groups."
)
_SHORT_NOTE = "The paper's values are after supervised fine-tuning, with a number of worked examples that it does not tell."


def write_evaluation(output_dir: Path, results: dict[str, Any], *, pending: int = 0) -> Path:
    """Write evaluation.md.

    Args:
        output_dir: where it goes.
        results: as in results.json.
        pending: tasks and lengths that are still to be asked.
    Returns:
        Path of the page.
    """
    scores = results["scores"]
    of_suite = {suite: [score for score in scores if score["suite"] == suite] for suite in SUITES}
    parts = [f"# Evaluation of {results['model']}", _opening(results, pending)]
    if of_suite[RULER]:
        picture = length_picture(Path(output_dir), RULER, {"this model": of_suite[RULER]}, results["conditions"])
        parts += ["## RULER", _ruler(of_suite[RULER]), picture, _intervals(of_suite[RULER]), _RULER_NOTE]
        if any(STAND_IN_MARK in score["task"] for score in of_suite[RULER]):
            parts.append(
                "**Stand-in haystack**: these rows hide their needles in other prose than the benchmark's essays (conditions, local "
                "sources). They are no RULER scores and no part of the means."
            )
    if of_suite[PROBES]:
        picture = length_picture(Path(output_dir), PROBES, {"this model": of_suite[PROBES]}, results["conditions"])
        parts += ["## In RULER's form", _probes(of_suite[PROBES]), picture, _intervals(of_suite[PROBES]), _PROBES_NOTE]
    if of_suite[LONGBENCH]:
        parts += ["## LongBench", _longbench(of_suite[LONGBENCH]), _intervals(of_suite[LONGBENCH]), _LONGBENCH_NOTE]
    if of_suite[SHORT]:
        parts += ["## Short tasks", _short(of_suite[SHORT]), _intervals(of_suite[SHORT]), _SHORT_NOTE]
    mine = {"this model": of_suite[NEEDLE]}
    if of_suite[NEEDLE]:
        maps, regions = needle_maps(Path(output_dir), mine, results["conditions"]), region_table(mine)
        parts += ["## Planted facts", needle_table(of_suite[NEEDLE]), *maps, _intervals(of_suite[NEEDLE]), NEEDLE_NOTE]
        parts += ["### What distance does", regions] if regions else []
    if of_suite[PERPLEXITY]:
        mine = {"this model": of_suite[PERPLEXITY]}
        picture = perplexity_picture(Path(output_dir), mine, results["conditions"])
        windows = perplexity_windows(results["conditions"])
        parts += ["## Perplexity of held-out text", perplexity_table(mine), picture, f"{windows} {PERPLEXITY_NOTE}"]
    if results["not_run"]:
        rows = [[entry["task"], _length(entry["length"]), entry["reason"]] for entry in results["not_run"]]
        parts += ["## What did not run", table(["task", "length", "reason"], rows, numbers_from=None)]
    parts += ["## Conditions", _conditions(results["conditions"])]
    page = Path(output_dir) / PAGE
    replace_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _opening(results: dict[str, Any], pending: int) -> str:
    conditions = results["conditions"]
    prompts = "the model's chat template" if conditions["chat_template"] else "raw prompts, no chat template"
    ran, missing = len(results["scores"]), len(results["not_run"])
    in_nats = any(score["suite"] == PERPLEXITY for score in results["scores"])
    scale = "Scores from 0 to 100" + (" (log_perplexity: nats a token, lower is better)" if in_nats else "")
    beside_paper = any(score["suite"] not in BUILT_IN for score in results["scores"])
    return (
        f"{scale}, by {conditions['harness']} ({conditions['backend']}, {conditions['dtype']}, {prompts}, BOS: "
        f"{conditions['bos']}). {ran} tasks and lengths ran"
        + (f", {missing} did not (reasons below)." if missing else ".")
        + (f" **{pending} are still to be asked; the same command goes on with them.**" if pending else "")
        + (f" Rows marked *paper*: {_SOURCE}; another model, and the authors' own runs." if beside_paper else "")
        + f"\n\n    {conditions['command']}"
    )


def _ruler(scores: list[dict[str, Any]]) -> str:
    lengths = sorted({score["length"] for score in scores})
    found = {(score["task"], score["length"]): score["score"] for score in scores}
    names = [task for task in TASKS if TASKS[task].suite == RULER]
    rows, ours = [], {length: [found[name, length] for name in names if (name, length) in found] for length in lengths}
    for name in [*names, *(name + STAND_IN_MARK for name in names)]:
        values = [found.get((name, length)) for length in lengths]
        if any(value is not None for value in values):
            rows.append([name, *map(_score, values), _score(_mean(values))])
    if any(ours.values()):
        means = {length: _mean(values) for length, values in ours.items()}
        total = "all" if all(len(values) == len(names) for values in ours.values()) else "of those that ran"
        cells = [_score(means[length]) + _of(len(ours[length]), len(names)) for length in lengths]
        place = next((index for index, row in enumerate(rows) if STAND_IN_MARK in row[0]), len(rows))
        rows.insert(place, [f"**mean over tasks, {total}**", *cells, _score(_mean(list(means.values())))])
    for method, values in _PAPER.items():
        by_length = PAPER_LENGTHS.get(method, {})
        cells = [_paper(by_length.get(length)) for length in lengths]
        rows.append([f"*paper*, {method}, 13 tasks", *cells, f"{values[RULER]:.2f} (4K to 64K)"])
    return table(["task", *map(length_label, lengths), "mean over lengths"], rows)


def _probes(scores: list[dict[str, Any]]) -> str:
    lengths = sorted({score["length"] for score in scores})
    found = {(score["task"], score["length"]): score["score"] for score in scores}
    names = [name + mark for name in TASKS for mark in ("", ESSAYS_MARK, STAND_IN_MARK)]
    names = [name for name in names if any((name, length) in found for length in lengths)]
    values = [[found.get((name, length)) for length in lengths] for name in names]
    rows = [[name, *map(_score, row), _score(_mean(row))] for name, row in zip(names, values, strict=True)]
    means = [_mean(list(column)) for column in zip(*values, strict=True)]
    asked = [_of(sum(value is not None for value in column), len(names)) for column in zip(*values, strict=True)]
    cells = [_score(mean) + lacking for mean, lacking in zip(means, asked, strict=True)]
    rows.append(["**mean over tasks**", *cells, _score(_mean(means))])
    return table(["task", *map(length_label, lengths), "mean over lengths"], rows)


def _longbench(scores: list[dict[str, Any]]) -> str:
    groups = list(dict.fromkeys(task.group for task in TASKS.values() if task.suite == LONGBENCH))
    wanted = {group: [task.name for task in TASKS.values() if task.suite == LONGBENCH and task.group == group] for group in groups}
    found = {score["task"]: score["score"] for score in scores}
    cells, means = [], []
    for group in groups:
        values = [found[name] for name in wanted[group] if name in found]
        means.append(_mean(values))
        cells.append(_score(means[-1]) + _of(len(values), len(wanted[group])))
    rows = [["this model", *cells, _score(_mean(means)) + _of(sum(mean is not None for mean in means), len(groups))]]
    rows += [[f"*paper*, {method}", *[MISSING] * len(groups), f"{values[LONGBENCH]:.2f}"] for method, values in _PAPER.items()]
    return table(["", *groups, "mean"], rows)


def _short(scores: list[dict[str, Any]]) -> str:
    names = [task for task in TASKS if TASKS[task].suite == SHORT]
    found = {score["task"]: score["score"] for score in scores}
    ran = [found.get(name) for name in names]
    total = _score(_mean(ran)) + _of(sum(value is not None for value in ran), len(names))
    rows = [["this model", *map(_score, ran), total]]
    rows += [[f"*paper*, {method}", *[MISSING] * len(names), f"{values[SHORT]:.2f}"] for method, values in _PAPER.items()]
    return table(["", *names, "mean"], rows)


def _intervals(scores: list[dict[str, Any]]) -> str:
    """Every score with its interval, folded away: it is what a comparison needs and a reader seldom does."""
    order = list(TASKS)
    rows = []
    for score in sorted(scores, key=lambda score: (order.index(score["task"].partition(" (")[0]), score["length"] or 0)):
        interval = MISSING if score["interval"] is None else f"{score['interval'][0]:.1f} to {score['interval'][1]:.1f}"
        cells = [score["task"], _length(score["length"]), score["metric"], _score(score["score"]), interval]
        rows.append([*cells, str(score["samples"]), f"{score['seconds']:,.0f}", f"[samples]({score['records']})"])
    header = ["task", "length", "metric", "score", "95 % interval (bootstrap)", "samples", "seconds", "records"]
    return f"<details><summary>Every score with its interval</summary>\n\n{table(header, rows)}\n\n</details>"


def _conditions(conditions: dict[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_words(value)}" for name, value in conditions.items() if name != "command")


def _words(value: Any) -> str:
    if value is None:
        return "all, or not used"
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items()) or "none"
    return str(value)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _of(count: int, wanted: int) -> str:
    """What a mean lacks."""
    return f" ({count} of {wanted})" if 0 < count < wanted else ""


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _paper(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _length(length: int | None) -> str:
    return MISSING if length is None else length_label(length)
