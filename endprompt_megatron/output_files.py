"""Output directories that one process writes at a time, and files that nobody ever sees half written."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from endprompt_megatron.errors import ConfigError


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
        lock = (output_dir / ".lock").open("w")
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
