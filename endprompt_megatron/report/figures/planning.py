"""Draw the figure of a cluster plan: memory per GPU and hours by window, for EndPrompt's short samples and for full-length samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from endprompt_megatron.planning.layout_search import Candidate, ClusterRequest, LengthComparison, Ranking
from endprompt_megatron.planning.pages import words_of_tokens
from endprompt_megatron.planning.throughput import get_hardware
from endprompt_megatron.report.figures.run import BLUE, GREY, SKY, STYLE, VERMILLION, WIDTH_INCHES, length_label, plt, write_figure

_FULL_FASTEST = {"color": VERMILLION, "marker": "s", "ls": "-", "lw": 2.2, "ms": 7}
_FULL_LEANEST = {"color": VERMILLION, "marker": "s", "ls": ":", "lw": 1.8, "ms": 6, "mfc": "white"}
_FASTEST = {"color": BLUE, "marker": "D", "ls": "-", "lw": 2.2, "ms": 7}
_SAME_LAYOUT = {"color": SKY, "marker": "o", "ls": "--", "lw": 2.2, "ms": 7}
_LEANEST = {"color": BLUE, "marker": "D", "ls": ":", "lw": 1.8, "ms": 6, "mfc": "white"}
_NO_FIT = {"color": VERMILLION, "marker": "X", "ms": 10, "ls": ""}


def plot_lengths(path: Path, comparisons: Sequence[LengthComparison], *, request: ClusterRequest, tokens: float) -> Path:
    """Draw two panels with the window on the x axis. The first panel shows the GiB that the fullest GPU needs, and a line at the memory
    that a GPU has. The second panel shows hours. A mark at the top of both panels shows the windows for which no layout fits full-length
    samples.

    The fastest layout of short samples may use all memory, which would hide that short samples need less. The first panel therefore shows
    the short samples in the layout that is fastest for full-length samples.

    Args:
        path: path of the PNG.
        comparisons: one per window, at least one.
        request: the planned model and cluster.
        tokens: number of physical tokens of the training run, which determines the hours.
    Returns:
        path.
    """
    memory = get_hardware(request.hardware).memory_gib
    windows = [found.target_context_length for found in comparisons]
    fastest = [_first(found.full) for found in comparisons]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 5.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        for axes, figure_of, short, style in (
            (left, _gib, [found.same_layout for found in comparisons], _SAME_LAYOUT),
            (right, lambda one: one.hours(tokens), [_first(found.endprompt) for found in comparisons], _FASTEST),
        ):
            _draw(axes, windows, fastest, figure_of, _FULL_FASTEST)
            _draw(axes, windows, [found.full.leanest for found in comparisons], figure_of, _FULL_LEANEST)
            _draw(axes, windows, short, figure_of, style)
            _draw(axes, windows, [found.endprompt.leanest for found in comparisons], figure_of, _LEANEST)
            _window_axis(axes, windows)
        left.axhline(memory, color="#000000", ls="--", lw=1.4)
        left.set_ylim(0, 1.16 * memory)
        right.set_ylim(0, 1.05 * right.get_ylim()[1])
        lost = [window for window, candidate in zip(windows, fastest, strict=True) if candidate is None]
        for axes in (left, right):
            axes.plot(lost, [0.95 * axes.get_ylim()[1]] * len(lost), **_NO_FIT)
        left.set_title("Memory of the GPU that needs most", loc="left")
        left.set(ylabel="tensors per GPU (GiB)")
        right.set_title(f"Time on {request.num_gpus} x {request.hardware}", loc="left")
        right.set(ylabel=f"hours for {words_of_tokens(tokens)} tokens")
        short_samples = f"EndPrompt, samples of {comparisons[0].short_length:,}"
        handles = [
            Line2D([], [], **_FULL_FASTEST, label="samples as long as the window: fastest layout"),
            Line2D([], [], **_FULL_LEANEST, label="samples as long as the window: least memory"),
            *([Line2D([], [], **_NO_FIT, label="samples as long as the window: no layout fits")] if lost else []),
            Line2D([], [], **_SAME_LAYOUT, label=f"{short_samples}: in that same layout"),
            Line2D([], [], **_FASTEST, label=f"{short_samples}: fastest layout"),
            Line2D([], [], **_LEANEST, label=f"{short_samples}: least memory"),
            Line2D([], [], color="#000000", ls="--", lw=1.4, label=f"memory of one {request.hardware}: {memory:.1f} GiB"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle("Predicted, not measured", x=0.01, ha="left", fontsize=11, color=GREY)
        return write_figure(figure, path)


def _first(ranking: Ranking) -> Candidate | None:
    return ranking.candidates[0] if ranking.candidates else None


def _gib(candidate: Candidate) -> float:
    return candidate.memory.total_gib


def _draw(
    axes: Axes,
    windows: Sequence[int],
    candidates: Sequence[Candidate | None],
    figure_of: Callable[[Candidate], float],
    style: dict[str, Any],
) -> None:
    """Draw a line through the candidates that are not None."""
    there = [(window, figure_of(one)) for window, one in zip(windows, candidates, strict=True) if one is not None]
    if there:
        axes.plot(*zip(*there, strict=True), **style)


def _window_axis(axes: Axes, windows: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows, [length_label(window) for window in windows])
    axes.minorticks_off()
    axes.set(xlim=(windows[0] / 1.15, windows[-1] * 1.15), xlabel="window L (positions, log scale)")
