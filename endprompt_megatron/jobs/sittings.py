"""Wall time of a run over all its sittings. A sitting is the time from one start of the run to its end. A run that is stopped and resumed
has several sittings. sittings.json contains the time of each, including sittings that ended in a crash."""

from __future__ import annotations

import datetime
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from endprompt_megatron.jobs.stage_times import StageTimes
from endprompt_megatron.log import global_rank
from endprompt_megatron.output_files import read_or_set_aside, replace_text

_FILE = "sittings.json"
_SECONDS_BETWEEN_WRITES = 5.0


class Sittings:
    """Measures the time of this sitting and adds the times of earlier sittings. Use as a context manager.

    A thread of rank 0 writes the current time to sittings.json every few seconds. A killed sitting therefore counts up to its last write.
    Other ranks measure only this sitting.

    Args:
        output_dir: existing output directory of the run.
        times: stage times of this sitting.
        started: time.monotonic() at the start of this sitting.
    """

    def __init__(self, output_dir: Path, times: StageTimes, *, started: float):
        self._path, self._times, self._started = Path(output_dir) / _FILE, times, started
        self._begun = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._earlier: list[dict[str, Any]] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sittings:
        if global_rank() == 0:
            stored = read_or_set_aside(self._path, is_valid=_are_sittings, consequence="wall_seconds counts from this start")
            self._earlier = stored["sittings"] if stored else []
            self._write()
            self._thread = threading.Thread(target=self._keep_writing, name="sittings", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._write()

    @property
    def count(self) -> int:
        """Number of sittings, including this one."""
        return len(self._earlier) + 1

    def wall_seconds(self) -> float:
        """Return the wall time in seconds, summed over all sittings. This sitting counts until now."""
        return sum(sitting["seconds"] for sitting in self._all())

    def stage_seconds(self) -> dict[str, float]:
        """Return {stage: seconds}, summed over all sittings. This sitting counts until now."""
        found: dict[str, float] = {}
        for sitting in self._all():
            for stage, seconds in sitting["stages"].items():
                found[stage] = found.get(stage, 0.0) + seconds
        return found

    def _all(self) -> list[dict[str, Any]]:
        stages = self._times.so_far()  # read before `seconds`, so that the sum of the stages does not exceed it
        return [*self._earlier, {"started": self._begun, "seconds": time.monotonic() - self._started, "stages": stages}]

    def _keep_writing(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_WRITES):
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk or a renamed directory; more important writes report it
            replace_text(self._path, json.dumps({"sittings": self._all()}, indent=1) + "\n")


def _are_sittings(stored: dict[str, Any]) -> bool:
    return all(
        isinstance(seconds, int | float) and 0 <= seconds < float("inf")
        for sitting in stored["sittings"]
        for seconds in (sitting["seconds"], *sitting["stages"].values())
    )
