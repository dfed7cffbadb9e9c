"""Write an output directory file by file under a temporary name, and rename the directory when it is complete. After an interruption,
writing continues with the files that are missing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.training_directory import sync_path
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger

_IDENTITY = "conversion.json"
_NOTE = ".note.json"


class ResumableDirectory:
    """An output directory that is being written. Use as a context manager, and call `finish` as the last step.

    Args:
        destination: directory to create, which must not exist.
        identity: JSON description of the content. Files of an interrupted run are reused only if its identity is equal.
        sync: fsync all files before the directory gets its final name.
    Raises:
        CheckpointError: the destination exists, another process is writing it, or a file cannot be written, e.g. because the disk is full.
            Complete files are kept for the next attempt.
    """

    def __init__(self, destination: Path, identity: dict[str, Any], *, sync: bool = True):
        self._sync = sync
        self.destination = Path(os.path.abspath(destination))
        self.partial = self.destination.with_name(self.destination.name + ".partial")
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._lock: int | None = None

    def __enter__(self) -> ResumableDirectory:
        self._check_destination()
        try:
            self._check_partial()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / _IDENTITY, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_destination()  # another process may have finished in the meantime
            stored = (self.partial / _IDENTITY).read_text(errors="replace")
        except BlockingIOError as error:
            raise CheckpointError(f"{self.partial} is being written by another process: wait until it ends, or stop it.") from error
        except OSError as error:
            raise CheckpointError(f"{self.partial} cannot be written ({error}). Choose a writable directory.") from error
        if stored != self._identity:
            try:
                self._begin_anew()
            except OSError as error:
                self.__exit__()
                raise self._unwritable(self.partial, error) from error
        elif kept := [path for path in self.partial.iterdir() if path.name != _IDENTITY and not path.name.endswith((".tmp", _NOTE))]:
            get_logger().info(f"continuing in {self.partial}: {len(kept)} file(s) of an interrupted conversion are complete")
        return self

    def _begin_anew(self) -> None:
        """Delete the files of another conversion, and record the identity of this conversion."""
        assert self._lock is not None
        for path in self.partial.iterdir():
            if path.name != _IDENTITY:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, self._identity.encode(), 0)
        os.fsync(self._lock)

    def _check_destination(self) -> None:
        if self.destination.exists():
            raise CheckpointError(f"{self.destination} exists and is not overwritten. Remove it, or choose another directory.")

    def _check_partial(self) -> None:
        """Check that `partial` is empty or was left by an interrupted conversion, because `_begin_anew` may delete its files.

        Raises:
            CheckpointError: `partial` contains files and was not left by a conversion.
        """
        if not self.partial.exists() or not any(path.name != _IDENTITY for path in self.partial.iterdir()):
            return
        try:
            ours = "format" in json.loads((self.partial / _IDENTITY).read_text())
        except (OSError, ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise CheckpointError(
                f"{self.partial} exists and does not belong to an interrupted conversion: move it, or choose another destination."
            )

    def __exit__(self, kind: object = None, error: BaseException | None = None, traceback: object = None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError):
            raise self._unwritable(self.partial, error) from error

    @staticmethod
    def _unwritable(path: Path, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{path} could not be written ({error}). Free space, or fix the permissions, and start the same command again: it continues "
            f"where it stopped."
        )

    def note_of(self, name: str) -> str | None:
        """Return the note that is stored with a complete file, or None if the file must still be written."""
        note = self.partial / (name + _NOTE)
        return note.read_text(errors="replace") if note.is_file() and (self.partial / name).is_file() else None

    @contextmanager
    def writing(self, name: str) -> Iterator[tuple[Path, list[str]]]:
        """Yield (temporary path of the file `name`, list of notes). The block writes the file to this path, and may append a note to the
        list. If the block succeeds, the file is renamed to `name`, and the last note is stored for `note_of`.

        Raises:
            CheckpointError: the block raised an OSError, e.g. because the disk is full. Complete files are kept for the next attempt.
        """
        temporary, notes = self.partial / (name + ".tmp"), [""]
        try:
            yield temporary, notes
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._unwritable(self.partial / name, error) from error
        temporary.rename(self.partial / name)
        note = self.partial / (name + _NOTE)
        note.with_suffix(".tmp").write_text(notes[-1])
        note.with_suffix(".tmp").rename(note)

    def finish(self) -> Path:
        """Rename the directory to its final name and return it."""
        for path in self.partial.iterdir():
            if path.name.endswith((".tmp", _NOTE)):
                path.unlink()
        for path in self.partial.rglob("*") if self._sync else ():
            if path.is_file():
                sync_path(path)
        sync_path(self.partial)
        if self.destination.exists():
            raise CheckpointError(
                f"{self.destination} was created in the meantime and is not overwritten. The result is in {self.partial}."
            )
        self.partial.rename(self.destination)
        try:
            sync_path(self.destination.parent)
        except OSError:
            self.destination.rename(self.partial)  # so that the same command can continue
            raise
        with suppress(OSError):
            (self.destination / _IDENTITY).unlink()  # after the rename, because this file locks the directory
        return self.destination
