"""Requests to stop: SIGTERM and SIGUSR1, which Slurm, Kubernetes and `kill` send before they take a machine away. Training finishes its
step, writes a checkpoint and ends with exit status 75 ("resume me"); every other phase of a run can be repeated and ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from endprompt_megatron.errors import RunInterrupted
from endprompt_megatron.launch.processes import STOP_SIGNALS
from endprompt_megatron.mcore.runtime import agree_on_any


class StopRequests:
    """What the process was asked, and when it obeys. As a context manager it takes the signals over and gives them back.

    Outside `at_a_good_moment()` a signal raises RunInterrupted where the process stands; inside it is remembered. One that comes after
    that is ignored: a worker is often told twice, by Slurm and by its launcher, and is tidying up by then.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other thread
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if not self._deferred:
            self._obey()

    def _obey(self) -> None:
        raise RunInterrupted(f"stopped by {self.received.name}; start the same command again: it goes on where it stood")

    @contextmanager
    def at_a_good_moment(self) -> Iterator[None]:
        """Inside the block signals are only remembered; ask `anyone_asked` between two steps. One that came after the last question is
        obeyed at the block's end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            self._obey()

    def anyone_asked(self, device: torch.device) -> bool:
        """Whether some rank was asked to stop; all ranks call it together and get the same answer."""
        return agree_on_any(self.received is not None, device)
