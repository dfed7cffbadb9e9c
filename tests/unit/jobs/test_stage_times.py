"""Seconds by stage."""

from __future__ import annotations

import pytest

from endprompt_megatron.jobs import stage_times
from endprompt_megatron.jobs.stage_times import StageTimes


def test_stages_add_up_in_order_also_where_one_fails(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 15.0, 20.0, 21.0])
    monkeypatch.setattr(stage_times.time, "monotonic", lambda: next(clock))
    times = StageTimes()
    with times.stage("prepare"):
        pass
    with pytest.raises(ZeroDivisionError), times.stage("train"):
        raise ZeroDivisionError
    with times.stage("prepare"):
        pass
    assert list(times.seconds.items()) == [("prepare", 3.0), ("train", 5.0)]


def test_the_stage_under_way_counts_until_now(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(stage_times.time, "monotonic", lambda: next(clock))
    times = StageTimes()
    with times.stage("prepare"):
        pass
    with times.stage("train"):
        monkeypatch.setattr(stage_times.time, "monotonic", lambda: 13.0)
        assert times.so_far() == {"prepare": 2.0, "train": 3.0}
    assert times.so_far() == times.seconds
