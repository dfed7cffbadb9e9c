"""A process's part in the end of a run: whom it follows, and what it does about signals, before training has handlers of its own and in the
processes that a run starts beside itself."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

from endprompt_megatron.errors import EXIT_RESUME

# What asks a run to stop. Slurm sends it to every process of a job step, helpers included.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def obey_stop_signals() -> None:
    """From the first import on: a request to stop ends this process with the status that says "start me again". Python's own answer would
    be a death by that signal, which nobody can tell from a crash. training.signals takes over once there is something to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    """Signal handler. It may come within any import, so it neither raises nor touches a stream that may be in use."""
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {name} with nothing to save; start the same command again\n".encode())
    os._exit(EXIT_RESUME)


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends (Linux; no effect elsewhere)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def outlast_stop_signals(worker: int = 0) -> None:
    """In a helper process: leave it to the parent to stop, which still needs its helpers to finish a step and to save.

    Args:
        worker: its number, where a loader passes one.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def serve_parent() -> None:
    """In a helper process that serves its parent and nobody else: live exactly as long."""
    end_with_parent()
    outlast_stop_signals()


@contextlib.contextmanager
def starting_helpers() -> Iterator[None]:
    """Inside the block this process holds stop signals back, and so do the processes that it starts there, for good: one that is told to
    stop while it still imports would die before it can `serve_parent`. What comes for this process is heard at the block's end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's own helper; to start it lets SIGTERM through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def kill_helpers_at_exit() -> None:
    """In a process with helpers that outlast stop signals: kill those that are left when it exits. Python's own exit asks them to end
    with SIGTERM, which they ignore, and then waits for them for good."""
    atexit.register(_kill_helpers)  # after multiprocessing's own, which therefore runs later


def _kill_helpers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
