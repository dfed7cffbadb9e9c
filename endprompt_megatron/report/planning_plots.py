"""The picture of a plan: EndPrompt's short samples against samples as long as the window, by window: memory a GPU and hours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from endprompt_megatron.planning.cluster import Candidate, ClusterRequest, LengthComparison, Ranking
from endprompt_megatron.planning.cluster_page import words_of_tokens
from endprompt_megatron.planning.throughput import get_hardware
from endprompt_megatron.report.plots import BLUE, GREY, STYLE, VERMILLION, WIDTH_INCHES, length_label, plt, write_figure

_ENDPROMPT, _FULL = {"color": BLUE, "marker": "D"}, {"color": VERMILLION, "marker": "s"}
_FASTEST, _LEANEST = {"ls": "-", "lw": 2.2, "ms": 7}, {"ls": ":", "lw": 1.8, "ms": 6, "mfc": "white"}


def plot_lengths(path: Path, comparisons: Sequence[LengthComparison], *, request: ClusterRequest, tokens: float) -> Path:
    """Two panels over the window: GiB a GPU with the GPU's memory marked, and hours. A window at which no layout holds full-length samples is
    marked at the top of both.

    Args:
        path: of the PNG.
        comparisons: by window, at least one.
        request: of EndPrompt.
        tokens: physical tokens that hours are for.
    Returns:
        path.
    """
    memory = get_hardware(request.hardware).memory_gib
    windows = [found.target_context_length for found in comparisons]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 5.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        for axes, figure_of in ((left, lambda one: one.memory.total_gib), (right, lambda one: one.hours(tokens))):
            for rankings, style in (
                ([found.full for found in comparisons], _FULL),
                ([found.endprompt for found in comparisons], _ENDPROMPT),
            ):
                for pick, line in ((_fastest, _FASTEST), (_leanest, _LEANEST)):
                    chosen = [(window, pick(ranking)) for window, ranking in zip(windows, rankings, strict=True)]
                    fitting = [(window, figure_of(one)) for window, one in chosen if one is not None]
                    if fitting:
                        axes.plot(*zip(*fitting, strict=True), **style, **line)
            axes.set_ylim(bottom=0)
            _window_axis(axes, windows)
        left.axhline(memory, color="#000000", ls="--", lw=1.4)
        left.set_ylim(top=1.16 * memory)
        for found in comparisons:
            if not found.full.candidates:
                for axes in (left, right):
                    top = axes.get_ylim()[1]
                    axes.plot(found.target_context_length, 0.96 * top, color=VERMILLION, marker="X", ms=10, ls="")
                    axes.set_ylim(top=top)
        left.set(ylabel="memory of tensors a GPU (GiB)")
        left.set_title("Memory of the GPU that needs most", loc="left")
        right.set(ylabel=f"hours for {words_of_tokens(tokens)} tokens")
        right.set_title(f"Time on {request.num_gpus} x {request.hardware}", loc="left")
        handles = [
            Line2D([], [], **_FULL, **_FASTEST, label="full length: fastest layout"),
            Line2D([], [], **_FULL, **_LEANEST, label="full length: least memory"),
            Line2D([], [], **_ENDPROMPT, **_FASTEST, label=f"EndPrompt, samples of {request.seq_length:,}: fastest layout"),
            Line2D([], [], **_ENDPROMPT, **_LEANEST, label=f"EndPrompt, samples of {request.seq_length:,}: least memory"),
            Line2D([], [], color="#000000", ls="--", lw=1.4, label=f"memory of one {request.hardware}: {memory:.1f} GiB"),
        ]
        if not all(found.full.candidates for found in comparisons):
            handles.append(Line2D([], [], color=VERMILLION, marker="X", ms=10, ls="", label="full length: no layout fits"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle("Predicted, not measured", x=0.01, ha="left", fontsize=11, color=GREY)
        return write_figure(figure, path)


def _fastest(ranking: Ranking) -> Candidate | None:
    return ranking.candidates[0] if ranking.candidates else None


def _leanest(ranking: Ranking) -> Candidate | None:
    return ranking.leanest


def _window_axis(axes: Axes, windows: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows, [length_label(window) for window in windows])
    axes.minorticks_off()
    axes.set(xlim=(windows[0] / 1.15, windows[-1] * 1.15), xlabel="window L (positions, log scale)")
