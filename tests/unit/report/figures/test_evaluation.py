"""Pictures of an evaluation, from made-up scores: what they draw, and that nothing overlaps."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from endprompt_megatron.report.figures import evaluation
from endprompt_megatron.report.figures.evaluation import Curve, plot_depth_by_length, plot_scores_by_length

WINDOWS = {"original_context_length": 8192, "target_context_length": 16384}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, before they are closed."""
    seen = []

    def keep(figure, path):
        figure.canvas.draw()
        seen.append(figure)
        figure.savefig(path, dpi=evaluation.WIDTH_INCHES * 12)
        return path

    monkeypatch.setattr(evaluation, "write_figure", keep)
    yield seen
    plt.close("all")


def cells(lengths=(4096, 8192, 16384), depths=(0.1, 0.5, 0.9), value=50.0):
    return {(length, depth): value for length in lengths for depth in depths}


def map_of(figure, index=0):
    return figure.axes[index]


def test_every_cell_shows_its_value_and_a_missing_one_says_so(tmp_path, figures):
    scores = {**cells(), (8192, 0.5): 7.0, (4096, 0.1): 100.0}
    del scores[16384, 0.9]
    plot_depth_by_length(tmp_path / "m.png", {"base": scores}, measure="%", value_range=(0, 100), title="t", **WINDOWS)
    axes = map_of(figures[0])
    shown = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in axes.texts}
    assert shown[1, 1] == "7" and shown[0, 0] == "100" and shown[2, 2] == "–" and len(shown) == 9
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4K", "8K", "16K"]


def test_windows_part_the_columns_that_they_part(tmp_path, figures):
    scores = cells((4096, 8192, 16384, 32768))
    plot_depth_by_length(tmp_path / "m.png", {"base": scores}, measure="%", value_range=(0, 100), title="t", **WINDOWS)
    assert [line.get_xdata()[0] for line in map_of(figures[0]).lines] == [1.5, 2.5]
    plot_depth_by_length(tmp_path / "m.png", {"base": cells((512, 1024))}, measure="%", value_range=(0, 100), title="t", **WINDOWS)
    named = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert named == ["the native window (8,192) ends beyond the map", "the target window (16,384) ends beyond the map"]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_systems_side_by_side_all_have_their_axes_named(tmp_path, figures, count):
    panels = {f"system {index}": cells() for index in range(count)}
    path = plot_depth_by_length(tmp_path / "m.png", panels, measure="%", value_range=(0, 100), title="t", **WINDOWS)
    assert Image.open(path).width >= 1000
    shown = [axes for axes in figures[0].axes if axes.get_visible() and axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in shown] == list(panels)
    lowest = shown[-2:] if count > 1 else shown
    assert all(axes.get_xlabel() and axes.xaxis.get_tick_params()["labelbottom"] for axes in lowest)


def test_curves_keep_their_intervals_and_published_ones_look_different(tmp_path, figures):
    ours = Curve("ours", {4096: 70.0, 8192: 60.0}, {4096: (60.0, 80.0)})
    paper = Curve("paper", {4096: 90.0, 32768: 75.0}, published=True)
    plot_scores_by_length(tmp_path / "s.png", [ours, paper], measure="%", title="t", **WINDOWS)
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["ours"].get_ydata()) == [70, 60] and lines["ours"].get_markerfacecolor() != "none"
    assert list(lines["paper"].get_xdata()) == [4096, 32768] and lines["paper"].get_markerfacecolor() == "none"
    ((low, high),) = [segment[:, 1] for collection in axes.collections for segment in collection.get_segments()]
    assert (low, high) == (60, 80)
    legend = figures[0].legends[0].get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())


def test_a_window_that_is_native_and_target_is_marked_once(tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(evaluation.Axes, "axvline", lambda self, place, **style: marked.append(style["label"]))
    cells = {(length, depth): 1.0 for length in (512, 1024, 2048) for depth in (0.0, 1.0)}
    options = dict(measure="m", value_range=(0, 1), title="t", original_context_length=1024)
    plot_depth_by_length(tmp_path / "a.png", {"one": cells}, target_context_length=1024, **options)
    assert marked == ["end of the model's window (1,024)"]
