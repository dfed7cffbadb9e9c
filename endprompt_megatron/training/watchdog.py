"""Ends a job in which a rank no longer makes progress, and says where it stands: a cluster bills a hung job like a working one."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from endprompt_megatron.errors import EXIT_HUNG
from endprompt_megatron.log import get_logger, global_rank


class Watchdog:
    """A thread that ends this process when `beat` has not been called for a while. Use as a context manager.

    Args:
        seconds: longest time between two beats; 0 watches nothing.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._beaten = time.monotonic()
        self._doing = "start"
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat(self._doing)
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` says what comes next, for the message."""
        self._beaten, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._beaten > self.seconds:
                get_logger().error(
                    f"rank {global_rank()} has not finished {self._doing} within launch.hang_timeout_minutes={self.seconds / 60:g} and "
                    f"ends the job (exit status {EXIT_HUNG}). Where it stands follows; the rank that waits for no other is the one to "
                    f"look at. Start the same command again to resume; set a longer time if a step really takes that long."
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HUNG)
