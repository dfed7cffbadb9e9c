"""Processes that a run starts beside itself, and their end: they follow their parent, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import signal

# What asks a run to stop. Slurm sends it to every process of a job step, helpers included.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


@functools.cache
def kill_helpers_at_exit() -> None:
    """In a process with helpers that outlast stop signals: kill those that are left when it exits. Python's own exit asks them to end
    with SIGTERM, which they ignore, and then waits for them for good."""
    atexit.register(_kill_helpers)  # after multiprocessing's own, which therefore runs later


def _kill_helpers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
