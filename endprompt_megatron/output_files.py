"""Locks on output directories, so that one process writes at a time, atomic replacement of text files, and the check of names that a file
gives for other files."""

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
_LONGEST_NAME = 255  # bytes, of Linux file systems
_held: dict[Path, IO[str]] = {}  # by resolved directory


def hold(output_dir: Path, *, doing: str) -> None:
    """Lock an existing directory for this process, until `release` or the end of the process. A second call has no effect.

    The lock is a kernel lock (fcntl.lockf), which network file systems forward to their server. It is released when the process ends for
    any reason and on any host, so a stale lock file never blocks. Child processes do not inherit it.

    Args:
        output_dir: the directory to lock.
        doing: verb phrase for the message if another process holds the lock, such as "writes there".
    Raises:
        ConfigError: another process holds the lock (the message has its host, process id and start time), or the lock file cannot be
            written.
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
            return  # a file system without locks: the directory stays unprotected
        raise ConfigError(f"output_dir={output_dir}: another process {doing}{holder}. Wait for it, stop it, or set output_dir.") from None
    lock.truncate(0)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
    lock.flush()
    _held[output_dir] = lock


def release(output_dir: Path) -> None:
    """Release the lock of `hold`. No effect without one."""
    lock = _held.pop(output_dir.resolve(), None)
    if lock is not None:
        lock.close()


def is_lock(path: Path) -> bool:
    """Whether a file of an output directory is the lock file."""
    return path.name == _LOCK


def _holder(output_dir: Path) -> str:
    try:
        known: dict[str, Any] = json.loads((output_dir / _LOCK).read_text())
        return f": process {known['pid']} on {known['host']}, started {known['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def claimed(output_dir: Path, *, doing: str) -> Iterator[Path]:
    """Create the directory if necessary, and lock it inside the block.

    Args:
        output_dir: the directory to lock.
        doing: verb phrase for the message if another process holds the lock.
    Raises:
        ConfigError: the directory cannot be written, or another process holds the lock.
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


def path_inside(directory: Path, name: object) -> Path | None:
    """Path of a file that another file names, e.g. an index or a checkpoint's metadata; None if the name leads out of the directory.

    Compares names only: a symbolic link inside the directory counts as inside.

    Args:
        directory: directory in which the named file must lie.
        name: value as read, of any type.
    Returns:
        `directory / name`; None unless the name is a non-empty relative path without `..`.
    """
    if not isinstance(name, str) or "\0" in name:
        return None
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
        return None
    return Path(directory) / name


def replace_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically. A concurrent reader sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
