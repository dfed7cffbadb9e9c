"""Draw the figures of an evaluation: maps of scores by depth and length, and curves of scores by length with intervals and published
scores. The functions take plain numbers and return the path of a PNG. Colours are those of report/figures/run.py. Maps use cividis, whose
lightness rises evenly for all kinds of colour vision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from endprompt_megatron.report.figures.run import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    STYLE,
    VERMILLION,
    WIDTH_INCHES,
    length_axis,
    length_label,
    write_figure,
)

Cells = Mapping[tuple[int, float], float]
_MAP_COLORS = "cividis"
_UNMEASURED = "#e8e8e8"
_LINES = ((BLUE, "D", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."), (ORANGE, "v", ":"), ("#000000", "o", "-"), ("#CC79A7", "P", "--"))


@dataclass(frozen=True)
class Curve:
    """Scores of one system by length.

    Attributes:
        label: label in the legend.
        scores: {length in tokens: score}.
        intervals: {length: (low, high)} for the lengths with a known interval.
        published: whether the scores come from a publication. Published curves are thin and have hollow markers.
    """

    label: str
    scores: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    published: bool = False


def plot_depth_by_length(
    path: Path,
    panels: Mapping[str, Cells],
    *,
    measure: str,
    value_range: tuple[float, float],
    original_context_length: int,
    target_context_length: int,
    title: str,
) -> Path:
    """Draw one map per system. A map shows a value by the depth of a fact and the length of the text.

    Args:
        path: path of the PNG.
        panels: {system: {(length in tokens, depth from 0 = start to 1 = end): value}}; missing cells are grey.
        measure: name and unit of the values.
        value_range: values of the darkest and of the lightest colour.
        original_context_length, target_context_length: windows, each marked by a line between two columns.
        title: title of the figure.
    Returns:
        path.
    """
    lengths = sorted({length for cells in panels.values() for length, _ in cells})
    depths = sorted({depth for cells in panels.values() for _, depth in cells})
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        height = 1.6 + rows * (1.5 + 0.42 * len(depths))
        figure, grid = plt.subplots(
            rows, columns, figsize=(WIDTH_INCHES, height), squeeze=False, sharex=True, sharey=True, layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        image = None
        for axes, (name, cells) in zip(grid.flat, panels.items(), strict=False):
            image = _draw_map(axes, cells, lengths, depths, value_range)
            axes.set_title(name, loc="left")
            _mark_windows(axes, lengths, original_context_length, target_context_length)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for column in range(columns):
            lowest = [axes for axes in grid[:, column] if axes.get_visible()][-1]
            lowest.set_xlabel("length of the text (tokens)")
            lowest.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("depth of the fact (% of the text)")
        figure.colorbar(image, ax=grid, label=measure, shrink=0.9, pad=0.02)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return write_figure(figure, path)


def _draw_map(axes: Axes, cells: Cells, lengths: Sequence[int], depths: Sequence[float], value_range: tuple[float, float]) -> AxesImage:
    values = np.array([[cells.get((length, depth), math.nan) for length in lengths] for depth in depths])
    axes.set_facecolor(_UNMEASURED)
    colors = plt.get_cmap(_MAP_COLORS)
    image = axes.imshow(values, cmap=colors, vmin=value_range[0], vmax=value_range[1], aspect="auto", interpolation="nearest")
    span = value_range[1] - value_range[0]
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            axes.text(column, row, "–", ha="center", va="center", color=GREY)
        else:
            light = (value - value_range[0]) / span > 0.55
            text = f"{value:.0f}" if span > 20 else f"{value:.1f}"
            color = "#000000" if light else "#ffffff"
            axes.text(column, row, text.replace("-", "−"), ha="center", va="center", color=color, fontsize=10)
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _mark_windows(axes: Axes, lengths: Sequence[int], native: int, target: int) -> None:
    """Mark each window with a line between the last column inside the window and the first column beyond it."""
    windows = ((native, "native", "-"), (target, "target", "--")) if native != target else ((native, "model's", "-"),)
    for window, name, line in windows:
        if window > lengths[-1]:
            axes.plot([], [], " ", label=f"the {name} window ({window:,}) ends beyond the map")
            continue
        place = sum(length <= window for length in lengths) - 0.5
        axes.axvline(place, color=VERMILLION, lw=3, ls=line, clip_on=False, label=f"end of the {name} window ({window:,})")


def plot_scores_by_length(
    path: Path, curves: Sequence[Curve], *, measure: str, title: str, original_context_length: int, target_context_length: int
) -> Path:
    """Draw scores by length with their intervals, and published curves.

    Args:
        path: path of the PNG.
        curves: measured and published curves.
        measure: label of the y axis, which ranges from 0 to 100.
        title: title of the figure.
        original_context_length, target_context_length: windows to mark.
    Returns:
        path.
    """
    lengths = sorted({length for curve in curves for length in curve.scores})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 5.6), layout="constrained")
        styles = iter(_LINES * (1 + len(curves) // len(_LINES)))
        measured = [curve for curve in curves if not curve.published]
        for index, curve in enumerate(measured):
            color, marker, line = next(styles)
            shift = 2 ** (0.05 * (index - (len(measured) - 1) / 2))  # a horizontal shift in octaves keeps the intervals apart
            points = sorted(curve.scores.items())
            xs, ys = [length * shift for length, _ in points], [score for _, score in points]
            axes.plot(xs, ys, color=color, marker=marker, ls=line, lw=2, ms=7, label=curve.label)
            for length, (low, high) in curve.intervals.items():
                axes.vlines(length * shift, low, high, color=color, lw=1.5, alpha=0.7)
        for index, curve in enumerate(curve for curve in curves if curve.published):
            marker = "osD^vP"[index % 6]
            points = sorted(curve.scores.items())
            axes.plot(*zip(*points, strict=True), color=GREY, marker=marker, mfc="none", ls=":", lw=1.2, ms=6, label=curve.label)
        axes.set(ylabel=measure, ylim=(-4, 104))
        axes.set_title(title, loc="left")
        if target_context_length != original_context_length:
            target = f"target window ({target_context_length:,})"
            axes.axvline(target_context_length, color=SKY, lw=2.5, ls="--", zorder=1.5, label=target)
        length_axis(axes, sorted({*lengths, target_context_length}), original_context_length, "length of the prompt (tokens)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return write_figure(figure, path)
