"""Where the wall time of a job goes: seconds by named stage, for summary.json and the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimes:
    """Sums seconds by stage, in the order in which stages first began.

    Attributes:
        seconds: {stage: wall seconds}.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}  # stage under way -> its start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`, also where the block fails."""
        started = time.monotonic()
        self.seconds.setdefault(name, 0.0)
        self._open[name] = started
        try:
            yield
        finally:
            del self._open[name]
            self.seconds[name] += time.monotonic() - started

    def so_far(self) -> dict[str, float]:
        """{stage: wall seconds}, of the stage under way until now. May be called in another thread."""
        now, under_way = time.monotonic(), dict(self._open)
        return {stage: seconds + (now - under_way[stage] if stage in under_way else 0.0) for stage, seconds in dict(self.seconds).items()}
