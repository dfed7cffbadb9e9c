"""The result of one check of a machine: an observation, its consequence for a run, and advice."""

from __future__ import annotations

import re
from dataclasses import dataclass

OK, LIMITS, MISSING = "ok", "limits", "missing"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        key: name of the check, used in `--require`.
        level: OK (no problem), LIMITS (some runs lack a feature or resource that they need) or MISSING (runs that need the checked
            component cannot run).
        found: observed versions, sizes or names.
        meaning: consequence for a run; "" if there is none.
        advice: how to fix the problem; "" if no action is needed.
    """

    key: str
    level: str
    found: str
    meaning: str = ""
    advice: str = ""


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparisons: "2.11.0a0+a6c2.nv26.03" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
