"""Files of an output directory: locks, so that one process writes at a time; atomic replacement; temporary names from which a later process
sees that their writer is dead; reading files of an earlier start, which may be damaged; the check of names that a file gives for other
files; and the error for a directory that was renamed."""

from __future__ import annotations

import datetime
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from endprompt_megatron.errors import CheckpointError, ConfigError, DamagedFileError

_LOCK = ".lock"
DAMAGED = ".damaged"
_LONGEST_NAME = 255  # bytes, of Linux file systems
_held: dict[Path, IO[str]] = {}  # by resolved directory
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.tmp(?P<rest>\..*)?", flags=re.DOTALL)
_in_use: set[Path] = set()  # temporary names of this process, absolute


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
        CheckpointError: the block failed because the directory was renamed or removed.
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
        with explained_if_moved(output_dir):
            yield output_dir


def check_not_moved(output_dir: Path) -> None:
    """Raise CheckpointError if an output directory is no longer where it was when the job started."""
    if not Path(output_dir).is_dir():
        raise CheckpointError(
            f"output_dir={output_dir} was renamed or removed while the job was writing to it. Give it this name again and start the same "
            f"command again: it continues from what is in there."
        )


@contextmanager
def explained_if_moved(output_dir: Path) -> Iterator[None]:
    """Turn any error inside the block into that of `check_not_moved` if the output directory is gone. Code in the block must not create the
    directory anew."""
    try:
        yield
    except Exception as error:
        try:
            check_not_moved(output_dir)
        except CheckpointError as moved:
            raise moved from error
        raise


def make_directory(path: Path) -> Path:
    """Create a directory inside an existing one, and return it. Sets a file of that name aside."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        set_aside(path, "is no directory")
    path.mkdir(exist_ok=True)
    return path


def damaged_name(path: Path, suffix: str = DAMAGED) -> Path:
    """Return the first free name of NAME.damaged, NAME.damaged2, ..., or with another suffix."""
    number, aside = 1, path.with_name(path.name + suffix)
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{suffix}{number}")
    return aside


def set_aside(path: Path, fault: str, *, consequence: str = "") -> Path:
    """Rename a damaged file or directory, so that it is kept and not used again, and log a warning.

    Args:
        path: existing file or directory.
        fault: what is wrong with it, as a verb phrase.
        consequence: what the run does without it, as a main clause.
    Returns:
        Its new path.
    """
    aside = path.rename(damaged_name(path))
    # by name: the module log imports this one
    logging.getLogger("endprompt_megatron").warning(
        f"{path} {fault}. It was renamed to {aside.name}{'; ' if consequence else ''}{consequence}."
    )
    return aside


def read_text(path: Path, *, way_out: str) -> str:
    """Return the text of a file that an earlier start wrote.

    Args:
        path: the file.
        way_out: what the user can do about a damaged file, as a sentence.
    Raises:
        DamagedFileError: it is a directory, empty, not UTF-8, or cannot be read.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DamagedFileError(path, "is a directory" if path.is_dir() else f"cannot be read ({error})", way_out) from error
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"is not UTF-8 text ({error})", way_out) from error
    if not text.strip():
        raise DamagedFileError(path, "is empty", way_out)
    return text


def read_json(path: Path, *, way_out: str) -> dict[str, Any]:
    """Return the JSON object in a file that an earlier start wrote.

    Args:
        path, way_out: as for `read_text`.
    Raises:
        DamagedFileError: as `read_text`; or it is not JSON, or not an object.
    """
    text = read_text(path, way_out=way_out)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedFileError(path, f"is not JSON ({error})", way_out) from error
    if not isinstance(value, dict):
        raise DamagedFileError(path, f"is not a JSON object but {text.strip()[:40]!r}", way_out)
    return value


def read_or_set_aside(path: Path, *, is_valid: Callable[[dict[str, Any]], bool], consequence: str) -> dict[str, Any] | None:
    """Return the JSON object in a file that can be made again; None if it is missing or damaged. Sets a damaged file aside.

    Args:
        path: the file.
        is_valid: returns whether the object has the expected content; an AttributeError, KeyError, TypeError or ValueError counts as False.
        consequence: as for `set_aside`.
    """
    if not path.exists() and not path.is_symlink():
        return None
    try:
        value = read_json(path, way_out="")
        if _holds(is_valid, value):
            return value
        fault = "does not have the content that was written"
    except DamagedFileError as error:
        fault = error.fault
    with suppress(FileNotFoundError):  # another process set it aside
        set_aside(path, fault, consequence=consequence)
    return None


def _holds(is_valid: Callable[[dict[str, Any]], bool], value: dict[str, Any]) -> bool:
    try:
        return is_valid(value)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value. Equal for a value that was written to a file and read back."""
    as_read = json.loads(json.dumps(value))  # its keys are strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


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
    """Replace the content of a file atomically. A concurrent reader sees the old or the new content, never a part. Sets a directory of that
    name aside."""
    if path.is_dir() and not path.is_symlink():
        set_aside(path, "is a directory")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def temporary_name(path: Path) -> Path:
    """Return the name `.NAME.HOST.PID.tmp` beside `path`, under which this process writes what it then renames to `path`.

    HOST and PID are those of this process, see `sweep_leftovers`. Files that belong together may append an ending that begins with a dot.
    """
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    _in_use.add(temporary.absolute())
    return temporary


def final_name(temporary: Path) -> Path | None:
    """Return the path for which `temporary_name` made this name (any process's, without an ending); None for any other name."""
    match = _LEFTOVER.fullmatch(temporary.name)
    return temporary.with_name(match["name"]) if match and not match["rest"] else None


@contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """Create a directory for intermediate files in the system's temporary directory, and delete it after the block. If this process is
    killed in the block, the next call in another process deletes it.

    Args:
        name: part of the directory's name.
    """
    parent = Path(tempfile.gettempdir())
    sweep_leftovers(parent)
    beginning = temporary_name(parent / name)
    scratch = Path(tempfile.mkdtemp(prefix=f"{beginning.name}.", dir=parent))
    _in_use.add(scratch.absolute())
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep_leftovers(directory: Path) -> None:
    """Delete the temporary files and directories in `directory` whose process is dead. No effect where that is not allowed.

    A process is known to be dead from the name `.NAME.HOST.PID.tmp` alone, which `temporary_name` makes:

    - HOST is this host: the first 8 hex digits of SHA-256 of the host name and the number of the pid namespace. Process ids of another
      host, or of another container with the same host name, say nothing, so their files stay.
    - PID is no running process (a zombie does not run), or it is this process, which did not make the name: an earlier process had the same
      id. A file whose PID belongs to an unrelated new process stays until that one ends.

    The age of a file is not considered: tokenising may take days.
    """
    try:
        found = [path for path in directory.iterdir() if path.name.startswith(".")]
    except OSError:
        return
    for path in found:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or match["host"] != _host() or not _is_dead(int(match["pid"]), path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def owner() -> str:
    """Return `HOST.PID` of this process, as in `temporary_name`."""
    return f"{_host()}.{os.getpid()}"


def is_dead(owner: str) -> bool:
    """Whether the process that had `owner()` is known to be dead, by the rules of `sweep_leftovers`."""
    host, _, pid = owner.partition(".")
    return host == _host() and pid.isdecimal() and not is_running(int(pid))


def _is_dead(pid: int, path: Path) -> bool:
    if pid != os.getpid():
        return not is_running(pid)
    own = [name.name for name in _in_use if name.parent == path.parent.absolute()]
    return not any(path.name == name or path.name.startswith(f"{name}.") for name in own)


def is_running(pid: int) -> bool:
    """Whether a process of this host runs. A zombie does not."""
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
