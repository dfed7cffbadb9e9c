"""Pictures of a run's report, beyond what test_report.py looks at."""

from __future__ import annotations


def test_systems_with_other_names_have_different_styles(tmp_path, monkeypatch):
    from endprompt_megatron.report.figures import run

    drawn = []
    plot = run.Axes.plot
    monkeypatch.setattr(
        run.Axes, "plot", lambda self, *args, **style: drawn.append((style["color"], style["marker"])) or plot(self, *args, **style)
    )
    systems = {name: {"label": name, "perplexity": {"512": 20.0 + index, "1024": 19.0 + index}} for index, name in enumerate("abcde")}
    run.plot_perplexity(tmp_path / "p.png", systems, original_context_length=1024)
    assert len(set(drawn)) == 5
