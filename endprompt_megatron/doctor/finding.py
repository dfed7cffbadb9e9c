"""What the examination of a machine is made of: findings, each with what was seen, what it means for a run and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

OK, LIMITS, MISSING = "ok", "limits", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        key: its name, as `--require` takes it.
        level: OK; LIMITS where it is there and some runs cannot have what they ask for; MISSING where what needs it cannot run.
        found: what was seen: versions, sizes, names.
        meaning: what follows for a run; "" where nothing does.
        advice: what to do about it; "" where there is nothing to do.
    """

    key: str
    level: str
    found: str
    meaning: str = ""
    advice: str = ""


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparisons: "2.11.0a0+a6c2.nv26.03" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
