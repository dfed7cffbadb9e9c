"""Wall time of a run over all its sittings: a run that is stopped and started again has several. sittings.json keeps the time of each, also
of those that a crash ended."""

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
    """Counts the time of this sitting, and adds it to that of earlier ones. Use as a context manager.

    A thread of rank 0 writes the time so far every few seconds, so that a killed sitting counts up to its last write. Other ranks know of
    this sitting only.

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
        """Number of sittings, this one included."""
        return len(self._earlier) + 1

    def wall_seconds(self) -> float:
        """Seconds from start to end, summed over sittings; for this one until now."""
        return sum(sitting["seconds"] for sitting in self._all())

    def stage_seconds(self) -> dict[str, float]:
        """{stage: seconds}, summed over sittings; for this one until now."""
        found: dict[str, float] = {}
        for sitting in self._all():
            for stage, seconds in sitting["stages"].items():
                found[stage] = found.get(stage, 0.0) + seconds
        return found

    def _all(self) -> list[dict[str, Any]]:
        stages = self._times.so_far()  # before the seconds, so that their sum is not more
        return [*self._earlier, {"started": self._begun, "seconds": time.monotonic() - self._started, "stages": stages}]

    def _keep_writing(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_WRITES):
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # of a full disk or a renamed directory: what matters more reports it
            replace_text(self._path, json.dumps({"sittings": self._all()}, indent=1) + "\n")


def _are_sittings(stored: dict[str, Any]) -> bool:
    return all(
        isinstance(seconds, int | float) and 0 <= seconds < float("inf")
        for sitting in stored["sittings"]
        for seconds in (sitting["seconds"], *sitting["stages"].values())
    )
