"""A disk that refuses one operation: `DiskFault` counts what this process writes under a directory, and lets one of these operations fail.

A refused operation raises an OSError of a read-only disk. A file that was opened may also be on a full disk: every write to it fails, as late
as its buffer is flushed, or its fsync fails, as on a network's disk. chmod cannot show this, because root may write everywhere.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FULL, READ_ONLY = "full", "read-only"
OF_NOTHING = (
    "write .lock",
    "write model.safetensors.note.tmp",
    "write endprompt_seed1.log",
)  # operations that write an empty file, which fits on a full disk
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


class DiskFault:
    """Inside the `with` block, the operation number `at` under `root` fails, and fsync does nothing, which saves time.

    Args:
        root: directory; what is written elsewhere does not count.
        at: number from 0 of the operation; None lets none fail.
        lasting: all later operations fail too.
    Attributes:
        operations: what was written, e.g. ("open config.json", "read-only").
    """

    def __init__(self, root: Path, at: int | None = None, *, lasting: bool = False):
        self.root, self.at, self.lasting = os.path.abspath(root), at, lasting
        self.operations: list[tuple[str, str]] = []

    def __enter__(self) -> DiskFault:
        self._patches = pytest.MonkeyPatch()
        opened = self._opening(io.open)
        for owner, name, patched in (
            (io, "open", opened),
            (builtins, "open", opened),
            (os, "open", self._opening_descriptor(os.open)),
            (os, "fsync", self._sync),
            *((os, name, self._naming(name, getattr(os, name))) for name in ("mkdir", "rename", "replace")),
        ):
            self._patches.setattr(owner, name, patched)
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.undo()

    def _counts(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.root)

    def _fails(self, operation: str, path: Any, kind: str) -> bool:
        number = len(self.operations)
        self.operations.append((f"{operation} {Path(path).name}", kind))
        return self.at is not None and (number == self.at or (self.lasting and number > self.at))

    def _refuse(self, path: Any) -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def _naming(self, name: str, original: Callable) -> Callable:
        def patched(path: Any, *arguments: Any, **options: Any) -> Any:
            if self._counts(path) and self._fails(name, path, READ_ONLY):
                raise self._refuse(path)
            return original(path, *arguments, **options)

        return patched

    def _sync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if self._counts(path) and self._fails("fsync", path, FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _opening(self, original: Callable) -> Callable:
        def patched(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not (self._counts(path) and set(mode) & set("wax+")):
                return original(path, mode, *arguments, **options)
            if self._fails("open", path, READ_ONLY):
                raise self._refuse(path)
            file = original(path, mode, *arguments, **options)
            if "+" not in mode and self._fails("write", path, FULL):  # /dev/full cannot be truncated
                fill(file.fileno())
            return file

        return patched

    def _opening_descriptor(self, original: Callable) -> Callable:
        def patched(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not (self._counts(path) and flags & _WRITE_FLAGS):
                return original(path, flags, *arguments, **options)
            if self._fails("open", path, READ_ONLY):
                raise self._refuse(path)
            return original(path, flags, *arguments, **options)

        return patched


def fill(descriptor: int) -> None:
    """Let every write to an open file fail as on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)


def fill_open_file(path: Path) -> None:
    """As `fill`, for the file that this process has open, or for an open file in that directory."""
    opened = [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if Path(os.path.realpath(entry)).is_relative_to(path.resolve())]
    assert opened, path
    for descriptor in opened:
        fill(descriptor)


def operations_of(write: Callable[[], object], root: Path) -> list[tuple[str, str]]:
    """What `write` writes under `root`."""
    with DiskFault(root) as counted:
        write()
    return counted.operations
