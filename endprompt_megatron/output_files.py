"""Output directories that one process writes at a time, and files that nobody ever sees half written."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from endprompt_megatron.errors import ConfigError

_LOCK = ".lock"
_held: dict[Path, IO[str]] = {}  # by resolved directory


def hold(output_dir: Path, *, doing: str) -> None:
    """Take a directory that exists for this process, until `release` or until the process ends; a second call changes nothing.

    The lock is the kernel's (fcntl.lockf), which a network file system passes on to its server: it ends with its process, however that ends
    and on whatever host, so that a lock that is left over never blocks. Child processes do not inherit it.

    Args:
        output_dir: to write into.
        doing: what another process would be doing there, in words.
    Raises:
        ConfigError: another process has it, with its host, process id and start time; or the lock cannot be written.
    """
    output_dir = output_dir.resolve()
    if output_dir in _held:
        return
    try:
        lock = (output_dir / _LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({error}). Set output_dir to a writable directory.") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(output_dir)
        lock.close()
        if not isinstance(error, BlockingIOError | PermissionError):
            return  # a file system without locks: nothing protects the directory there
        raise ConfigError(f"output_dir={output_dir}: another process {doing}{holder}. Wait for it, stop it, or set output_dir.") from None
    lock.truncate(0)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
    lock.flush()
    _held[output_dir] = lock


def release(output_dir: Path) -> None:
    """Give back what `hold` took; nothing where it was not taken."""
    lock = _held.pop(output_dir.resolve(), None)
    if lock is not None:
        lock.close()


def is_lock(path: Path) -> bool:
    """Whether a file of an output directory is no output but the mark of who writes there."""
    return path.name == _LOCK


def _holder(output_dir: Path) -> str:
    try:
        known: dict[str, Any] = json.loads((output_dir / _LOCK).read_text())
        return f": process {known['pid']} on {known['host']}, started {known['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def claimed(output_dir: Path, *, doing: str) -> Iterator[Path]:
    """The directory, made where it is not there, for this process alone.

    Args:
        output_dir: to write into.
        doing: what another process would be doing there, in words.
    Raises:
        ConfigError: it cannot be written, or another process has it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({error}). Set output_dir to a writable directory.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output_dir={output_dir}: another process {doing}. Wait for it, or stop it.") from None
        yield output_dir


def replace_text(path: Path, text: str) -> None:
    """Put the text under the name at once: who reads sees all of it, or what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
