"""Write the sentences about the results inside and beyond the native window, for the terminal and the page of a run. The sentences state
the retrieval of planted facts and the perplexity of each system, and the effect of training relative to the new RoPE alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from endprompt_megatron.comparison.training_effect import answer_change, loss_change

SYSTEM_ORDER = ("base", "untrained", "control", "trained")
# {task on long texts: plural of its facts}; pages and figures show the first task first.
PLANTED = {"number": "numbers", "word": "words"}


def ordered_systems(systems: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the systems in the order of all tables and figures."""
    names = [name for name in SYSTEM_ORDER if name in systems] + [name for name in systems if name not in SYSTEM_ORDER]
    return {name: systems[name] for name in names}


def headline_task(system: Mapping[str, Any]) -> str:
    """Return the main task on long texts for pages and figures: `number` if it was measured, otherwise `word`."""
    return next((task for task in PLANTED if system.get(task)), "number")


def right_answers(figures: Mapping[str, Any], *, native: int) -> dict[str, tuple[int, int]]:
    """Return {"inside" | "beyond": (number of right answers, number of questions)}. Lengths up to the native window are inside, and longer
    lengths are beyond. A side without questions has no entry."""
    found: dict[str, tuple[int, int]] = {}
    for length, score in figures.items():
        side = "beyond" if int(length) > native else "inside"
        right, questions = found.get(side, (0, 0))
        trials = int(score["trials"])
        found[side] = (right + round(score["exact_match"] * trials), questions + trials)
    return found


def mean_perplexity(values: Mapping[str, float], *, native: int) -> dict[str, float]:
    """Return {"inside" | "beyond": geometric mean of the perplexity over the lengths of that side}. A side without lengths has no entry."""
    logs: dict[str, list[float]] = {}
    for length, value in values.items():
        logs.setdefault("beyond" if int(length) > native else "inside", []).append(math.log(value))
    return {side: math.exp(sum(found) / len(found)) for side, found in logs.items()}


def reach_sentences(systems: Mapping[str, Any], *, native: int) -> list[str]:
    """Return one sentence per measure for the results beyond and inside the native window, and one about the effect of training.

    Args:
        systems: `systems` of evaluation.json.
        native: window of the base, in tokens.
    Returns:
        The sentences; empty if no text was longer than the native window.
    """
    known = ordered_systems(systems)
    lengths = sorted({int(length) for system in known.values() for length in system.get("perplexity") or {}})
    beyond = [length for length in lengths if length > native]
    if not beyond:
        return []
    tokens = f"{', '.join(f'{length:,}' for length in beyond)} tokens"
    sentences = []
    for task, words in PLANTED.items():
        counts = {name: right_answers(system[task], native=native) for name, system in known.items() if system.get(task)}
        for side, where in (("beyond", f"Beyond the native window of {native:,} ({tokens})"), ("inside", "Inside it")):
            parts = [f"{_short(known, name)} {found[side][0]} of {found[side][1]}" for name, found in counts.items() if side in found]
            if parts:
                sentences.append(f"{where}, planted {words} answered: {', '.join(parts)}.")
    means = {name: mean_perplexity(system["perplexity"], native=native) for name, system in known.items() if system.get("perplexity")}
    for side, where in (("beyond", "Beyond the native window"), ("inside", "Inside it")):
        parts = [f"{_short(known, name)} {found[side]:.1f}" for name, found in means.items() if side in found]
        if parts:
            sentences.append(f"{where}, perplexity of held-out text: {', '.join(parts)}.")
    return sentences + training_sentences(known, native=native)


def training_sentences(systems: Mapping[str, Any], *, native: int) -> list[str]:
    """Return one sentence about the effect of training relative to the base with the new RoPE alone. It also names the measures without a
    measurable effect. The list is empty if one of the two systems was not measured."""
    before, after = systems.get("untrained"), systems.get("trained")
    if not before or not after:
        return []
    shown: list[str] = []
    not_shown: list[str] = []
    lengths = sorted(int(length) for length in after.get("perplexity") or {})
    for side, chosen in (("inside", [n for n in lengths if n <= native]), ("beyond", [n for n in lengths if n > native])):
        change = loss_change(before.get("perplexity_blocks") or {}, after.get("perplexity_blocks") or {}, chosen)
        if change:
            percent, low, high = (100 * math.expm1(value) for value in (change.change, change.low, change.high))
            words = f"perplexity {side} {percent:+.1f}% (95% interval {low:+.1f} to {high:+.1f})"
            (shown if change.is_shown else not_shown).append(words)
    for task, words in PLANTED.items():
        answers = answer_change(before.get(task) or {}, after.get(task) or {}, [n for n in lengths if n > native])
        if answers:
            right = f"{answers.before} -> {answers.after} of {answers.questions}"
            (shown if answers.p < 0.05 else not_shown).append(f"planted {words} beyond {right} (sign test p = {answers.p:.2g})")
    parts = ["changes " + "; ".join(shown)] if shown else []
    parts += ["has no measurable effect at this budget on " + "; ".join(not_shown)] if not_shown else []
    return ["Relative to the new RoPE alone, training " + ". It ".join(parts) + "."] if parts else []


def _short(systems: Mapping[str, Mapping[str, Any]], name: str) -> str:
    return "extended" if name == "trained" else name if name in SYSTEM_ORDER else str(systems[name].get("label") or name)
