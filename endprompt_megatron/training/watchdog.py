"""End a job with a message if a rank makes no progress or another rank has failed. Without this check, a hung job would occupy its
nodes."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from endprompt_megatron.errors import EXIT_HUNG, EXIT_USER_ERROR, OutputError
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore.failures import FailureBoard


class Watchdog:
    """Context manager that ends this process if `beat` is not called in time or if another rank has failed. A thread runs both checks. If
    another rank has failed, this rank may wait for it in a collective, and only the end of the process interrupts a collective. The context
    manager publishes an OutputError of its block on the board.

    Args:
        seconds: longest time between two calls of `beat`; 0 means no limit.
        failures: board on which ranks record their failures; None disables the check for failed ranks.
    """

    def __init__(self, seconds: float, failures: FailureBoard | None = None):
        self.seconds, self.failures = seconds, failures
        self._beaten = time.monotonic()
        self._doing = "start"
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat(self._doing)
        if self.seconds > 0 or self.failures is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._ended.set()
        if isinstance(error, OutputError) and self.failures is not None:  # usually of rank 0, which writes alone
            raise OutputError(self.failures.publish(str(error), error=OutputError.__name__)) from error

    def beat(self, doing: str) -> None:
        """Report progress. `doing` names the activity that begins now, for the error message."""
        self._beaten, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4) if self.seconds > 0 else 1.0):
            failure = self.failures.read() if self.failures is not None else None
            if failure is not None and not failure.startswith(f"rank {global_rank()}:"):
                self._ended.wait(2.0)  # this rank may report the failure itself
                if not self._ended.is_set():
                    self._end_with(failure)
            if self.seconds > 0 and time.monotonic() - self._beaten > self.seconds:
                get_logger().error(
                    f"rank {global_rank()} has not finished {self._doing} within launch.hang_timeout_minutes={self.seconds / 60:g} and "
                    f"ends the job (exit status {EXIT_HUNG}). Its stack traces follow; the cause is on the rank that does not wait in a "
                    f"collective. Start the same command again to resume, and raise launch.hang_timeout_minutes if a step takes longer."
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HUNG)

    def _end_with(self, failure: str) -> None:
        assert self.failures is not None
        sys.stderr.write(f"{self.failures.error}: {failure}\n")
        sys.stderr.flush()
        self.failures.acknowledge()
        os._exit(EXIT_USER_ERROR)
