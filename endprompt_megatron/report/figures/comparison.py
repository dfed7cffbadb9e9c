"""The figures of a study: retrieval by context length, retrieval by the distance from the question to the fact, and results against
training time. A method has the same colour, marker and line in all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from endprompt_megatron.comparison.results import BASE, TASKS, RunResult, log_perplexity, native_window, task_mean
from endprompt_megatron.comparison.statistics import Summary, summarize
from endprompt_megatron.report.figures.run import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    STYLE,
    VERMILLION,
    WIDTH_INCHES,
    SystemStyle,
    length_axis,
    length_label,
    plt,
    write_figure,
)

_Question = tuple[float, int, int]  # depth, length, number
_PURPLE = "#CC79A7"
_SMALL_DIFFERENCE = 0.5  # in nats; a symlog axis of differences is linear up to this value
TASK_NAMES = {
    "needle": "One key",
    "number": "Planted numbers",
    "word": "Planted words",
    "multi_key": "One of several keys",
    "multi_value": "Several keys of one name",
    "variable_tracking": "Variable tracking",
}
_STYLES = {
    BASE: SystemStyle("#000000", "o", "-"),
    "untrained_pi": SystemStyle(GREY, "x", ":"),
    "control_short_pi": SystemStyle(GREEN, "^", "-."),
    "endprompt": SystemStyle(BLUE, "D", "-"),
    "endprompt_random": SystemStyle(SKY, "s", "--"),
    "endprompt_pose": SystemStyle(_PURPLE, "P", "--"),
    "pose": SystemStyle(VERMILLION, "v", "-"),
    "longlora": SystemStyle(ORANGE, "<", "-."),
    "full": SystemStyle("#8c6d31", "h", "-"),
}
_MORE_STYLES = [SystemStyle(color, marker, ":") for marker in "*>p8Xd" for color in ("#8c6d31", ORANGE, GREEN, _PURPLE)]


def styles_of(labels: Sequence[str]) -> dict[str, SystemStyle]:
    """Return the style of each label. Labels without an entry in _STYLES get the styles of _MORE_STYLES in order, so equal lists of labels
    give equal styles in all figures."""
    more = iter(_MORE_STYLES * (1 + len(labels) // len(_MORE_STYLES)))
    return {label: _STYLES.get(label) or next(more) for label in labels}


def plot_scores_by_length(path: Path, groups: dict[str, list[RunResult]]) -> Path | None:
    """Draw the accuracy and the log-probability of the answer by context length for each task. Accuracy is the share of correct digits, and
    for variable tracking the share of chains that are entirely correct.

    Args:
        path: path of the PNG.
        groups: {label: runs}.
    Returns:
        path, or None if there are no results.
    """
    runs = [run for group in groups.values() for run in group]
    tasks = [task for task in TASKS if any(run.scores(task) for run in runs)]
    if not tasks:
        return None
    styles = styles_of(list(groups))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, len(tasks), figsize=(WIDTH_INCHES, 7.4), sharex=True, squeeze=False, layout="constrained")
        for column, task in enumerate(tasks):
            lengths = sorted({length for run in runs for length in run.scores(task)})
            share = "exact_match" if task == "variable_tracking" else "digit_accuracy"
            for row, figure_name in enumerate((share, "key_log_probability")):
                axes = panels[row][column]
                for label, group in groups.items():
                    by_length: dict[int, list[float]] = {}
                    for run in group:
                        for length, found in run.scores(task).items():
                            by_length.setdefault(length, []).append(found[figure_name])
                    _draw(axes, sorted(by_length.items()), styles[label], label)
                length_axis(axes, lengths, native_window(runs[0]), "context length (tokens)" if row else "")
            panels[0][column].set_title(TASK_NAMES[task], loc="left")
            panels[0][column].set_ylim(-0.04, 1.04)
            panels[0][column].set_ylabel("chains exact (share)" if task == "variable_tracking" else "digits right (share)")
        panels[1][0].set_ylabel("log-probability of the answer (nats)")
        _legend(figure, panels[0][0])
        return write_figure(figure, path)


def plot_scores_by_distance(path: Path, groups: dict[str, list[RunResult]], *, reference: str) -> Path | None:
    """Draw the log-probability of the answer by the distance from the question to the fact, and the difference from the reference on the
    same questions. The gap of eq. 9 is shaded.

    Args:
        path: path of the PNG.
        groups: {label: runs}.
        reference: a key of groups.
    Returns:
        path, or None if no task records the depth of its facts.
    Source: eq. 9 of EndPrompt (arXiv 2605.14589): distances in [max(a, b), L - a - b] never occur in its samples.
    """
    runs = [run for group in groups.values() for run in group]
    tasks = [task for task in TASKS if any(found.get("by_depth") for run in runs for found in run.scores(task).values())]
    if not tasks:
        return None
    styles = styles_of(list(groups))
    gap = next((gap for run in runs if (gap := _gap(run)) is not None), None)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(tasks), 2, figsize=(WIDTH_INCHES, 1.2 + 3.4 * len(tasks)), sharex=True, squeeze=False, layout="constrained"
        )
        for (absolute, relative), task in zip(panels, tasks, strict=True):
            for axes in (absolute, relative):
                if gap:
                    axes.axvspan(*gap, color="#f0e6c8", label=f"never seen by EndPrompt: {gap[0]:,} to {gap[1]:,}")
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: length_label(round(value)))
            distances = _distances(runs, task)
            theirs = {run.seed: _by_question(run, task) for run in groups.get(reference, [])}
            for label, group in groups.items():
                scores: dict[int, list[float]] = {}
                differences: dict[int, list[float]] = {}
                for run in group:
                    for question, score in _by_question(run, task).items():
                        distance = distances[run.seed, question]
                        scores.setdefault(distance, []).append(score)
                        if label != reference and question in theirs.get(run.seed, {}):
                            differences.setdefault(distance, []).append(score - theirs[run.seed][question])
                _draw(absolute, _octave_bins(scores), styles[label], label, bars=False)
                _draw(relative, _octave_bins(differences), styles[label], label, of_mean=True)
            # On a linear axis, large differences would hide small differences.
            if max(abs(limit) for limit in relative.get_ylim()) > 10 * _SMALL_DIFFERENCE:
                relative.set_yscale("symlog", linthresh=_SMALL_DIFFERENCE, linscale=0.8)
                relative.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                relative.minorticks_off()
            relative.axhline(0, color=styles[reference].color if reference in styles else GREY, lw=1.2)
            absolute.set_ylabel("log-probability (nats)")
            absolute.set_title(TASK_NAMES[task], loc="left")
            relative.set_title(f"minus {reference}, same questions", loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("distance from the question back to the fact (tokens)")
        _legend(figure, panels[0][0])
        return write_figure(figure, path)


def _by_question(run: RunResult, task: str) -> dict[_Question, float]:
    """Return {(depth, length, number of the question): log-probability}."""
    return {
        (float(depth), length, number): log_probability
        for length, figures in run.scores(task).items()
        for number, (depth, _, _, log_probability, *_) in enumerate(figures.get("records", []))
        if depth is not None
    }


def _distances(runs: list[RunResult], task: str) -> dict[tuple[int, _Question], int]:
    """Return {(seed, question): distance from the question back to the fact}. If no run recorded the distance of a question, it is computed
    from depth and length. The computed distance also counts the tokens of the question and of the other facts, so it is too large (by a
    fifth at 512 tokens, and only slightly from 4K on)."""
    computed, recorded = {}, {}
    for run in runs:
        for length, figures in run.scores(task).items():
            for number, (depth, _, _, _, *more) in enumerate(figures.get("records", [])):
                if depth is not None:
                    question = (run.seed, (float(depth), length, number))
                    computed[question] = max(1, round((1 - float(depth)) * length))
                    if more and more[0]:
                        recorded[question] = more[0]
    return computed | recorded


def plot_cost(path: Path, groups: dict[str, list[RunResult]]) -> Path | None:
    """Draw perplexity and retrieval against the training time in seconds, with one point per method.

    Args:
        path: path of the PNG.
        groups: {label: runs}.
    Returns:
        path, or None if no method was trained.
    """
    trained = {label: group for label, group in groups.items() if group[0].summary["steps"]}
    if not trained:
        return None
    styles = styles_of(list(groups))
    tasks = [task for task in TASKS if any(run.scores(task) for group in trained.values() for run in group)]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 4.9), layout="constrained")
        for label, group in trained.items():
            seconds = float(np.mean([run.train_seconds for run in group]))
            pairs = (
                [math.exp(log_perplexity(run)) for run in group],
                [float(np.mean([task_mean(run, task, "key_log_probability") for task in tasks])) if tasks else math.nan for run in group],
            )
            for axes, values in zip(panels, pairs, strict=True):
                _draw(axes, [(seconds, values)], styles[label], label)
        panels[0].set(ylabel="perplexity, mean over windows (lower is better)")
        panels[1].set(ylabel="log-probability, mean over tasks (nats)")
        for axes in panels:
            axes.set_xlabel("training (s)")
            axes.margins(x=0.15, y=0.15)
            axes.set_xlim(left=0)
        _legend(figure, panels[0])
        return write_figure(figure, path)


def _gap(run: RunResult) -> tuple[int, int] | None:
    prompt = run.conditions.get("end_prompt_tokens", 0)
    if not prompt or run.summary["method"] != "endprompt":
        return None
    context, window = run.summary["physical_length"] - prompt, run.summary["target_length"]
    first, last = max(context, prompt), window - context - prompt
    return (first, last) if first <= last else None


def _octave_bins(by_distance: dict[int, list[float]]) -> list[tuple[float, list[float]]]:
    """Group the values into bins of one octave of distance. Each bin is placed at the geometric mean of its distances."""
    bins: dict[int, list[tuple[int, float]]] = {}
    for distance, values in by_distance.items():
        bins.setdefault(math.floor(math.log2(distance)), []).extend((distance, value) for value in values)
    gathered = []
    for _, pairs in sorted(bins.items()):
        centre = math.exp(np.mean([math.log(distance) for distance, _ in pairs]))
        gathered.append((centre, [value for _, value in pairs]))
    return gathered


def _draw(
    axes: Axes, points: list[tuple[float, list[float]]], style: SystemStyle, label: str, *, bars: bool = True, of_mean: bool = False
) -> None:
    """Draw the mean of the values at each x. With `bars`, error bars show the standard deviation of the values, or with `of_mean` the
    standard error of their mean."""
    summaries = [(x, summarize(values)) for x, values in points]
    summaries = [(x, found) for x, found in summaries if not math.isnan(found.mean)]
    if not summaries:
        return
    axes.errorbar(
        [x for x, _ in summaries],
        [found.mean for _, found in summaries],
        yerr=[_bar(found, of_mean) for _, found in summaries] if bars else None,
        color=style.color,
        marker=style.marker,
        ls=style.line,
        lw=1.8,
        ms=6.5,
        elinewidth=0.9,
        capsize=2.5,
        label=label,
    )


def _bar(found: Summary, of_mean: bool) -> float:
    if math.isnan(found.deviation):
        return 0.0
    return found.deviation / math.sqrt(found.count) if of_mean else found.deviation


def _legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend below the panels, with as many columns as fit into the figure."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in (4, 3, 2, 1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            return
        legend.remove()
