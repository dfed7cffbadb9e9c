"""Lifetime and stop signals of processes: of a run before training installs its own handlers, and of the helper processes that a run
starts."""

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

# Signals that stop a run. Slurm sends them to every process of a job step, including helpers.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def exit_on_stop_signals() -> None:
    """Exit with the status EXIT_RESUME on a stop signal. Call it before other imports. By default the signal would kill the process, which
    looks like a crash to the scheduler. training.signals replaces the handlers once there is something to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    """Signal handler. It may run in the middle of an import, so it neither raises nor uses a stream that may be locked."""
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {name} with nothing to save; start the same command again\n".encode())
    os._exit(EXIT_RESUME)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux; no effect on other systems)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore stop signals in a helper process. Its parent handles them and needs its helpers to finish a step and to save.

    Args:
        worker: number of the worker; unused, for worker_init_fn of torch's DataLoader.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def serve_parent() -> None:
    """In a helper process: end together with the parent and ignore stop signals."""
    end_with_parent()
    ignore_stop_signals()


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block stop signals inside the block, for starting helper processes. Helpers inherit the blocked signals and keep them blocked;
    otherwise a signal during their imports would kill them before they call `serve_parent`. This process receives pending signals at the
    end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's own helper; starting it unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def kill_helpers_at_exit() -> None:
    """Kill helper processes that ignore stop signals when this process exits. Python's exit would send them SIGTERM, which they ignore, and
    then wait for them forever."""
    atexit.register(_kill_helpers)  # registered after multiprocessing's own handler, so it runs before that one


def _kill_helpers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
