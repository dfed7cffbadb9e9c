"""Locks on output directories, so that one process writes at a time, atomic replacement of files, names of temporary files from which a
later process sees that their writer is dead, and the error for what cannot be written."""

from __future__ import annotations

import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from endprompt_megatron.errors import ConfigError, OutputError

_LOCK = ".lock"
_held: dict[Path, IO[str]] = {}  # by resolved directory
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.tmp(?P<rest>\..*)?", flags=re.DOTALL)
_in_use: set[Path] = set()  # temporary names of this process, absolute
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
CANNOT_WRITE = (*_FULL, *_FORBIDDEN)  # errno of a disk that is full, read-only or not ours


def hold(output_dir: Path, *, doing: str) -> None:
    """Lock an existing directory for this process, until `release` or the end of the process. A second call has no effect.

    The lock is a kernel lock (fcntl.lockf), which network file systems forward to their server. It is released when the process ends for
    any reason and on any host, so a stale lock file never blocks. Child processes do not inherit it.

    Args:
        output_dir: the directory to lock.
        doing: verb phrase for the message if another process holds the lock, such as "writes there".
    Raises:
        ConfigError: another process holds the lock (the message has its host, process id and start time), or the directory is read-only.
        OutputError: the disk is full.
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
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
        lock.flush()
    except OSError as error:
        with suppress(OSError):  # closing writes the rest of the buffer
            lock.close()
        raise unwritable(output_dir / _LOCK, error) from error
    _held[output_dir] = lock
    _sweep(output_dir)


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
        except OSError:  # a file system without locks: the directory stays unprotected
            pass
        else:
            _sweep(output_dir)
        yield output_dir


def _sweep(output_dir: Path) -> None:
    """Sweep a locked output directory and its subdirectories."""
    with suppress(OSError):
        for directory in (output_dir, *(path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink())):
            sweep_leftovers(directory, alone=True)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically. A concurrent reader sees the old or the new content, never a part.

    Raises:
        OutputError: the file cannot be written; its old content stays.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace the content of a file, as `replace_text`."""
    temporary = temporary_name(path)
    with writing(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # frees its disk space
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError that names the file or directory which the block writes.

    Args:
        path: the file or directory.
    Raises:
        OutputError: with the path, the system's reason and what to do.
    """
    try:
        yield
    except OutputError:
        raise  # of a path inside this one
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error for a file or directory that an OSError kept from being written, by its reason: no space, no permission, or another."""
    if error.errno in _FULL:
        way_out = "Free space on its disk, or raise the quota"
    elif error.errno in _FORBIDDEN:
        way_out = f"Make {Path(path).parent} writable, or name another directory"
    else:
        way_out = "Remove the cause"
    return OutputError(
        f"{path} could not be written ({error}). {way_out}, and start the same command again: it continues with what is there."
    )


def foreign_files(directory: Path) -> list[Path]:
    """Files of a directory that are neither its lock nor temporary files of this module: what a start that failed at once leaves there does
    not count."""
    return [path for path in directory.iterdir() if not is_lock(path) and _LEFTOVER.fullmatch(path.name) is None]


def temporary_name(path: Path) -> Path:
    """Return the name `.NAME.HOST.PID.tmp` beside `path`, under which this process writes what it then renames to `path`.

    HOST and PID are those of this process, see `sweep_leftovers`. Files that belong together may append an ending that begins with a dot.
    """
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    _in_use.add(temporary.absolute())
    return temporary


def sweep_leftovers(directory: Path, *, alone: bool = False) -> None:
    """Delete the temporary files and directories in `directory` whose process is dead. No effect where that is not allowed.

    A process is known to be dead from the name `.NAME.HOST.PID.tmp` alone, which `temporary_name` makes:

    - HOST is this host: the first 8 hex digits of SHA-256 of the host name and the number of the pid namespace. Process ids of another
      host, or of another container with the same host name, say nothing, so their files stay.
    - PID is no running process (a zombie does not run), or it is this process, which did not make the name: an earlier process had the same
      id. A file whose PID belongs to an unrelated new process stays until that one ends.

    The age of a file is not considered: tokenising may take days.

    Args:
        directory: directory to sweep, without its subdirectories.
        alone: this process holds the lock of the directory, so every temporary file that is not its own is of a dead process, of any host.
    """
    try:
        found = [path for path in directory.iterdir() if path.name.startswith(".")]
    except OSError:
        return
    for path in found:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not ((alone and not _is_own(path)) or (match["host"] == _host() and _is_dead(int(match["pid"]), path))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_own(path: Path) -> bool:
    own = [name.name for name in _in_use if name.parent == path.parent.absolute()]
    return any(path.name == name or path.name.startswith(f"{name}.") for name in own)


def _is_dead(pid: int, path: Path) -> bool:
    return not _is_own(path) if pid == os.getpid() else not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):  # no /proc
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return True


@functools.cache
def _host() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]
