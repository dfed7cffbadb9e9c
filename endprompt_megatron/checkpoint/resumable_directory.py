"""A directory that is made file by file beside its final name, goes on after a kill where it stood, and is renamed when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.training_directory import sync_path
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger

_IDENTITY = "conversion.json"
_NOTE = ".note.json"


class Workspace:
    """Use as a context manager; leave it by `finish`.

    Args:
        destination: the directory to make; must not exist.
        identity: what is being made, JSON; leftovers of a kill are used again only where it is the same.
        sync: whether the directory gets its name only when all of it is on the disk.
    Raises:
        CheckpointError: destination exists, cannot be written, or another process is making it.
    """

    def __init__(self, destination: Path, identity: dict[str, Any], *, sync: bool = True):
        self._wait = sync
        self.destination = Path(os.path.abspath(destination))
        self.partial = self.destination.with_name(self.destination.name + ".partial")
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        self._refuse_existing()
        try:
            self._refuse_what_is_not_ours()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / _IDENTITY, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._refuse_existing()  # another process may have ended just now
            stored = (self.partial / _IDENTITY).read_text()
        except BlockingIOError as error:
            raise CheckpointError(f"{self.partial} is being written by another process: wait for it, or stop it.") from error
        except OSError as error:
            raise CheckpointError(f"{self.partial} cannot be written ({error}). Name a directory that can.") from error
        if stored != self._identity:
            for path in self.partial.iterdir():
                if path.name != _IDENTITY:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, self._identity.encode(), 0)
            os.fsync(self._lock)
        elif kept := [path for path in self.partial.iterdir() if path.name != _IDENTITY and not path.name.endswith((".tmp", _NOTE))]:
            get_logger().info(f"going on with {self.partial}: {len(kept)} file(s) of an interrupted conversion are whole")
        return self

    def _refuse_existing(self) -> None:
        if self.destination.exists():
            raise CheckpointError(f"{self.destination} exists: nothing is overwritten. Remove it, or name another directory.")

    def _refuse_what_is_not_ours(self) -> None:
        """Leftovers are emptied only where an interrupted conversion left them."""
        if not self.partial.exists() or not any(path.name != _IDENTITY for path in self.partial.iterdir()):
            return
        try:
            ours = "format" in json.loads((self.partial / _IDENTITY).read_text())
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise CheckpointError(f"{self.partial} is in the way and no interrupted conversion: move it, or name another destination.")

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def note_of(self, name: str) -> str | None:
        """The note of a file that is whole; None if the file has to be made."""
        note = self.partial / (name + _NOTE)
        return note.read_text() if note.is_file() and (self.partial / name).is_file() else None

    @contextmanager
    def making(self, name: str) -> Iterator[tuple[Path, list[str]]]:
        """Yield (path to write the file `name` to, list to put its note into); the file gets its name when the block ends well.

        Raises:
            CheckpointError: the operating system refused (a full disk); what is whole stays for the next try.
        """
        temporary, notes = self.partial / (name + ".tmp"), [""]
        try:
            yield temporary, notes
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.partial / name} could not be written ({error}). Free space, or fix the permissions, and start the same command "
                f"again: it goes on where it stood."
            ) from error
        temporary.rename(self.partial / name)
        note = self.partial / (name + _NOTE)
        note.with_suffix(".tmp").write_text(notes[-1])
        note.with_suffix(".tmp").rename(note)

    def finish(self) -> Path:
        """Give the directory its final name."""
        for path in self.partial.iterdir():
            if path.name.endswith((".tmp", _NOTE)):
                path.unlink()
        for path in self.partial.rglob("*") if self._wait else ():
            if path.is_file():
                sync_path(path)
        sync_path(self.partial)
        if self.destination.exists():
            raise CheckpointError(f"{self.destination} appeared meanwhile: nothing is overwritten. The result stands in {self.partial}.")
        self.partial.rename(self.destination)
        (self.destination / _IDENTITY).unlink()  # only now: until here it is the lock that keeps others out
        sync_path(self.destination.parent)
        return self.destination
