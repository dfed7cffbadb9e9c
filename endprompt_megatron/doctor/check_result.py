"""The result of one check of a machine: what was observed, its consequence for a run and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

OK, LIMITS, MISSING = "ok", "limits", "missing"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        key: name of the check, as in `--require`.
        level: OK; LIMITS if some runs cannot use all they need; MISSING if runs that need it cannot run.
        found: observed versions, sizes or names.
        meaning: consequence for a run; "" if there is none.
        advice: what to do about it; "" if there is nothing to do.
    """

    key: str
    level: str
    found: str
    meaning: str = ""
    advice: str = ""


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: "2.11.0a0+a6c2.nv26.03" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
