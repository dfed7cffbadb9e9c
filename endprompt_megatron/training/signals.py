"""Handle the stop signals SIGTERM and SIGUSR1, which Slurm, Kubernetes and `kill` send before they end a job. Training finishes its step,
writes a checkpoint and exits with status 75 (resume). Every other phase of a run can be repeated, so it ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from endprompt_megatron.errors import RunInterrupted
from endprompt_megatron.launch.processes import STOP_SIGNALS
from endprompt_megatron.mcore.runtime import agree_on_any


class StopRequests:
    """Records stop signals. The context manager installs signal handlers and restores the previous handlers at the end.

    Outside `deferred()`, a signal raises RunInterrupted at once. Inside `deferred()`, the signal is only recorded. Further signals are
    ignored, because a worker often receives one signal from Slurm and one from its launcher, and is already shutting down when the second
    arrives.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Python runs signal handlers in the main thread only
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if not self._deferred:
            self._interrupt()

    def _interrupt(self) -> None:
        assert self.received is not None
        raise RunInterrupted(f"stopped by {self.received.name}; start the same command again to resume")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block. The caller checks `received_on_any_rank` between steps. If a signal was recorded, the end
        of the block raises RunInterrupted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            self._interrupt()

    def received_on_any_rank(self, device: torch.device) -> bool:
        """Return whether any rank has received a stop signal. All ranks must call this method, and all get the same result."""
        return agree_on_any(self.received is not None, device)
