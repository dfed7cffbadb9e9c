"""Draw the figures of a run's report (positions, loss, key retrieval, perplexity), and define the style of all figures. Every function
takes plain numbers and returns the path of the file. Colours are those of Okabe and Ito. Every system also has its own marker and line
style, so no figure depends on colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # must precede the import of pyplot, because a cluster node has no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from endprompt_megatron.output_files import replace_bytes

BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#767676"
_PALETTE = 128  # number of colours in a file
WIDTH_INCHES, DPI = 10.0, 120  # 1,200 px wide; text of 11 points stays readable at a display width of 1,000 px
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class SystemStyle:
    """Colour, marker and line of one system."""

    color: str
    marker: str
    line: str


SYSTEM_STYLES = {
    "base": SystemStyle("#000000", "o", "-"),
    "untrained": SystemStyle(ORANGE, "s", "--"),
    "control": SystemStyle(GREEN, "^", "-."),
    "trained": SystemStyle(BLUE, "D", "-"),
}
OTHER_STYLES = tuple(
    SystemStyle(color, marker, line)
    for color, marker, line in ((BLUE, "D", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."), (ORANGE, "v", ":"), ("#CC79A7", "P", "--"))
)


def plot_positions(
    path: Path, *, num_context_tokens: int, num_prompt_tokens: int, target_context_length: int, original_context_length: int
) -> Path:
    """Draw the position by physical index for one training sample, and below it the relative distances that occur in training.

    Args:
        path: path of the PNG.
        num_context_tokens: a, number of physical tokens of the text.
        num_prompt_tokens: b, number of physical tokens of the end prompt; 0 draws only contiguous positions.
        target_context_length: L, number of positions of the extended window.
        original_context_length: number of positions of the native window.
    Returns:
        path.
    Source: EndPrompt (arXiv 2605.14589), eq. 5 (positions), eq. 8 (observed distances), eq. 9 (gap).
    """
    context, prompt, target = num_context_tokens, num_prompt_tokens, target_context_length
    physical = context + prompt
    with plt.rc_context(STYLE):
        figure, (upper, strip) = plt.subplots(2, 1, figsize=(WIDTH_INCHES, 7.8), height_ratios=[5, 1], layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)
        _draw_positions(upper, context, prompt, target, original_context_length)
        upper.set_title(f"Positions of the {physical:,} tokens of a training sample in a window of {target:,} positions", loc="left")
        _draw_distances(strip, context, prompt, target)
        return write_figure(figure, path)


def _draw_positions(axes: Axes, context: int, prompt: int, target: int, native: int) -> None:
    physical = context + prompt
    axes.axhspan(0, native, color=SKY, alpha=0.22, lw=0, label=f"native window: 0 to {native - 1:,}")
    axes.axhline(target - 1, color=GREY, ls="--", lw=1.2, label=f"end of the target window: {target - 1:,}")
    axes.plot([0, physical - 1], [0, physical - 1], color=GREY, lw=7, alpha=0.45, solid_capstyle="butt", label="contiguous")
    if prompt:
        axes.plot([0, context - 1], [0, context - 1], color=BLUE, lw=2.5, label=f"context: 0 to {context - 1:,}")
        axes.plot(
            [context, physical - 1], [target - prompt, target - 1],
            color=VERMILLION, lw=4, marker="D", ms=7, label=f"end prompt: {target - prompt:,} to {target - 1:,}",
        )  # fmt: skip
        axes.annotate(
            "", (context, target - prompt), (context - 1, context - 1),
            arrowprops={"arrowstyle": "->", "color": GREY, "ls": ":", "lw": 1.5, "shrinkA": 4, "shrinkB": 8},
        )  # fmt: skip
        axes.annotate(
            f"{target - physical:,} positions\nwithout a token", (context, 0.75 * target),
            xytext=(-10, 0), textcoords="offset points", ha="right", va="center", ma="right", color="#444444",
        )  # fmt: skip
    axes.set(xlabel="physical index in the sample (token)", ylabel="position (token)")
    axes.set_xlim(-0.01 * physical, 1.03 * physical)
    axes.set_ylim(-0.02 * target, 1.05 * target)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _draw_distances(axes: Axes, context: int, prompt: int, target: int) -> None:
    physical = context + prompt
    near = max(context, prompt)
    first_far = target - physical + 1 if prompt else target
    within = "within a segment" if prompt else "within the sample"
    handles = [_bar(axes, 0, near - 1, BLUE, f"{within}: 0 to {near - 1:,}")]
    if prompt:
        handles.append(_bar(axes, first_far, target - 1, VERMILLION, f"context to end prompt: {first_far:,} to {target - 1:,}"))
    if first_far > near:
        share = (first_far - near) / target
        label = f"gap: {near:,} to {first_far - 1:,}, not in training ({share:.0%} of all)"
        handles.append(_bar(axes, near, first_far - 1, "#ffffff", label, hatch="////", edgecolor=GREY))
    axes.set_title("Relative distances that occur in training", loc="left")
    axes.set(xlabel="distance between two tokens (positions)", ylim=(0, 1), yticks=[])
    axes.set_xlim(-0.01 * target, 1.01 * target)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.75), ncols=2)


def _bar(axes: Axes, first: int, last: int, color: str, label: str, **style: Any) -> Patch:
    axes.barh(0.5, last - first + 1, left=first, height=0.8, color=color, **{"lw": 0, **style})
    return Patch(facecolor=color, label=label, **style)


def plot_loss(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the loss by step. The upper panel shows context and held-out text. The lower panel shows the end prompt on another scale.

    Args:
        path: path of the PNG.
        records: records of metrics.jsonl, in nats per token. Training records have `loss` and may have `context_loss` and `prompt_loss`;
            validation records have `validation_loss`.
    Returns:
        path.
    """
    context, context_label = _series(records, "context_loss"), "context"
    if not context:
        context, context_label = _series(records, "loss"), "all tokens"
    prompt = _series(records, "prompt_loss")
    validation = _series(records, "validation_loss")
    with plt.rc_context(STYLE):
        rows = 2 if prompt else 1
        figure, panels = plt.subplots(
            rows, 1, figsize=(WIDTH_INCHES, 6.2 if prompt else 4.8), height_ratios=[3, 1][:rows], sharex=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        upper, lower = panels[0][0], panels[-1][0]
        _draw_series(upper, context, BLUE, context_label, width=2.4)
        if validation:
            upper.plot(
                *zip(*validation, strict=True),
                color=ORANGE,
                marker="o",
                ms=7,
                ls="",
                mec="#000000",
                mew=0.8,
                label="held-out text",
            )
        upper.set(ylabel="loss (nats per token)")
        upper.set_title("Next-token loss (thin: each record, thick: running mean)", loc="left")
        if prompt:
            _draw_series(lower, prompt, VERMILLION, "end prompt", width=1.2)
            if min(loss for _, loss in prompt) > 0:
                lower.set_yscale("log")
                lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            lower.set(ylabel="loss (nats)")
            lower.set_title("End prompt", loc="left")
        lower.set(xlabel="optimizer step")
        figure.legend(loc="outside lower center", ncols=3)
        return write_figure(figure, path)


def _draw_series(axes: Axes, points: list[tuple[int, float]], color: str, label: str, *, width: float) -> None:
    if not points:
        return
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    axes.plot(steps, losses, color=color, lw=0.8, alpha=0.35, marker="." if len(points) < 10 else None)
    axes.plot(steps, smooth(losses), color=color, lw=width, label=label)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean without initial bias. Its time constant is a twentieth of the series, at least one value.

    Args:
        values: values in order of steps.
    Returns:
        The means, one per value.
    """
    decay = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed


def plot_needle(path: Path, systems: Mapping[str, Mapping[str, Any]], *, original_context_length: int) -> Path:
    """Draw the retrieval of a planted key by context length: the share of exact matches, and the log-probability of the key, which changes
    earlier.

    Args:
        path: path of the PNG.
        systems: `systems` of evaluation.json.
        original_context_length: native window, marked.
    Returns:
        path.
    """
    with plt.rc_context(STYLE):
        figure, (exact, log_probability) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 4.9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        dodge = min(0.1, 0.6 * _closest_octaves(_lengths(systems, "needle")) / len(systems))
        _draw_systems(exact, systems, "needle", lambda score: _percent(score.get("exact_match")), dodge=dodge, intervals=True)
        exact.set(ylabel="keys retrieved exactly (%)", ylim=(-4, 104))
        exact.set_title("Exact match, 95% interval of the trials", loc="left")
        _draw_systems(log_probability, systems, "needle", lambda score: score.get("key_log_probability"), dodge=dodge)
        log_probability.set(ylabel="log-probability (nats per key, 0 = certain)")
        log_probability.set_title("Log-probability of the right key", loc="left")
        for axes in (exact, log_probability):
            length_axis(axes, _lengths(systems, "needle"), original_context_length, "context length (tokens)")
        _shared_legend(figure, exact)
        return write_figure(figure, path)


def plot_perplexity(path: Path, systems: Mapping[str, Mapping[str, Any]], *, original_context_length: int) -> Path:
    """Draw the perplexity of held-out text by window length.

    Args:
        path: path of the PNG.
        systems: `systems` of evaluation.json.
        original_context_length: native window, marked.
    Returns:
        path.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 5.2), layout="constrained")
        _draw_systems(axes, systems, "perplexity", lambda score: score)
        values = [number for system in systems.values() for number in map(_number, (system.get("perplexity") or {}).values()) if number]
        if values and max(values) > 4 * min(values):  # on a linear axis, one high line would flatten all others
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.set(ylabel="perplexity (lower is better)")
        axes.set_title("Perplexity of held-out text", loc="left")
        length_axis(axes, _lengths(systems, "perplexity"), original_context_length, "window (tokens)")
        _shared_legend(figure, axes)
        return write_figure(figure, path)


def _draw_systems(
    axes: Axes,
    systems: Mapping[str, Mapping[str, Any]],
    key: str,
    value_of: Callable[[Any], Any],
    *,
    dodge: float = 0.0,
    intervals: bool = False,
) -> None:
    ordered = sorted(systems, key=lambda name: list(SYSTEM_STYLES).index(name) if name in SYSTEM_STYLES else len(SYSTEM_STYLES))
    others = [name for name in ordered if name not in SYSTEM_STYLES]
    for index, name in enumerate(ordered):
        style = SYSTEM_STYLES.get(name) or OTHER_STYLES[others.index(name) % len(OTHER_STYLES)]
        points = []
        for length, score in sorted((int(length), score) for length, score in (systems[name].get(key) or {}).items() if score is not None):
            value = _number(value_of(score))
            if value is not None:
                # shifted sideways (in octaves), so that systems with equal values do not overlap
                points.append((length * 2 ** (dodge * (index - (len(ordered) - 1) / 2)), value, score))
        if not points:
            continue
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(
            xs,
            ys,
            color=style.color,
            marker=style.marker,
            ls=style.line,
            lw=2,
            ms=7,
            label=str(systems[name].get("label") or name),
        )
        if intervals:
            for x, _, score in points:
                if score.get("trials"):
                    low, high = wilson_interval(score["exact_match"], int(score["trials"]))
                    axes.vlines(x, 100 * low, 100 * high, color=style.color, lw=1, alpha=0.6)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a share over `trials` independent trials. Both ends are in [0, 1]."""
    z = 1.959964
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def length_axis(axes: Axes, lengths: list[int], native: int, label: str) -> None:
    """Set up a log2 x axis of lengths with ticks at `lengths` and at the native window, which is marked."""
    axes.axvline(native, color=SKY, lw=2.5, zorder=1.5, label=f"native window ({native:,})")
    axes.set_xscale("log", base=2)
    ticks = sorted({*lengths, native})
    axes.set_xticks(ticks, [length_label(tick) for tick in ticks], fontsize=11 if _closest_octaves(ticks) > 0.5 else 9)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel(label)


def _closest_octaves(lengths: Sequence[int]) -> float:
    """Return the smallest distance of neighbouring lengths in octaves; 1 with fewer than two lengths."""
    return min((math.log2(high / low) for low, high in pairwise(lengths)), default=1.0)


def _shared_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 28 else 3)


def length_label(length: int) -> str:
    """Return a length as short text, such as "512" for 512 and "8K" for 8192."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _lengths(systems: Mapping[str, Mapping[str, Any]], key: str) -> list[int]:
    return sorted({int(length) for system in systems.values() for length in (system.get(key) or {})})


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = []
    for record in records:
        value = _number(record.get(key))
        if value is not None:
            points.append((int(record["step"]), value))
    return points


def _percent(share: Any) -> float | None:
    number = _number(share)
    return None if number is None else 100 * number


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG with a colour palette, and close the figure. The palette reduces the file to a third of its size.

    Args:
        figure: the figure.
        path: path of the PNG.
    Returns:
        path.
    Raises:
        OutputError: the file cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    packed = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(_PALETTE).save(packed, format="PNG", optimize=True)
    replace_bytes(Path(path), packed.getvalue())
    return Path(path)
