"""Manage the checkpoints directory of a run: find checkpoints, select the checkpoint to resume from, verify checkpoints and delete old
ones.

The directory contains step_0000123/ (tensors, run.json, checksums.json) for each checkpoint, and `latest`, a file with the name of the
newest checkpoint. A checkpoint is written as step_0000123.partial and renamed when it is complete. A damaged checkpoint is renamed to
step_0000123.damaged and never deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from endprompt_megatron import output_files
from endprompt_megatron.errors import DamagedFileError
from endprompt_megatron.log import get_logger

LATEST = "latest"
RUN_FILE = "run.json"
_CHECKSUMS = "checksums.json"
_PARTIAL, _REPLACED, _RETIRED = ".partial", ".replaced", ".retired"
_ALWAYS_THERE = (RUN_FILE, ".metadata", "metadata.json")
_STEP, _HEX = re.compile(r"step_[0-9]+"), re.compile(r"[0-9a-f]{16}")
_CHUNK_BYTES = 2**24


def step_directory(directory: Path, step: int) -> Path:
    """Return the path of the complete checkpoint of a step."""
    return directory / f"step_{step:07d}"


def begin(final: Path) -> Path:
    """Create an empty directory for writing the checkpoint `final`. Checkpoints of any step that a crash left partly written or partly
    deleted are removed first. No other save may therefore be in progress.

    Raises:
        CheckpointError: the output directory was renamed. It is not created again.
    """
    output_files.check_not_moved(final.parent.parent)
    _delete_leftovers(final.parent)
    final.parent.mkdir(exist_ok=True)
    partial = final.with_name(final.name + _PARTIAL)
    partial.mkdir()
    return partial


def checksums_of(paths: Iterable[Path]) -> dict[str, str]:
    """Return {file name: XXH3-64 (hex) of the file}, and fsync the files."""
    return {path.name: _checksum(path) for path in paths}


def complete(partial: Path, final: Path, *, checksums: dict[str, str], keep_last: int) -> None:
    """Rename a written checkpoint to its final name, then update `latest`, then delete old checkpoints. With this order, after a crash at
    any moment, either `latest` names a complete checkpoint, or `candidates` finds an earlier one.

    Args:
        partial: directory that `begin` returned.
        final: final path of the checkpoint.
        checksums: checksums of all files of the checkpoint.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
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
    _retire(final, keep_last, among=_complete(final.parent))


def abandon(partial: Path) -> None:
    """Delete the files of a failed save to free disk space. Errors are ignored."""
    shutil.rmtree(partial, ignore_errors=True)


def point_latest_at(checkpoint: Path) -> None:
    """Atomically write the name of a checkpoint into `latest`."""
    pointer = checkpoint.parent / LATEST
    if pointer.is_dir():
        output_files.set_aside(pointer, "is a directory")
    temporary = checkpoint.parent / (LATEST + ".tmp")
    _write(temporary, checkpoint.name + "\n")
    temporary.replace(pointer)
    sync_path(checkpoint.parent)


def latest_name(directory: Path) -> str | None:
    """Return the name in `latest`, or None if the file does not exist.

    Raises:
        DamagedFileError: the file does not contain the name of a checkpoint.
    """
    pointer, way_out = directory / LATEST, "Write the name of a checkpoint into it, or remove it to use the newest one."
    if not pointer.exists():
        return None
    name = output_files.read_text(pointer, way_out=way_out).strip()
    if not _STEP.fullmatch(name):
        raise DamagedFileError(pointer, f"does not hold the name of a checkpoint but {name[:40]!r}", way_out)
    return name


def is_latest(checkpoint: Path) -> bool:
    """Return whether `latest` contains the name of this checkpoint."""
    try:
        return latest_name(checkpoint.parent) == checkpoint.name
    except DamagedFileError:
        return False


def candidates(directory: Path) -> list[Path]:
    """Return the checkpoints to resume from in order of preference: the checkpoint that `latest` names, then those of earlier steps, then
    those of later steps. Both groups are in descending order of steps. Without `latest`, all checkpoints are in descending order of steps.
    A damaged `latest` is ignored with a warning. Call this function on one rank only and while no save is in progress, because it renames
    and deletes what crashes left."""
    for replaced in directory.glob(f"step_*{_REPLACED}"):  # left by a crash between two renames
        final = replaced.with_suffix("")
        if not final.exists():
            replaced.rename(final)
    with suppress(OSError):  # `begin` raises it
        _delete_leftovers(directory)
    found = sorted(_complete(directory), reverse=True)
    try:
        name = latest_name(directory)
    except DamagedFileError as error:
        get_logger().warning(f"{directory / LATEST} {error.fault}: it is ignored, and the newest intact checkpoint is used")
        name = None
    if name is not None:
        named = directory / name
        later = [path for path in found if path.name > named.name]  # last, because the run was reset to an earlier step
        found = [named, *(path for path in found if path != named and path not in later), *later]
    return found


def damage(checkpoint: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """Return a description of the damage to the files of a checkpoint, or None if the checkpoint is intact.

    Args:
        checkpoint: directory of the checkpoint.
        share, shares: check every `shares`-th file, starting with file `share`, to divide the reading among ranks.
    """
    if not checkpoint.is_dir():
        return "it does not exist"
    try:
        checksums = output_files.read_json(checkpoint / _CHECKSUMS, way_out="")
    except DamagedFileError as error:
        return f"its {_CHECKSUMS} {error.fault}"
    if not all(Path(name).name == name and isinstance(value, str) and _HEX.fullmatch(value) for name, value in checksums.items()):
        return f"its {_CHECKSUMS} contains something else than the checksums of files of this directory"
    unlisted = {*_ALWAYS_THERE, *(path.name for path in checkpoint.iterdir() if path.suffix in (".distcp", ".pt"))} - checksums.keys()
    if unlisted:
        return f"its {_CHECKSUMS} lacks {', '.join(sorted(unlisted))}"
    for name in sorted(checksums)[share::shares]:
        try:
            if _checksum(checkpoint / name) != checksums[name]:
                return f"{name} has changed since it was written (its checksum differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def set_aside(checkpoint: Path, suffix: str = output_files.DAMAGED) -> Path | None:
    """Rename a damaged checkpoint or another directory, so that it is not used again. Return the new path, or None if the directory does
    not exist."""
    if not checkpoint.exists():
        return None
    return checkpoint.rename(output_files.damaged_name(checkpoint, suffix))


def retire_earlier(directory: Path, keep_last: int) -> None:
    """Delete old checkpoints as `complete` does, which a crash may have ended before that. Ignores errors.

    Checkpoints of a later step than the one in `latest` stay and do not count: they belong to a run that was reset to an earlier step.
    """
    with suppress(DamagedFileError, OSError):
        name = latest_name(directory)
        if name is not None:
            _retire(directory / name, keep_last, among=[path for path in _complete(directory) if path.name <= name])


def _delete_leftovers(directory: Path) -> None:
    """Delete partly written and partly removed checkpoints, and those that another one of the same step has replaced."""
    for suffix in (_PARTIAL, _RETIRED, _REPLACED):
        for leftover in directory.glob(f"step_*{suffix}"):
            if suffix == _REPLACED and not leftover.with_suffix("").exists():
                continue  # a crash came before its successor had the final name
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if path.is_dir() and _STEP.fullmatch(path.name)]


def _retire(newest: Path, keep_last: int, *, among: list[Path]) -> None:
    if keep_last < 1:
        return
    # by age and not by step, because a run that was reset to an earlier step continues from there
    others = sorted((path for path in among if path != newest), key=lambda path: (path.stat().st_mtime, path.name))
    for path in others[: max(0, len(others) - (keep_last - 1))]:
        retired = path.rename(path.with_name(path.name + _RETIRED))  # so that a crash leaves no partly removed directory under a valid name
        shutil.rmtree(retired, ignore_errors=True)


def _checksum(path: Path) -> str:
    """Return the XXH3-64 (hex) of a file, and fsync the file."""
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
    """Fsync a file or a directory. A new file name is durable only after the fsync of its directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
