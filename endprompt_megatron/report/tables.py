"""Format Markdown tables and the numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from endprompt_megatron.comparison.statistics import Summary

MISSING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = 1) -> str:
    """Return a Markdown table.

    Args:
        header, rows: texts of the cells. A "|" in a cell becomes "/".
        numbers_from: first column that is aligned to the right; None aligns no column to the right.
    """
    first = len(header) if numbers_from is None else numbers_from
    aligned = ["---" if column < first else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (header, aligned, *rows))


def spread(summary: Summary, form: str) -> str:
    """Return mean ± deviation, both in the format `form`. A NaN mean becomes MISSING, and a NaN deviation is left out."""
    if math.isnan(summary.mean):
        return MISSING
    text = format(summary.mean, form)
    if not math.isnan(summary.deviation):
        text += f" ± {format(summary.deviation, form)}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """Return a difference as text with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def p_value(value: float) -> str:
    """Return a p-value as text; NaN becomes MISSING."""
    return MISSING if math.isnan(value) else ("<0.001" if value < 0.001 else f"{value:.3f}")


def without_nan(value: object) -> object:
    """Replace NaN by None in nested values, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
