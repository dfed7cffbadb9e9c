"""Wall time of a job by named stage, for summary.json and the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimes:
    """Sums wall time by stage. Stages are in the order in which they first began.

    Attributes:
        seconds: {stage: wall time in seconds}. The time of a running stage is added at its end.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}  # running stage -> its start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the stage `name`, also if the block fails."""
        started = time.monotonic()
        self.seconds.setdefault(name, 0.0)
        self._open[name] = started
        try:
            yield
        finally:
            del self._open[name]
            self.seconds[name] += time.monotonic() - started

    def so_far(self) -> dict[str, float]:
        """Return {stage: wall time in seconds}. A running stage counts until now. Another thread may call this method."""
        now, under_way = time.monotonic(), dict(self._open)
        return {stage: seconds + (now - under_way[stage] if stage in under_way else 0.0) for stage, seconds in dict(self.seconds).items()}
