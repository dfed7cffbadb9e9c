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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`, also where the block fails."""
        started = time.monotonic()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - started
