"""Write the page of an evaluation from results.json, without other input. The page shows RULER by task and length, the tasks in RULER's
form, LongBench by group, the short tasks, planted facts, and perplexity. RULER, LongBench and the short tasks are shown beside the paper's
numbers. The page ends with the tasks that did not run, with reasons, and the conditions."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.evaluation.tasks import (
    BENCHMARK_HAYSTACK,
    HAYSTACK_MARKS,
    LONGBENCH,
    MEGATRON_SUITES,
    NEEDLE,
    PERPLEXITY,
    RULER,
    RULER_OFFLINE,
    SHORT,
    STAND_IN_HAYSTACK,
    SUITES,
    TASKS,
    Task,
    name_in_results,
    tasks_of,
)
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.report.figures.by_length import PAPER_LENGTHS, length_picture
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
    "Samples and scores are from lm-eval, whose tasks differ from NVIDIA's in some points. Question answering scores the share of the "
    "accepted answers that occur in the output, while NVIDIA accepts any one of them. The common words task has no worked example. The "
    "length does not include the answer prefix. This project computes the means, first over tasks and then over lengths. A mean of fewer "
    "than 13 tasks is not a RULER score."
)
_RULER_OFFLINE_NOTE = (
    "These synthetic tasks have RULER's form (arXiv 2404.06654) with names and sentences of our own, and run on Megatron-Core. Their "
    "scores are not RULER scores. Needles are hidden in repeated sentences unless a row names another haystack. Prompt and answer together "
    "fit into the length. An answer is right if it occurs in the output. If a question has several accepted answers, one of them is "
    "enough, as in NVIDIA's program."
)
_LONGBENCH_NOTE = (
    "Samples and scores are from lm-eval. If a prompt is longer than the window, lm-eval removes its start, while LongBench's own program "
    "removes its middle. The mean is over the groups."
)
_SHORT_NOTE = "The paper's values were measured after supervised fine-tuning. The paper does not state the number of worked examples."


def write_evaluation(output_dir: Path, results: dict[str, Any], *, pending: int = 0) -> Path:
    """Write evaluation.md.

    Args:
        output_dir: directory in which to write the page and its figures.
        results: content of results.json.
        pending: number of unfinished pairs of task and length.
    Returns:
        Path of the page.
    """
    scores = results["scores"]
    of_suite = {suite: [score for score in scores if score["suite"] == suite] for suite in SUITES}
    parts = [f"# Evaluation of {results['model']}", _opening(results, pending)]
    if of_suite[RULER]:
        picture = length_picture(Path(output_dir), RULER, {"this model": of_suite[RULER]}, results["conditions"])
        parts += ["## RULER", _ruler(of_suite[RULER]), picture, _intervals(of_suite[RULER]), _RULER_NOTE]
        if any(score["haystack"] == STAND_IN_HAYSTACK for score in of_suite[RULER]):
            parts.append(
                "**Stand-in haystack**: these rows hide their needles in other prose than the benchmark's essays (see local sources in "
                "the conditions). They are no RULER scores, and the means do not include them."
            )
    if of_suite[RULER_OFFLINE]:
        picture = length_picture(Path(output_dir), RULER_OFFLINE, {"this model": of_suite[RULER_OFFLINE]}, results["conditions"])
        parts += ["## In RULER's form", _ruler_offline(of_suite[RULER_OFFLINE]), picture]
        parts += [_intervals(of_suite[RULER_OFFLINE]), _RULER_OFFLINE_NOTE]
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
        parts += ["## Tasks that did not run", table(["task", "length", "reason"], rows, numbers_from=None)]
    parts += ["## Conditions", _conditions(results["conditions"])]
    page = Path(output_dir) / PAGE
    replace_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _opening(results: dict[str, Any], pending: int) -> str:
    conditions = results["conditions"]
    prompts = "the model's chat template" if conditions["chat_template"] else "raw prompts, no chat template"
    ran, missing = len(results["scores"]), len(results["not_run"])
    in_nats = any(score["suite"] == PERPLEXITY for score in results["scores"])
    scale = "Scores from 0 to 100" + (" (log_perplexity: nats per token, lower is better)" if in_nats else "")
    beside_paper = any(score["suite"] not in MEGATRON_SUITES for score in results["scores"])
    return (
        f"{scale}, by {conditions['harness']} ({conditions['backend']}, {conditions['dtype']}, {prompts}, BOS: "
        f"{conditions['bos']}). {ran} tasks and lengths ran"
        + (f", {missing} did not (reasons below)." if missing else ".")
        + (f" **{pending} are not finished; the same command resumes them.**" if pending else "")
        + (f" Rows marked *paper* are from {_SOURCE}. They are the authors' own runs of another model." if beside_paper else "")
        + f"\n\n    {conditions['command']}"
    )


def _ruler(scores: list[dict[str, Any]]) -> str:
    lengths = sorted({score["length"] for score in scores})
    tasks = tasks_of([RULER])
    measured = _scores_by_length(scores, [(task, BENCHMARK_HAYSTACK) for task in tasks], lengths)
    stand_in = _scores_by_length(scores, [(task, STAND_IN_HAYSTACK) for task in tasks], lengths)
    rows = [_task_row(name, values) for name, values in measured.items()]
    if rows:
        columns = [list(column) for column in zip(*measured.values(), strict=True)]
        means = [_mean(column) for column in columns]
        counts = [sum(value is not None for value in column) for column in columns]
        total = "all" if all(count == len(tasks) for count in counts) else "of those that ran"
        cells = [_score(mean) + _of(count, len(tasks)) for mean, count in zip(means, counts, strict=True)]
        rows.append([f"**mean over tasks, {total}**", *cells, _score(_mean(means))])
    rows += [_task_row(name, values) for name, values in stand_in.items()]
    for method, published in _PAPER.items():
        by_length = PAPER_LENGTHS.get(method, {})
        cells = [_paper(by_length.get(length)) for length in lengths]
        rows.append([f"*paper*, {method}, 13 tasks", *cells, f"{published[RULER]:.2f} (4K to 64K)"])
    return table(["task", *map(length_label, lengths), "mean over lengths"], rows)


def _ruler_offline(scores: list[dict[str, Any]]) -> str:
    lengths = sorted({score["length"] for score in scores})
    measured = _scores_by_length(scores, [(task, haystack) for task in tasks_of([RULER_OFFLINE]) for haystack in HAYSTACK_MARKS], lengths)
    rows = [_task_row(name, values) for name, values in measured.items()]
    columns = list(zip(*measured.values(), strict=True))
    means = [_mean(list(column)) for column in columns]
    counts = [_of(sum(value is not None for value in column), len(measured)) for column in columns]
    cells = [_score(mean) + count for mean, count in zip(means, counts, strict=True)]
    rows.append(["**mean over tasks**", *cells, _score(_mean(means))])
    return table(["task", *map(length_label, lengths), "mean over lengths"], rows)


def _scores_by_length(scores: list[dict[str, Any]], rows: list[tuple[Task, str]], lengths: list[int]) -> dict[str, list[float | None]]:
    """Return {display name: score at each length} for every (task, haystack) in `rows` that has at least one score."""
    found = {(score["task_id"], score["haystack"], score["length"]): score["score"] for score in scores}
    values = {name_in_results(task, haystack): [found.get((task.id, haystack, length)) for length in lengths] for task, haystack in rows}
    return {name: row for name, row in values.items() if any(value is not None for value in row)}


def _task_row(name: str, values: list[float | None]) -> list[str]:
    return [name, *map(_score, values), _score(_mean(values))]


def _longbench(scores: list[dict[str, Any]]) -> str:
    tasks = tasks_of([LONGBENCH])
    groups = list(dict.fromkeys(task.group for task in tasks))
    found = {score["task_id"]: score["score"] for score in scores}
    cells, means = [], []
    for group in groups:
        ids = [task.id for task in tasks if task.group == group]
        values = [found[name] for name in ids if name in found]
        means.append(_mean(values))
        cells.append(_score(means[-1]) + _of(len(values), len(ids)))
    rows = [["this model", *cells, _score(_mean(means)) + _of(sum(mean is not None for mean in means), len(groups))]]
    rows += [[f"*paper*, {method}", *[MISSING] * len(groups), f"{values[LONGBENCH]:.2f}"] for method, values in _PAPER.items()]
    return table(["", *groups, "mean"], rows)


def _short(scores: list[dict[str, Any]]) -> str:
    tasks = tasks_of([SHORT])
    found = {score["task_id"]: score["score"] for score in scores}
    ran = [found.get(task.id) for task in tasks]
    total = _score(_mean(ran)) + _of(sum(value is not None for value in ran), len(tasks))
    rows = [["this model", *map(_score, ran), total]]
    rows += [[f"*paper*, {method}", *[MISSING] * len(tasks), f"{values[SHORT]:.2f}"] for method, values in _PAPER.items()]
    return table(["", *(task.title for task in tasks), "mean"], rows)


def _intervals(scores: list[dict[str, Any]]) -> str:
    """Return a table of all scores with their intervals. The table is collapsed by default."""
    order = list(TASKS)
    rows = []
    for score in sorted(scores, key=lambda score: (order.index(score["task_id"]), score["length"] or 0)):
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


def _of(count: int, total: int) -> str:
    """Return how many of the `total` values a mean covers, as text; an empty string if it covers all or none."""
    return f" ({count} of {total})" if 0 < count < total else ""


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _paper(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _length(length: int | None) -> str:
    return MISSING if length is None else length_label(length)
