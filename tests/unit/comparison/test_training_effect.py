"""What training changed over the same base untrained: paired by question and by block of tokens."""

from __future__ import annotations

import pytest
from scipy import stats

from endprompt_megatron.comparison.training_effect import answer_change, loss_change


def _figures(*right: int, distances: range | None = None) -> dict:
    records = [[0.5, float(hit), 1.0, -1.0, distance] for hit, distance in zip(right, distances or range(len(right)), strict=True)]
    return {"exact_match": sum(right) / len(right), "trials": len(right), "records": records}


def test_answers_are_paired_by_question_and_only_disagreement_counts():
    before = {"100": _figures(1, 1, 0, 0, 0, 0, 0, 0), "200": _figures(0, 1)}
    after = {"100": _figures(1, 0, 1, 1, 1, 1, 1, 1), "200": _figures(1, 1)}
    change = answer_change(before, after, [100, 200])
    assert (change.before, change.after, change.questions) == (3, 9, 10)
    assert change.p == pytest.approx(stats.binomtest(7, 8).pvalue)  # seven won, one lost
    assert answer_change(before, before, [100]).p == 1.0
    assert answer_change(before, after, [200]).questions == 2


def test_other_questions_are_not_compared():
    before, after = {"100": _figures(1, 0)}, {"100": _figures(1, 0, distances=range(5, 7))}
    assert answer_change(before, after, [100]) is None and answer_change({}, after, [100]) is None


def test_losses_are_paired_by_block():
    before = {"100": [3.0, 5.0, 4.0, 6.0], "200": [2.0]}
    after = {"100": [2.9, 4.8, 3.9, 5.8], "200": [1.9]}
    change = loss_change(before, after, [100, 200])
    assert change.change == pytest.approx(-0.14) and change.units == 5 and change.is_shown
    assert -0.2 <= change.low <= change.change <= change.high <= -0.1
    unsure = loss_change(before, {"100": [3.1, 4.9, 4.1, 5.9]}, [100])
    assert not unsure.is_shown
    assert loss_change(before, {"100": [1.0]}, [100]) is None and loss_change({}, {}, [100]) is None
