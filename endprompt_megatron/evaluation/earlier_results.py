"""Read scores that earlier releases wrote. These scores lack `task_id` and `haystack`, so this module derives both from the display name.
No other module parses display names. Delete this module when such results are no longer needed."""

from __future__ import annotations

from typing import Any

from endprompt_megatron.evaluation.tasks import BENCHMARK_HAYSTACK, HAYSTACK_MARKS


def with_identity(score: dict[str, Any]) -> dict[str, Any]:
    """Return a score of results.json or of a stored record with `task_id` and `haystack`. A score that already has both is unchanged."""
    if "task_id" in score:
        return score
    name = score["task"]
    haystack = next((haystack for haystack, mark in HAYSTACK_MARKS.items() if mark and name.endswith(mark)), BENCHMARK_HAYSTACK)
    return {**score, "task_id": name.removesuffix(HAYSTACK_MARKS[haystack]), "haystack": haystack}
