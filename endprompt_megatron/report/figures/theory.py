"""Draw the figures of the theory: the relative distances that occur under each position scheme, and the slope of real attention scores by
distance with the bound of eq. 3 and the gap of eq. 9."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from endprompt_megatron.report.figures.run import BLUE, GREEN, ORANGE, SKY, STYLE, VERMILLION, WIDTH_INCHES, length_label, write_figure
from endprompt_megatron.theory.coverage import Coverage
from endprompt_megatron.theory.smoothness import ScoreFunctions, Smoothness

FloatArray = npt.NDArray[np.float64]

_BINS = 256
_COLUMNS, _POINTS_A_COLUMN = 700, 200  # for curves on a logarithmic axis; see _columns


@dataclass(frozen=True)
class ScoreExample:
    """Scores S(d) of one query and one key for the figure.

    Attributes:
        label: title with layer, head and tokens.
        base, stretched: S with the base's own frequencies and with the scaled frequencies. The coefficients have the shape [f].
        smoothness: smoothness of `stretched`, without leading dimensions.
    """

    label: str
    base: ScoreFunctions
    stretched: ScoreFunctions
    smoothness: Smoothness


def plot_coverage(
    path: Path, coverages: Sequence[Coverage], *, gap: tuple[int, int] | None, physical_length: int, original_context_length: int | None
) -> Path:
    """Draw the number of pairs per sample by relative distance, with one panel per scheme.

    Args:
        path: path of the PNG.
        coverages: coverage of every scheme, with the same lengths.
        gap: (first, last) of eq. 9, marked in every panel; None if there is no gap.
        physical_length: S, number of tokens of a sample.
        original_context_length: native window, marked in every panel; None marks no window.
    Returns:
        path.
    Source: EndPrompt (arXiv 2605.14589), eq. 8-9.
    """
    window = coverages[0].target_context_length
    width = max(1, -(-window // _BINS))
    edges = np.append(np.arange(0, window, width), window)
    heights = [coverage.binned(width) for coverage in coverages]
    positive = np.concatenate([height[height > 0] for height in heights])
    low, high = positive.min() / 3, positive.max() * 3
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(coverages), 1, figsize=(WIDTH_INCHES, 1.2 + 1.75 * len(coverages)), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, coverage, height in zip(panels[:, 0], coverages, heights, strict=True):
            for first, last in coverage.gaps:
                axes.axvspan(first, last + 1, facecolor="#ffffff", hatch="////", edgecolor="#c4c4c4", lw=0, zorder=0.5)
            axes.stairs(np.maximum(height, low), edges, baseline=low, fill=True, color=BLUE)
            if gap:
                for edge in (gap[0], gap[1] + 1):
                    axes.axvline(edge, color=VERMILLION, ls="--", lw=1.4)
            if original_context_length:
                axes.axvline(original_context_length, color=SKY, lw=2.5)
            counted = "exact" if coverage.is_exact else f"{coverage.samples:,} samples"
            seen, far = f"{coverage.seen_share:.2%} of the distances occur", f"{coverage.share_from(physical_length):.2%} of the pairs"
            axes.set_title(f"{coverage.scheme}: {seen}; {far} are {physical_length:,} or more apart ({counted})", loc="left", fontsize=11)
            axes.set_yscale("log")
        bottom = panels[-1, 0]
        bottom.set(xlabel="relative distance of query and key (positions)", ylim=(low, high), xlim=(-0.005 * window, 1.005 * window))
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        bottom.set_xticks(np.linspace(0, window, 9) if window % 8 == 0 else bottom.get_xticks()[1:-1])
        figure.supylabel("pairs of tokens per sample and distance", fontsize=11)
        per_bin = f"mean over {width} distances" if width > 1 else "each distance"
        handles = [
            Patch(facecolor=BLUE, label=f"pairs per sample ({per_bin})"),
            Patch(facecolor="#ffffff", hatch="////", edgecolor="#c4c4c4", label="distances that do not occur"),
        ]
        if gap:
            label = f"gap of eq. 9: {gap[0]:,} to {gap[1]:,}"
            handles.append(Line2D([], [], color=VERMILLION, ls="--", lw=1.4, label=label))
        if original_context_length:
            handles.append(Line2D([], [], color=SKY, lw=2.5, label=f"native window ({original_context_length:,})"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return write_figure(figure, path)


def plot_smoothness(
    path: Path,
    examples: Sequence[ScoreExample],
    *,
    steepest_ratios: FloatArray,
    median_ratios: FloatArray,
    gap: tuple[int, int],
    original_context_length: int,
    scaling_label: str,
) -> Path:
    """Draw S(d) and |S'(d)| of two pairs of tokens over the window, a detail at the edge of the gap, and the tightness of eq. 3 for all
    heads.

    Args:
        path: path of the PNG.
        examples: two pairs of tokens. The detail shows the first pair.
        steepest_ratios, median_ratios: sup|S'| / (theta_0/s sup|S|) of each head, for its steepest pair and for its median pair.
        gap: (first, last) of eq. 9.
        original_context_length: native window.
        scaling_label: name of the scaling, such as "PI x2".
    Returns:
        path.
    Source: EndPrompt (arXiv 2605.14589), eq. 3 (bound), eq. 9 (gap).
    """
    last = examples[0].smoothness.last_distance
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(3, 2, figsize=(WIDTH_INCHES, 11.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08)
        for column, example in enumerate(examples):
            upper, middle = panels[0, column], panels[1, column]
            for axes in (upper, middle):
                axes.axvspan(gap[0], gap[1] + 1, facecolor="#ececec", lw=0, zorder=0.4)
                axes.axvline(original_context_length, color=SKY, lw=2.5, zorder=0.6)
                _distance_axis(axes, last)
            _draw_band(upper, example.base, original_context_length - 1, ORANGE, 0.75)
            _draw_band(upper, example.stretched, last, BLUE, 0.6)
            upper.set_title(example.label, loc="left", fontsize=11)
            _draw_slopes(middle, example)
        panels[0, 0].set(ylabel="score S(d) before the softmax")
        panels[1, 0].set(ylabel="slope |S'(d)| (score per position)")
        _draw_edge(panels[2, 0], examples[0], gap)
        _draw_ratios(panels[2, 1], steepest_ratios, median_ratios)
        handles = [
            Patch(facecolor=ORANGE, alpha=0.75, label=f"base RoPE, to {original_context_length - 1:,}"),
            Patch(facecolor=BLUE, alpha=0.6, label=f"{scaling_label}, to {last:,}"),
            Line2D([], [], color=VERMILLION, ls="--", lw=2, label=r"bound of eq. 3: $\theta_0/s\ \cdot$ sup|S|"),
            Line2D([], [], color=GREEN, ls=":", lw=2.2, label=r"bound by amplitudes: $\Sigma\,A_i\theta_i/s$"),
            Patch(facecolor="#e2e2e2", label=f"gap of eq. 9: {gap[0]:,} to {gap[1]:,}"),
            Line2D([], [], color=SKY, lw=2.5, label=f"native window ({original_context_length:,})"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return write_figure(figure, path)


def _distance_axis(axes: Axes, last: int) -> None:
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576) if tick <= last + 1]
    axes.set_xticks(ticks, [length_label(tick) for tick in ticks])
    axes.set(xlim=(1, last + 1), xlabel="relative distance d (positions, log scale)")


def _columns(last: int) -> FloatArray:
    """Return distances from 1 to `last`, grouped by columns of a logarithmic axis, [columns, points]. Neighbouring columns share an edge.
    For a window of 64K, neighbouring points are at most 5.2 positions apart, which is 0.65 radians of the highest frequency for s = 8."""
    edges = np.geomspace(1, last, _COLUMNS + 1)
    return np.linspace(edges[:-1], edges[1:], _POINTS_A_COLUMN, axis=1)


def _draw_band(axes: Axes, functions: ScoreFunctions, last: int, color: str, alpha: float) -> None:
    """Draw S(d) as the band from its smallest to its largest value within each column."""
    columns = _columns(last)
    values = functions.at(columns.ravel()).reshape(columns.shape)
    axes.fill_between(columns[:, 0], values.min(axis=1), values.max(axis=1), color=color, alpha=alpha, lw=1.2)


def _draw_slopes(axes: Axes, example: ScoreExample) -> None:
    columns = _columns(example.smoothness.last_distance)
    slopes = np.abs(example.stretched.at(columns.ravel(), derivative=1)).reshape(columns.shape)
    axes.plot(columns[:, 0], slopes.max(axis=1), color=BLUE, lw=1.4)
    axes.axhline(float(example.smoothness.bound_slope), color=VERMILLION, ls="--", lw=2)
    axes.axhline(float(example.smoothness.slope_sum), color=GREEN, ls=":", lw=2.2)
    axes.set_yscale("log")
    axes.set_ylim(slopes.max() / 300, float(max(example.smoothness.bound_slope, example.smoothness.slope_sum)) * 2.5)
    axes.set_title(f"largest slope: {float(example.smoothness.ratio):.1%} of the bound", loc="left", fontsize=11)


def _draw_edge(axes: Axes, example: ScoreExample, gap: tuple[int, int]) -> None:
    """Draw S(d) around the last observed distance before the gap, and the range of scores that the bound allows beyond this distance."""
    known = gap[0] - 1
    around = int(np.ceil(6 / example.smoothness.highest_frequency))
    first, last = max(0, known - around), known + around
    score = float(example.stretched.at(np.array([known], dtype=np.float64))[0])
    bound, limit = float(example.smoothness.bound_slope), float(example.smoothness.sup_score)
    inside = np.linspace(known, last, 400)
    axes.axvspan(gap[0] - 0.5, last, facecolor="#ececec", lw=0, zorder=0.4)
    upper, lower = (np.clip(score + sign * bound * (inside - known), -limit, limit) for sign in (1, -1))
    axes.fill_between(inside, lower, upper, color=VERMILLION, alpha=0.16, lw=0)
    for edge in (lower, upper):
        axes.plot(inside, edge, color=VERMILLION, ls="--", lw=1.6)
    for level in (-limit, limit):
        axes.axhline(level, color="#000000", lw=1, ls="-.", zorder=0.6)
    smooth = np.linspace(first, last, 400)
    axes.plot(smooth, example.stretched.at(smooth), color=BLUE, lw=1.4)
    whole = np.arange(first, last + 1, dtype=np.float64)
    axes.plot(whole, example.stretched.at(whole), color=BLUE, ls="", marker="o", ms=4)
    free = known + (limit + abs(score)) / bound  # from here on the bound allows every score between -sup|S| and sup|S|
    axes.set_title(f"edge of the gap: after {free - known:.1f} positions, eq. 3 allows any score", loc="left", fontsize=11)
    for level, words, side in ((limit, "sup|S|", 1), (-limit, "−sup|S|", -1)):
        vertical = "bottom" if side > 0 else "top"
        axes.annotate(words, (first, level), xytext=(5, 5 * side), textcoords="offset points", va=vertical, fontsize=10)
    axes.set(xlabel="relative distance d (positions)", ylabel="score S(d), left pair", ylim=(-1.3 * limit, 1.3 * limit), xlim=(first, last))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_ratios(axes: Axes, steepest: FloatArray, median: FloatArray) -> None:
    low = min(steepest.min(), median.min())
    bins = np.geomspace(min(low, 0.1) / 1.2, max(2.0, steepest.max() * 1.2), 40)
    axes.hist(median.ravel(), bins=bins, color=SKY, label="median pair of a head")
    axes.hist(steepest.ravel(), bins=bins, histtype="step", color="#000000", lw=1.6, label="steepest pair of a head")
    axes.axvline(1, color=VERMILLION, ls="--", lw=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(f"all {steepest.size} heads: slope relative to the bound", loc="left", fontsize=11)
    axes.set(xlabel=r"sup|S'| / ($\theta_0/s\ \cdot$ sup|S|)", ylabel="heads")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper left", fontsize=10)
