"""Scores that earlier releases wrote. They lack `task_id` and `haystack`, so this module derives both from the display name. It is the only
place that does; delete it once such results no longer matter."""

from __future__ import annotations

from typing import Any

from endprompt_megatron.evaluation.tasks import BENCHMARK_HAYSTACK, HAYSTACK_MARKS


def with_identity(score: dict[str, Any]) -> dict[str, Any]:
    """A score of results.json or of a kept record, with `task_id` and `haystack`; unchanged where it has them."""
    if "task_id" in score:
        return score
    name = score["task"]
    haystack = next((haystack for haystack, mark in HAYSTACK_MARKS.items() if mark and name.endswith(mark)), BENCHMARK_HAYSTACK)
    return {**score, "task_id": name.removesuffix(HAYSTACK_MARKS[haystack]), "haystack": haystack}
