"""Format the sections of an evaluation's page on planted facts and perplexity: tables, maps by depth and length, and retrieval by
distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from endprompt_megatron.evaluation.probes.gap import ANCHOR, GAP, NEAR
from endprompt_megatron.evaluation.tasks import GAP_TASK, TASKS
from endprompt_megatron.report.figures.evaluation import Cells, plot_depth_by_length
from endprompt_megatron.report.figures.run import length_label, plot_perplexity
from endprompt_megatron.report.tables import MISSING, table

Scores = Sequence[Mapping[str, Any]]
_REGIONS = {NEAR: "near: seen within a segment", GAP: "gap: never seen", ANCHOR: "anchor: seen between prompt and text"}
NEEDLE_NOTE = (
    "Keys of digits are hidden in repeated sentences (pass-key test). Answers are scored under teacher forcing: an answer is right if "
    "greedy decoding would produce all of it. The brackets contain the share of its parts (digits, keys, names) that the model ranks "
    "first, and its log-probability in nats. Questions about one text are not independent, so intervals have a text as their unit."
)
PERPLEXITY_NOTE = (
    "Every length scores the same tokens of the same documents, without a BOS, so a longer window can only help through its additional "
    "context. Intervals are bootstrap intervals over documents, which differ far more from each other than windows do. Compare models only "
    "on the same documents."
)


def needle_table(scores: Scores) -> str:
    """Return the table of retrieval by task and length, without the gap task."""
    found = {(score["task_id"], score["length"]): score for score in scores if score["task_id"] != GAP_TASK}
    lengths = sorted({length for _, length in found})
    tasks = [task for task in TASKS.values() if any((task.id, length) in found for length in lengths)]
    rows = [[task.title, *(_retrieval(found.get((task.id, length))) for length in lengths)] for task in tasks]
    return table(["task", *map(length_label, lengths)], rows) if rows else ""


def _retrieval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    details = score["graded"]
    return f"{score['score']:.0f} ({100 * details['parts_right']:.0f}%, {_signed(details['log_probability'])})"


def needle_maps(output_dir: Path, panels: Mapping[str, Scores], conditions: Mapping[str, Any]) -> list[str]:
    """Draw one map for each task whose questions have depths, with one panel per system. Tasks with fewer than two lengths or depths are
    skipped.

    Args:
        output_dir: directory of the figures.
        panels: {system: its scores}.
        conditions: conditions of the evaluation, with native_window and window.
    Returns:
        Markdown of the figures, one text per figure.
    """
    pictures = []
    tasks = dict.fromkeys(score["task_id"] for scores in panels.values() for score in scores if score["length"] and score.get("graded"))
    for task in tasks:
        cells = {label: _cells([score for score in scores if score["task_id"] == task]) for label, scores in panels.items()}
        cells = {label: found for label, found in cells.items() if found}
        places = [set(axis) for axis in zip(*(cell for found in cells.values() for cell in found), strict=True)]
        if len(places) < 2 or min(map(len, places)) < 2:
            continue
        name = TASKS[task].title.replace("_", " ")
        path = plot_depth_by_length(
            output_dir / f"{task}_depth_by_length.png",
            cells,
            measure="digits right (%)",
            value_range=(0, 100),
            original_context_length=conditions["native_window"],
            target_context_length=conditions["window"],
            title=f"Planted facts ({name}) by depth and length",
        )
        pictures.append(f"![{name}: digits right by the depth of the fact and the length of the text.]({path.name})")
    return pictures


def _cells(scores: Scores) -> Cells:
    """Return {(length, depth): share of right digits in percent}. A cell that several scores have is averaged."""
    found: dict[tuple[int, float], list[float]] = {}
    for score in scores:
        for depth, figures in (score["graded"].get("by_depth") or {}).items():
            found.setdefault((score["length"], float(depth)), []).append(100 * figures["digit_accuracy"])
    return {place: sum(values) / len(values) for place, values in found.items()}


def region_table(panels: Mapping[str, Scores]) -> str:
    """Return the table of retrieval by region. The region states whether EndPrompt's training covers the distances of the questions."""
    rows = []
    for label, scores in panels.items():
        for score in scores:
            regions = (score.get("graded") or {}).get("by_region") or {}
            for region in [name for name in _REGIONS if name in regions] if len(regions) > 1 else []:
                figures = regions[region]
                first, last = figures["distances"]
                task = TASKS[score["task_id"]].title + (f" at {length_label(score['length'])}" if score["length"] else "")
                rows.append([
                    task, label, _REGIONS[region], f"{first:,} to {last:,}", f"{100 * figures['exact_match']:.0f}",
                    f"{100 * figures['digit_accuracy']:.0f}", _signed(figures["key_log_probability"]), str(figures["trials"]),
                ])  # fmt: skip
    header = ["task", "system", "distances", "measured, in tokens", "exact (%)", "digits (%)", "log-probability (nats)", "questions"]
    return table(header, rows, numbers_from=3) if rows else ""


def perplexity_table(panels: Mapping[str, Scores]) -> str:
    """Return the table of perplexity by window."""
    lengths = sorted({score["length"] for scores in panels.values() for score in scores})
    rows = []
    for label, scores in panels.items():
        found = {score["length"]: score for score in scores}
        rows.append([label, *(_perplexity(found.get(length)) for length in lengths)])
    return table(["", *map(length_label, lengths)], rows)


def _perplexity(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    low, high = score["interval"] or (math.nan, math.nan)
    interval = "" if math.isnan(low) else f" ({math.exp(low):.1f} to {math.exp(high):.1f})"
    return f"{math.exp(score['score']):.2f}{interval}"


def perplexity_windows(conditions: Mapping[str, Any]) -> str:
    """Return text about the placement of the windows."""
    stride = conditions["perplexity"]["stride"]
    if not stride:
        return "Windows do not overlap."
    return (
        f"Windows slide by {stride} tokens. A token is scored with at least window − {stride} tokens of context, or with all tokens "
        "before it if there are fewer."
    )


def perplexity_picture(output_dir: Path, panels: Mapping[str, Scores], conditions: Mapping[str, Any]) -> str:
    """Draw perplexity by window and return the Markdown of the figure; empty if there are fewer than two lengths."""
    systems = {
        label: {"label": label, "perplexity": {str(score["length"]): math.exp(score["score"]) for score in scores}}
        for label, scores in panels.items()
    }
    if len({score["length"] for scores in panels.values() for score in scores}) < 2:
        return ""
    path = plot_perplexity(output_dir / "perplexity_by_length.png", systems, original_context_length=conditions["native_window"])
    return f"![Perplexity by window.]({path.name})"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
