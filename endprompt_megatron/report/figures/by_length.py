"""Draw the mean score of a suite by prompt length, for one or several models. For RULER, the figure includes the paper's curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from endprompt_megatron.evaluation.tasks import RULER, STAND_IN_HAYSTACK
from endprompt_megatron.report.figures.evaluation import Curve, plot_scores_by_length

# Source: EndPrompt (arXiv 2605.14589), RULER of Llama-3-8B, 8K -> 64K, one run each
PAPER_LENGTHS = {"EndPrompt": {4096: 90.92, 8192: 87.07, 16384: 83.28, 32768: 75.23}}
Scores = Sequence[Mapping[str, Any]]


def length_picture(output_dir: Path, suite: str, panels: Mapping[str, Scores], conditions: Mapping[str, Any]) -> str:
    """Draw the mean over tasks by length. A curve includes only lengths at which all tasks ran. If a system has fewer than two such
    lengths, there is no figure.

    Args:
        output_dir: directory of the figure.
        suite: ruler or ruler_offline.
        panels: {system: its scores}. The mean includes only tasks that all systems have, and excludes tasks with a stand-in haystack.
        conditions: conditions of the evaluation, with native_window and window.
    Returns:
        Markdown of the figure; empty if there is none.
    """
    own = {label: [score for score in scores if score["haystack"] != STAND_IN_HAYSTACK] for label, scores in panels.items()}
    common = set.intersection(*({_task_of(score) for score in scores} for scores in own.values()))
    curves = [_curve(label, [score for score in scores if _task_of(score) in common], len(common)) for label, scores in own.items()]
    if min(len(curve.scores) for curve in curves) < 2:
        return ""
    if suite == RULER:
        curves += [Curve(f"paper, {method}, mean of 13 tasks", values, published=True) for method, values in PAPER_LENGTHS.items()]
    path = plot_scores_by_length(
        output_dir / f"{suite}_by_length.png",
        curves,
        measure="mean score (0 to 100)",
        title="RULER by length" if suite == RULER else "Tasks in RULER's form by length",
        original_context_length=conditions["native_window"],
        target_context_length=conditions["window"],
    )
    return f"![Mean score by length of the prompt; bars: 95 % intervals over samples.]({path.name})"


def _task_of(score: Mapping[str, Any]) -> tuple[str, str]:
    return score["task_id"], score["haystack"]


def _curve(label: str, scores: Scores, num_tasks: int) -> Curve:
    lengths = sorted({score["length"] for score in scores})
    by_length = {length: [score for score in scores if score["length"] == length] for length in lengths}
    whole = {length: found for length, found in by_length.items() if len(found) == num_tasks}
    means = {length: fmean(score["score"] for score in found) for length, found in whole.items()}
    intervals = {
        length: _interval_of_mean(means[length], found) for length, found in whole.items() if all(score["interval"] for score in found)
    }
    return Curve(f"{label}, mean of {num_tasks} tasks", means, intervals)


def _interval_of_mean(mean: float, scores: Scores) -> tuple[float, float]:
    """Return the 95 % interval of a mean over tasks. The tasks have independent samples, so the squares of the half widths add up."""
    half = sum(((score["interval"][1] - score["interval"][0]) / 2) ** 2 for score in scores) ** 0.5 / len(scores)
    return max(0.0, mean - half), min(100.0, mean + half)
