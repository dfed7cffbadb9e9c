"""Pictures of a study, from made-up runs: which questions are paired, and that legends fit."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from endprompt_megatron.comparison.results import read_run
from endprompt_megatron.report.figures import comparison
from endprompt_megatron.report.figures.comparison import plot_scores_by_distance, plot_scores_by_length
from tests.support.studies import write_run


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, laid out, before they are closed."""
    seen = []
    monkeypatch.setattr(comparison, "write_figure", lambda figure, path: (figure.canvas.draw(), seen.append(figure), path)[-1])
    yield seen
    plt.close("all")


def groups_of(tmp_path, *labels: str, with_distance: tuple[str, ...] = ()) -> dict:
    """One run per label; those in `with_distance` have records with the distance."""
    groups = {}
    for gain, label in enumerate(labels):
        directory = write_run(tmp_path / label, method=label, seed=1, gain=float(gain))
        if label in with_distance:
            evaluation = json.loads((directory / "evaluation.json").read_text())
            for length, figures in evaluation["systems"]["trained"]["needle"].items():
                for record in figures["records"]:
                    record.append(round((1 - record[0]) * int(length)) - 40)
            (directory / "evaluation.json").write_text(json.dumps(evaluation))
        groups[label] = read_run(directory, label=label)
    return groups


def test_a_run_with_distances_is_paired_with_one_without(tmp_path, figures):
    groups = groups_of(tmp_path, "control_short_pi", "endprompt", "longlora", with_distance=("longlora",))
    plot_scores_by_distance(tmp_path / "d.png", groups, reference="control_short_pi")
    absolute, relative = figures[0].axes[:2]
    drawn = {container.get_label(): container.lines[0] for container in relative.containers}
    for label, gain in (("endprompt", 1.0), ("longlora", 2.0)):
        found = [float(value) for value in drawn[label].get_ydata()]
        assert len(found) >= 3 and found == pytest.approx([gain] * len(found)), "the same questions, each the gain better"
    ours = {container.get_label(): container.lines[0] for container in absolute.containers}
    assert list(ours["endprompt"].get_xdata()) == list(ours["longlora"].get_xdata())  # the same questions at the same recorded distance


@pytest.mark.parametrize("draw", [plot_scores_by_distance, plot_scores_by_length])
@pytest.mark.parametrize("count", [2, 13])
def test_legends_stay_inside_the_picture(tmp_path, figures, draw, count):
    labels = ["control_short_pi", *(f"endprompt_with_a_name_of_some_length_{index}" for index in range(count - 1))]
    options = {"reference": "control_short_pi"} if draw is plot_scores_by_distance else {}
    draw(tmp_path / "p.png", groups_of(tmp_path, *labels), **options)
    (legend,) = figures[0].legends
    box, canvas = legend.get_window_extent(), figures[0].bbox
    assert box.x0 >= canvas.x0 and box.x1 <= canvas.x1 and box.y0 >= canvas.y0
