"""The checkpoints directory of a run on disk: which checkpoints there are, which one counts, and whether one is whole.

Layout: step_0000123/ (the tensors, run.json, checksums.json), latest (the name of the newest). A checkpoint is written as
step_0000123.partial and renamed when it is whole; one that proves damaged is renamed to step_0000123.damaged and left for people.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import xxhash

LATEST = "latest"
RUN_FILE = "run.json"
_CHECKSUMS = "checksums.json"
_PARTIAL, _DAMAGED, _REPLACED, _RETIRED = ".partial", ".damaged", ".replaced", ".retired"
_CHUNK_BYTES = 2**24


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step stands when it is whole."""
    return directory / f"step_{step:07d}"


def begin(final: Path) -> Path:
    """An empty directory to write the checkpoint `final` into; what crashes left half-written or half-removed goes, whichever step it
    was. No other save may be going on."""
    for suffix in (_PARTIAL, _RETIRED):
        for leftover in final.parent.glob(f"step_*{suffix}"):
            shutil.rmtree(leftover)
    partial = final.with_name(final.name + _PARTIAL)
    partial.mkdir(parents=True)
    return partial


def checksums_of(paths: Iterable[Path]) -> dict[str, str]:
    """{file name: XXH3-64 of its bytes, hex}."""
    return {path.name: _checksum(path) for path in paths}


def complete(partial: Path, final: Path, *, checksums: dict[str, str], keep_last: int) -> None:
    """Give a written checkpoint its name, then let `latest` name it, then retire old ones: whatever moment a crash picks, `latest`
    names a whole checkpoint or one before it is found.

    Args:
        partial, final: of `begin`.
        checksums: of every file in it.
        keep_last: newest checkpoints kept; 0 keeps all.
    """
    _write(partial / _CHECKSUMS, json.dumps(checksums, indent=1))
    sync_path(partial)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    point_latest_at(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _retire(final, keep_last)


def abandon(partial: Path) -> None:
    """Remove what a failed save left, as far as that is possible: a full disk wants its space back."""
    shutil.rmtree(partial, ignore_errors=True)


def point_latest_at(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint, at once or not at all."""
    temporary = checkpoint.parent / (LATEST + ".tmp")
    _write(temporary, checkpoint.name + "\n")
    temporary.replace(checkpoint.parent / LATEST)
    sync_path(checkpoint.parent)


def candidates(directory: Path) -> list[Path]:
    """Checkpoints to try, best first: the one that `latest` names, then the others from the newest step down. For one process."""
    for replaced in directory.glob(f"step_*{_REPLACED}"):  # a crash came between two renames
        final = replaced.with_suffix("")
        if not final.exists():
            replaced.rename(final)
    found = sorted(_whole(directory), reverse=True)
    pointer = directory / LATEST
    if pointer.is_file():
        named = directory / (pointer.read_text().strip() or "nothing")
        later = [path for path in found if path.name > named.name]  # abandoned: the run was sent back to an earlier step
        found = [named, *(path for path in found if path != named and path not in later), *later]
    return found


def damage(checkpoint: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is.

    Args:
        checkpoint: its directory.
        share, shares: check every `shares`-th file from number `share` on, so that ranks can divide the reading.
    """
    if not checkpoint.is_dir():
        return "it is not there"
    try:
        checksums = json.loads((checkpoint / _CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"its {_CHECKSUMS} cannot be read ({error})"
    for name in sorted(checksums)[share::shares]:
        try:
            if _checksum(checkpoint / name) != checksums[name]:
                return f"{name} is not what was written (its checksum differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def set_aside(checkpoint: Path) -> Path | None:
    """Rename a damaged checkpoint, so that nobody takes it for a good one; None if there is nothing to rename."""
    if not checkpoint.exists():
        return None
    number, aside = 1, checkpoint.with_name(checkpoint.name + _DAMAGED)
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}{number}")
    return checkpoint.rename(aside)


def _whole(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]


def _retire(newest: Path, keep_last: int) -> None:
    if keep_last < 1:
        return
    # by age and not by number: a run that was sent back to an earlier step goes on from there
    others = sorted((path for path in _whole(newest.parent) if path != newest), key=lambda path: (path.stat().st_mtime, path.name))
    for path in others[: max(0, len(others) - (keep_last - 1))]:
        retired = path.rename(path.with_name(path.name + _RETIRED))  # a crash leaves no ruin under a good name
        shutil.rmtree(retired, ignore_errors=True)


def _checksum(path: Path) -> str:
    """XXH3-64, hex; what was read is on the disk afterwards, and not only in its cache."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_path(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk: names are there only when their directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
