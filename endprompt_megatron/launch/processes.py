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
from endprompt_megatron.output_files import is_dead, is_running, owner, sweep_leftovers, temporary_name

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


def end_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent ends. This works on Linux and has no effect on other systems.

    Args:
        parent: process id of the parent. If the parent has already ended, which the kernel does not report, this process ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and not is_running(parent):
        os._exit(1)


def ignore_stop_signals() -> None:
    """Ignore stop signals in a helper process. The parent handles the signals, and needs its helpers to finish a step and to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def serve_parent(worker: int = 0) -> None:
    """Make this helper process end with its parent and ignore stop signals.

    Args:
        worker: number of the worker, which torch's DataLoader passes to its worker_init_fn; unused.
    """
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)
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
    """Create multiprocessing's temporary directory, which holds the sockets of helper processes, with a record that this process owns it.

    It is `pymp-*` in the system's temporary directory. Call this function before the first helper starts: helpers then use this directory
    instead of their own, and one that is killed leaves none. Python deletes the directory when this process exits, unless it is killed. No
    effect in a process that has such a directory already, which it may have inherited from the process that started it.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined] # of util.get_temp_dir
    if config.get("tempdir") is not None:
        return
    parent = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):  # util.get_temp_dir raises it
        new = Path(tempfile.mkdtemp(prefix=f"{temporary_name(parent / 'pymp').name}.", dir=parent))
        (new / _OWNER).write_text(owner())
        # complete before it has its name, so that a crash leaves no directory without an owner; the rest as in util.get_temp_dir (Python
        # 3.11-3.14), whose names are as short: the path of a socket may have 107 bytes
        directory = str(new.rename(parent / f"pymp-{new.name[-8:]}"))
        util.Finalize(None, _delete, args=(Path(directory),), exitpriority=-100)
        config["tempdir"] = directory


def sweep_multiprocessing_directories() -> None:
    """Delete the temporary directories of multiprocessing whose owner is dead.

    The owner is the process that `own_multiprocessing_directory` recorded in the directory. The owner counts as dead by the rules of
    `output_files.is_dead`. Directories without a record belong to other programs and are kept. Directories of other users are kept too.
    """
    sweep_leftovers(Path(tempfile.gettempdir()))
    for directory in Path(tempfile.gettempdir()).glob("pymp-*"):
        with contextlib.suppress(OSError, ValueError):
            if not directory.is_symlink() and directory.stat().st_uid == os.getuid() and is_dead((directory / _OWNER).read_text()):
                _delete(directory)


def _delete(directory: Path) -> None:
    """Delete a directory under a name that `sweep_leftovers` knows, because the record of its owner may be deleted first."""
    with contextlib.suppress(OSError):
        shutil.rmtree(directory.rename(temporary_name(directory)), ignore_errors=True)
