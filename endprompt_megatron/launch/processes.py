"""Control how a run and its helper processes end and handle stop signals. Training later replaces the signal handlers of the run."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker, util
from pathlib import Path
from types import FrameType

from endprompt_megatron.errors import EXIT_RESUME
from endprompt_megatron.output_files import is_dead, owner

# Signals that stop a run. Slurm sends them to every process of a job step, including helpers.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OWNER = "owner"  # file in a temporary directory of multiprocessing


def exit_on_stop_signals() -> None:
    """Install handlers that exit with the status EXIT_RESUME on a stop signal. Call this function before other imports. Without it, a stop
    signal would kill the process, and the scheduler would report a crash. training.signals replaces the handlers once the run has something
    to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    """Report the signal and exit. A signal can interrupt an import, so this handler neither raises an exception nor writes to a stream that
    may be locked."""
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {name} with nothing to save; start the same command again\n".encode())
    os._exit(EXIT_RESUME)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends. This works on Linux and has no effect on other systems."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore stop signals in a helper process. The parent handles the signals, and needs its helpers to finish a step and to save.

    Args:
        worker: number of the worker, which torch's DataLoader passes to its worker_init_fn; unused.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def serve_parent() -> None:
    """Make this helper process end with its parent and ignore stop signals."""
    end_with_parent()
    ignore_stop_signals()


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block stop signals in a `with` block that starts helper processes. Helpers inherit the blocked signals and keep them blocked, so that
    a signal during their imports cannot kill them before they call `serve_parent`. This process receives pending signals at the end of the
    block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # starting this helper of multiprocessing unblocks SIGTERM, so block the signals again below
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def kill_helpers_at_exit() -> None:
    """Register a handler that kills the helper processes when this process exits. The helpers ignore the SIGTERM that Python sends at exit,
    so Python would wait for them forever."""
    atexit.register(_kill_helpers)  # atexit runs handlers in reverse order, so this handler runs before multiprocessing's own


def _kill_helpers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@functools.cache
def own_multiprocessing_directory() -> None:
    """Record this process as the owner of multiprocessing's temporary directory, `pymp-*` in the system's temporary directory, which holds
    the sockets of helper processes. Call it before the first helper starts: helpers then use this directory instead of their own, and one
    that is killed leaves none. Python deletes the directory when this process exits, unless it is killed. No effect in a process that was
    started with multiprocessing and inherited the directory, which belongs to the process that created it."""
    # the entry that util.get_temp_dir reads (Python 3.11-3.14)
    known = multiprocessing.process.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if known is not None and multiprocessing.parent_process() is not None:
        return
    with contextlib.suppress(OSError), Path(util.get_temp_dir(), _OWNER).open("x") as record:
        record.write(owner())


def sweep_multiprocessing_directories() -> None:
    """Delete the temporary directories of multiprocessing whose owner is dead.

    The owner is the process that `own_multiprocessing_directory` recorded in the directory; `output_files.sweep_leftovers` says when it is
    known to be dead. A directory without a record stays: it belongs to another program. So does one of another user.
    """
    for directory in Path(tempfile.gettempdir()).glob("pymp-*"):
        with contextlib.suppress(OSError, ValueError):
            if not directory.is_symlink() and directory.stat().st_uid == os.getuid() and is_dead((directory / _OWNER).read_text()):
                shutil.rmtree(directory, ignore_errors=True)
