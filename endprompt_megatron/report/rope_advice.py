"""Write the page that compares RoPE scalings of an untrained base. The page contains a table, a figure, a recommendation, and the rule of
the recommendation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endprompt_megatron.output_files import replace_text
from endprompt_megatron.report.figures.reach import plot_reach
from endprompt_megatron.report.reach import PLANTED, headline_task, mean_perplexity, right_answers

# Thresholds of RULE, relative to the base's results inside the native window.
KEPT_INSIDE, KEPT_BEYOND, PERPLEXITY_INSIDE = 0.9, 0.8, 1.05
RULE = (
    f"Rule: a scaling is usable without training if it meets three conditions. Inside the native window, it keeps at least "
    f"{KEPT_INSIDE:.0%} of the base's right answers. Beyond the window, its share of right answers is at least {KEPT_BEYOND:.0%} of the "
    f"base's share inside. Inside the window, its perplexity is at most {PERPLEXITY_INSIDE} times the base's. The recommended scaling has "
    f"the most right answers beyond the window. If several scalings have the same number, the one with the lowest perplexity beyond the "
    f"window is recommended."
)


def usable_untrained(system: Mapping[str, Any], base: Mapping[str, Any], *, native: int) -> bool:
    """Return whether a scaling is usable without training according to RULE."""
    task = headline_task(base)
    mine, theirs = right_answers(system[task], native=native), right_answers(base[task], native=native)
    inside, beyond, base_inside = (_share(mine, "inside"), _share(mine, "beyond"), _share(theirs, "inside"))
    ratio = mean_perplexity(system["perplexity"], native=native)["inside"] / mean_perplexity(base["perplexity"], native=native)["inside"]
    return inside >= KEPT_INSIDE * base_inside and beyond >= KEPT_BEYOND * base_inside and ratio <= PERPLEXITY_INSIDE


def _share(found: Mapping[str, tuple[int, int]], side: str) -> float:
    right, questions = found.get(side, (0, 0))
    return right / questions if questions else 0.0


def recommend(systems: Mapping[str, Mapping[str, Any]], *, native: int) -> tuple[str, list[str]]:
    """Return the name of the recommended scaling, and two texts: the reason, and whether training is needed.

    Args:
        systems: {"base" or name of a scaling: results of the probes}.
        native: window of the base, in tokens.
    """
    base = systems["base"]
    task = headline_task(base)
    scaled = {name: system for name, system in systems.items() if name != "base"}

    def merit(name: str) -> tuple[int, float]:
        right = right_answers(scaled[name][task], native=native).get("beyond", (0, 0))[0]
        return right, -mean_perplexity(scaled[name]["perplexity"], native=native)["beyond"]

    best = max(scaled, key=merit)
    counts, of_base = ({"inside": (0, 0), "beyond": (0, 0)} | right_answers(one[task], native=native) for one in (scaled[best], base))
    perplexity, perplexity_of_base = (mean_perplexity(one["perplexity"], native=native) for one in (scaled[best], base))
    why = (
        f"Recommended: rope={best}. Without training it answers {counts['beyond'][0]} of {counts['beyond'][1]} questions beyond {native:,} "
        f"tokens (base {of_base['beyond'][0]}) and {counts['inside'][0]} of {counts['inside'][1]} inside (base {of_base['inside'][0]}), "
        f"with a perplexity of {perplexity['inside']:.1f} inside (base {perplexity_of_base['inside']:.1f}) and "
        f"{perplexity['beyond']:.1f} beyond (base {perplexity_of_base['beyond']:.1f})."
    )
    if usable_untrained(scaled[best], base, native=native):
        train = "It can use the longer window without training. Train to improve on your kind of text."
    else:
        train = "It does not use the longer window well enough without training. Train it, and compare the result with this row."
    return best, [why, train]


def write_rope_page(path: Path, described: Mapping[str, Any]) -> list[str]:
    """Write the page and its figure.

    Args:
        path: path of the page; the figure is written to the same directory.
        described: content of the page, with the keys experiment, native, target, command, conditions and systems ({name: results of the
            probes, with "seconds"}).
    Returns:
        The table, the recommendation and the rule, as lines.
    """
    systems, native = described["systems"], described["native"]
    tasks = [task for task in PLANTED if systems["base"].get(task)]
    header = ["scaling", *(f"{PLANTED[task]} {side}" for task in tasks for side in ("inside", "beyond")), "perplexity inside"]
    header += ["perplexity beyond", "usable untrained", "seconds"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, system in systems.items():
        counts = [right_answers(system[task], native=native) for task in tasks]
        perplexity = mean_perplexity(system["perplexity"], native=native)
        usable = "" if name == "base" else "yes" if usable_untrained(system, systems["base"], native=native) else "no"
        sides = [found.get(side, (0, 0)) for found in counts for side in ("inside", "beyond")]
        shares = [f"{right} of {questions}" for right, questions in sides]
        rows.append(
            [system["label"], *shares, f"{perplexity['inside']:.1f}", f"{perplexity['beyond']:.1f}", usable, f"{system['seconds']:.0f}"]
        )
    table = ["| " + " | ".join(row) + " |" for row in rows]
    _, advice = recommend(systems, native=native)
    lines = [*table, "", *advice, RULE]
    lengths = sorted({int(length) for length in systems["base"]["perplexity"]})
    title = f"{described['experiment']}: RoPE scalings of the untrained base, {native:,} -> {described['target']:,}"
    picture = plot_reach(path.with_name("ropes.png"), systems, native=native, title=title)
    conditions = [f"- {key.replace('_', ' ')}: {value}" for key, value in described["conditions"].items()]
    page = [
        f"# {title}",
        f"`{described['command']}`",
        "\n".join(table),
        f"Inside means contexts of {', '.join(f'{n:,}' for n in lengths if n <= native)} tokens, beyond means contexts of "
        f"{', '.join(f'{n:,}' for n in lengths if n > native)} tokens. Seconds count this start only; they are 0 for results of an "
        f"earlier start.",
        "\n".join(advice),
        RULE,
        f"![Retrieval and perplexity of every scaling]({picture.name})",
        "## Conditions",
        "\n".join(conditions),
    ]
    replace_text(path, "\n\n".join(page) + "\n")
    return lines
