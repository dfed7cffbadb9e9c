"""Scores of earlier releases, which lack the task's id."""

from __future__ import annotations

import pytest

from endprompt_megatron.evaluation.earlier_results import with_identity


@pytest.mark.parametrize(
    ("name", "task_id", "haystack"),
    [
        ("ruler_vt", "ruler_vt", "benchmark"),
        ("niah_single_2 (stand-in haystack)", "niah_single_2", "stand_in"),
        ("probe_niah_single (essays)", "probe_niah_single", "essays"),
    ],
)
def test_identity_comes_from_the_display_name(name, task_id, haystack):
    assert with_identity({"task": name, "score": 1.0}) == {"task": name, "score": 1.0, "task_id": task_id, "haystack": haystack}


def test_present_scores_are_unchanged():
    score = {"task": "a display name (essays)", "task_id": "ruler_vt", "haystack": "benchmark"}
    assert with_identity(score) is score
