"""Wall time over the sittings of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from endprompt_megatron.jobs import sittings
from endprompt_megatron.jobs.sittings import Sittings
from endprompt_megatron.jobs.stage_times import StageTimes


def sit(place: Path, seconds: float, *, stage: str = "train", fails: bool = False) -> tuple[float, int, dict[str, float]]:
    """One sitting that began `seconds` ago. Returns what summary.json would have of it."""
    times = StageTimes()
    with Sittings(place, times, started=time.monotonic() - seconds) as found:
        times.seconds[stage] = seconds
        if fails:
            raise KeyboardInterrupt
        return found.wall_seconds(), found.count, found.stage_seconds()


def test_seconds_are_the_sum_and_say_of_how_many(tmp_path):
    assert sit(tmp_path, 100)[:2] == (pytest.approx(100, abs=9), 1)
    with pytest.raises(KeyboardInterrupt):
        sit(tmp_path, 20, stage="export", fails=True)
    seconds, count, stages = sit(tmp_path, 3)
    assert count == 3 and seconds == pytest.approx(123, abs=27) and seconds > 123
    assert stages == {"train": 103, "export": 20}


def test_a_killed_sitting_counts_up_to_its_last_write(tmp_path, monkeypatch):
    monkeypatch.setattr(sittings, "_SECONDS_BETWEEN_WRITES", 0.001)
    times = StageTimes()
    killed = Sittings(tmp_path, times, started=time.monotonic() - 50)
    with times.stage("train"), killed:
        stages: dict[str, float] = {}
        while not stages.get("train"):  # the stage that is under way counts too
            (written,) = json.loads((tmp_path / "sittings.json").read_text())["sittings"]
            stages = written["stages"]
        kept = (tmp_path / "sittings.json").read_text()
    (tmp_path / "sittings.json").write_text(kept)  # what a SIGKILL leaves
    seconds, count, stages = sit(tmp_path, 1, stage="prepare")
    assert count == 2 and seconds > 51 and stages["train"] > 0


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert sit(tmp_path, 10)[1] == 1 and list(tmp_path.iterdir()) == []


def test_a_directory_that_is_gone_is_not_made_again(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    with Sittings(place, StageTimes(), started=time.monotonic()):
        place.rename(tmp_path / "elsewhere")
    assert not place.exists()
