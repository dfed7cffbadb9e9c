"""Draw the main figure of a run's results: retrieval by context length and by distance, and perplexity, inside and beyond the native
window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from endprompt_megatron.report.figures.run import (
    OTHER_STYLES,
    SKY,
    STYLE,
    SYSTEM_STYLES,
    WIDTH_INCHES,
    SystemStyle,
    length_label,
    wilson_interval,
    write_figure,
)
from endprompt_megatron.report.reach import PLANTED, headline_task, ordered_systems

_BINS = 5


def plot_reach(path: Path, systems: Mapping[str, Mapping[str, Any]], *, native: int, title: str) -> Path:
    """Draw the retrieval of planted facts by context length and by distance, perplexity by context length, and the retrieval of the other
    kind of fact by context length.

    Args:
        path: path of the PNG.
        systems: `systems` of evaluation.json, with a task on long texts.
        native: window of the base, in tokens; marked by a vertical line.
        title: title of the figure.
    Returns:
        path.
    """
    known = ordered_systems(systems)
    task = headline_task(next(iter(known.values())))
    other = next((name for name in PLANTED if name != task and any(system.get(name) for system in known.values())), None)
    lengths = sorted({int(length) for system in known.values() for length in system.get(task) or {}})
    longest = lengths[-1]
    far = [length for length in lengths if length > native] or [longest]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(WIDTH_INCHES, 8.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        by_length, by_distance, perplexity, second = panels.flat
        styles = _styles(known)
        for index, (name, system) in enumerate(known.items()):
            label = str(system.get("label") or name)
            shift = (index - (len(known) - 1) / 2) * 0.008 * longest
            figures = system.get(task) or {}
            _draw_shares(by_length, _by_length(figures), styles[name], label, shift)
            beyond = [figures[str(length)] for length in far if str(length) in figures]
            _draw_shares(by_distance, _by_distance(beyond, longest), styles[name], label, shift)
            _draw_line(perplexity, {int(length): value for length, value in (system.get("perplexity") or {}).items()}, styles[name], label)
            if other:
                _draw_shares(second, _by_length(system.get(other) or {}), styles[name], label, shift)
        shares = {"ylabel": "right (%), 95% interval", "ylim": (-4, 104)}
        by_length.set_title(f"Planted {PLANTED[task]} retrieved, by context length", loc="left")
        by_length.set(xlabel="context length (tokens)", **shares)
        where = "beyond the window" if far[0] > native else f"at {longest:,} tokens"
        by_distance.set_title(f"... by distance to the fact, {where}", loc="left")
        by_distance.set(xlabel="distance (tokens)", **shares)
        perplexity.set_title("Perplexity (each length scores different tokens)", loc="left")
        perplexity.set(xlabel="context length (tokens)", ylabel="perplexity (lower is better)")
        if other:
            second.set_title(f"Planted {PLANTED[other]} retrieved, by context length", loc="left")
            second.set(xlabel="context length (tokens)", **shares)
        second.set_visible(bool(other))
        for axes in (by_length, by_distance, perplexity, second):
            _mark_native(axes, native, longest, lengths if axes is not by_distance else None)
        handles, labels = by_length.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return write_figure(figure, path)


def _styles(systems: Mapping[str, Any]) -> dict[str, SystemStyle]:
    others = [name for name in systems if name not in SYSTEM_STYLES]
    return {name: SYSTEM_STYLES.get(name) or OTHER_STYLES[others.index(name) % len(OTHER_STYLES)] for name in systems}


def _by_length(figures: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    found = ((int(length), score["exact_match"], int(score["trials"])) for length, score in figures.items())
    return sorted(found)


def _by_distance(figures: Sequence[Mapping[str, Any]], longest: int) -> list[tuple[float, float, int]]:
    """Return (centre of a bin, share of right answers, number of questions) for equal bins of distance up to the longest context, pooled
    over lengths."""
    records = [record for of_length in figures for record in of_length["records"]]
    distances = np.array([record[4] for record in records], dtype=float)
    right = np.array([record[1] for record in records], dtype=float)
    bins = np.minimum((distances / longest * _BINS).astype(int), _BINS - 1)
    members = {number: right[bins == number] for number in sorted(set(bins))}
    return [((number + 0.5) * longest / _BINS, float(found.mean()), len(found)) for number, found in members.items()]


def _draw_shares(axes: Axes, points: Sequence[tuple[float, float, int]], style: SystemStyle, label: str, shift: float) -> None:
    """Draw shares with Wilson intervals, shifted sideways so that equal values do not overlap."""
    if not points:
        return
    xs = [x + shift for x, _, _ in points]
    axes.plot(xs, [100 * share for _, share, _ in points], color=style.color, marker=style.marker, ls=style.line, lw=2, ms=7, label=label)
    for x, (_, share, count) in zip(xs, points, strict=True):
        low, high = wilson_interval(share, count)
        axes.vlines(x, 100 * low, 100 * high, color=style.color, lw=1, alpha=0.6)


def _draw_line(axes: Axes, values: Mapping[int, float], style: SystemStyle, label: str) -> None:
    if values:
        xs = sorted(values)
        axes.plot(xs, [values[x] for x in xs], color=style.color, marker=style.marker, ls=style.line, lw=2, ms=7, label=label)


def _mark_native(axes: Axes, native: int, longest: int, ticks: list[int] | None) -> None:
    axes.axvspan(native, 1.05 * max(longest, native), color=SKY, alpha=0.16, lw=0, zorder=0)
    axes.axvline(native, color="#0072B2", lw=1.5, zorder=1.5, label=f"native window ({native:,}); shaded: beyond it")
    axes.set_xlim(0, 1.05 * max(longest, native))
    shown = ticks or [round(longest * part / 4) for part in range(5)]
    axes.set_xticks(shown, [length_label(tick) for tick in shown], fontsize=9)
