"""Read and write the files of an output directory. A lock ensures that only one process writes to a directory. Files are replaced
atomically, through temporary names that contain the host and process id, so that a later process can delete the temporary files of dead
processes. Files of an earlier start may be damaged and are checked when they are read. A file name that is read from another file must stay
inside the directory. Renamed directories and unwritable files raise errors that explain the cause."""

from __future__ import annotations

import datetime
import errno
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

from endprompt_megatron.errors import CheckpointError, ConfigError, DamagedFileError, OutputError

_LOCK = ".lock"
DAMAGED = ".damaged"
_LONGEST_NAME = 255  # limit of Linux file systems, in bytes
_held: dict[Path, IO[str]] = {}  # resolved directory -> open lock file
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.tmp(?P<rest>\..*)?", flags=re.DOTALL)
_in_use: set[Path] = set()  # absolute temporary paths of this process
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
CANNOT_WRITE = (*_FULL, *_FORBIDDEN)  # errno of a full disk, a read-only disk and a missing permission


def hold(output_dir: Path, *, doing: str) -> None:
    """Lock an existing directory for this process, until `release` or the end of the process. A second call has no effect.

    The lock is a kernel lock (fcntl.lockf), which network file systems forward to their server. It is released when the process ends for
    any reason and on any host, so a stale lock file never blocks. Child processes do not inherit it.

    Args:
        output_dir: the directory to lock.
        doing: verb phrase for the message if another process holds the lock, e.g. "writes there".
    Raises:
        ConfigError: another process holds the lock (the message states its host, process id and start time), or the directory is
            read-only.
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
            return  # the file system has no locks: the directory stays unprotected
        raise ConfigError(f"output_dir={output_dir}: another process {doing}{holder}. Wait for it, stop it, or set output_dir.") from None
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
        lock.flush()
    except OSError as error:
        with suppress(OSError):  # close() writes the rest of the buffer, which may fail again
            lock.close()
        raise unwritable(output_dir / _LOCK, error) from error
    _held[output_dir] = lock
    _sweep(output_dir)


def release(output_dir: Path) -> None:
    """Release the lock of `hold`. Has no effect if this process does not hold the lock."""
    lock = _held.pop(output_dir.resolve(), None)
    if lock is not None:
        lock.close()


def is_lock(path: Path) -> bool:
    """Return whether a file of an output directory is the lock file."""
    return path.name == _LOCK


def _holder(output_dir: Path) -> str:
    try:
        known: dict[str, Any] = json.loads((output_dir / _LOCK).read_text())
        return f": process {known['pid']} on {known['host']}, started {known['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def directory_problem(key: str, directory: Path) -> str | None:
    """Return an error message if a path or one of its parents is a file, otherwise None. Does not check whether the directory is writable,
    because a dry run may run on another machine.

    Args:
        key: dotted key of the path, for the message.
        directory: path to check; it may be missing.
    """
    nearest = next((path for path in (directory, *directory.absolute().parents) if os.path.lexists(path)), None)
    if nearest is not None and not nearest.is_dir():
        return f"{key}={directory}: {'this' if nearest == directory else nearest} is a file. Set {key} to a directory."
    return None


@contextmanager
def claimed(output_dir: Path, *, doing: str) -> Iterator[Path]:
    """Create the directory if necessary, and hold its lock (see `hold`) during the block.

    Args:
        output_dir: the directory to lock.
        doing: verb phrase for the message if the lock is held already.
    Raises:
        ConfigError: the directory cannot be written, or another process or another job of this process holds the lock.
        CheckpointError: the block failed because the directory was renamed or removed.
        OutputError: the disk is full.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({error}). Set output_dir to a writable directory.") from error
    if output_dir.resolve() in _held:
        raise ConfigError(f"output_dir={output_dir}: another job of this process {doing}. Wait for it, or set output_dir.")
    hold(output_dir, doing=doing)
    try:
        with explained_if_moved(output_dir):
            yield output_dir
    finally:
        release(output_dir)


def _sweep(output_dir: Path) -> None:
    """Call `sweep_leftovers` for a locked output directory and its subdirectories."""
    with suppress(OSError):
        for directory in (output_dir, *(path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink())):
            sweep_leftovers(directory, alone=True)


def check_not_moved(output_dir: Path) -> None:
    """Raise CheckpointError if the output directory no longer exists under its name."""
    if not Path(output_dir).is_dir():
        raise CheckpointError(
            f"output_dir={output_dir} was renamed or removed while the job was writing to it. Rename it back and start the same command "
            f"again: the job continues from the files in the directory."
        )


@contextmanager
def explained_if_moved(output_dir: Path) -> Iterator[None]:
    """Replace any error inside the block with the error of `check_not_moved` if the output directory no longer exists. Code in the block
    must not create the directory again."""
    try:
        yield
    except Exception as error:
        try:
            check_not_moved(output_dir)
        except CheckpointError as moved:
            raise moved from error
        raise


def make_directory(path: Path) -> Path:
    """Create a directory inside an existing one, and return its path. A file of that name is set aside (see `set_aside`).

    Raises:
        OutputError: the directory cannot be created.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        set_aside(path, "is not a directory")
    with writing(path):
        path.mkdir(exist_ok=True)
    return path


def damaged_name(path: Path, suffix: str = DAMAGED) -> Path:
    """Return the first of NAME.damaged, NAME.damaged2, ... that does not exist, or the same with another suffix."""
    number, aside = 1, path.with_name(path.name + suffix)
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{suffix}{number}")
    return aside


def set_aside(path: Path, fault: str, *, consequence: str = "") -> Path:
    """Set a damaged file or directory aside: rename it to its `damaged_name`, so that it is kept but not used again, and log a warning.

    Args:
        path: existing file or directory.
        fault: verb phrase that describes the damage, e.g. "is empty".
        consequence: main clause that states what the run does without the file.
    Returns:
        The new path.
    Raises:
        FileNotFoundError: the path does not exist; another process may have renamed it.
        OutputError: the path cannot be renamed.
    """
    aside = damaged_name(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unwritable(aside, error) from error
    # not get_logger(), because log.py imports this module
    logging.getLogger("endprompt_megatron").warning(
        f"{path} {fault}. It was renamed to {aside.name}{'; ' if consequence else ''}{consequence}."
    )
    return aside


def read_text(path: Path, *, way_out: str) -> str:
    """Return the text of a file that an earlier start wrote.

    Args:
        path: file to read.
        way_out: sentence that states what the user can do about a damaged file.
    Raises:
        DamagedFileError: the path is a directory, or the file is empty, is not UTF-8 or cannot be read.
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
        path, way_out: same as for `read_text`.
    Raises:
        DamagedFileError: see `read_text`; or the text is not JSON or not a JSON object.
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
    """Return the JSON object in a file, or None if the file is missing or damaged. Set a damaged file aside; the caller can create the file
    again.

    Args:
        path: file to read.
        is_valid: returns whether the object has the expected content; an AttributeError, KeyError, TypeError or ValueError counts as False.
        consequence: same as for `set_aside`.
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
    """Return the SHA-256 (hex) of a JSON value. A value that was written to a file and read back has the same digest."""
    as_read = json.loads(json.dumps(value))  # JSON converts keys to strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def path_inside(directory: Path, name: object) -> Path | None:
    """Return the path of a file whose name was read from another file, e.g. from an index or a checkpoint's metadata. Return None if the
    name leads out of the directory.

    Only names are compared: a symbolic link inside the directory counts as inside.

    Args:
        directory: directory in which the named file must lie.
        name: value that was read, of any type.
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
    """Replace the content of a file atomically. A concurrent reader sees either the old or the new content, never a part. A directory of
    that name is set aside.

    Raises:
        OutputError: the file cannot be written; its old content stays.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace the content of a file atomically; see `replace_text`."""
    if path.is_dir() and not path.is_symlink():
        set_aside(path, "is a directory")
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
    """Replace an OSError inside the block with an OutputError.

    Args:
        path: file or directory that the block writes.
    Raises:
        OutputError: the block raised an OSError. The message contains the path, the reason given by the system and a fix.
    """
    try:
        yield
    except OutputError:
        raise  # an inner `writing` block has already named the path
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the OutputError for a file or directory that cannot be written because of `error`. The message depends on the cause: no space,
    no permission, or another."""
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
    """Return the files of a directory except the lock and the temporary files of this module, which a start that fails early may leave."""
    return [path for path in directory.iterdir() if not is_lock(path) and _LEFTOVER.fullmatch(path.name) is None]


def temporary_name(path: Path) -> Path:
    """Return `.NAME.HOST.PID.tmp` in the directory of `path`. This process writes a file of that name and then renames it to `path`.

    HOST and PID identify this process; see `sweep_leftovers`. The caller may append a suffix that begins with a dot, e.g. to write several
    files that belong together.
    """
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    _in_use.add(temporary.absolute())
    return temporary


def final_name(temporary: Path) -> Path | None:
    """Return the path for which `temporary_name` returned this name, in this or another process. Return None for all other names, and for
    a name with a suffix."""
    match = _LEFTOVER.fullmatch(temporary.name)
    return temporary.with_name(match["name"]) if match and not match["rest"] else None


@contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """Create a directory for intermediate files in the system's temporary directory, and delete it after the block. If this process is
    killed inside the block, the next call in another process deletes the directory.

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


def sweep_leftovers(directory: Path, *, alone: bool = False) -> None:
    """Delete the temporary files and directories in `directory` whose process is dead. Files that cannot be deleted stay.

    The name `.NAME.HOST.PID.tmp`, which `temporary_name` makes, determines whether the process is dead. Both conditions must hold:

    - HOST is this host. HOST is the first 8 hex digits of the SHA-256 of the host name and the number of the pid namespace. The process
      ids of another host, or of another container with the same host name, cannot be checked here, so their files stay.
    - PID is not a running process (a zombie is not running), or PID is this process but this process did not make the name: an earlier
      process had the same id. If an unrelated new process has this id, the file stays until that process ends.

    The age of a file is not considered, because tokenising may take days.

    Args:
        directory: directory to sweep, without its subdirectories.
        alone: whether this process holds the lock of the directory. With the lock, all other processes that made temporary files here are
            dead, whatever their host, and their files are deleted. Files with a suffix stay: they belong to a dataset whose preparation
            the same command may complete.
    """
    try:
        found = [path for path in directory.iterdir() if path.name.startswith(".")]
    except OSError:
        return
    for path in found:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (alone and match["rest"]):
            continue
        if not (alone and not _is_own(path)) and not (match["host"] == _host() and _is_dead(int(match["pid"]), path)):
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
    """Return whether the process with this `owner()` is known to be dead, by the rules of `sweep_leftovers`."""
    host, _, pid = owner.partition(".")
    return host == _host() and pid.isdecimal() and not is_running(int(pid))


def _is_own(path: Path) -> bool:
    own = [name.name for name in _in_use if name.parent == path.parent.absolute()]
    return any(path.name == name or path.name.startswith(f"{name}.") for name in own)


def _is_dead(pid: int, path: Path) -> bool:
    return not _is_own(path) if pid == os.getpid() else not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process of this host runs. A zombie does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):  # /proc may be missing
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return True


@functools.cache
def _host() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]
