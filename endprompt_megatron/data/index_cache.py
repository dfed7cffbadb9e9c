"""Cache of Megatron's index arrays, which contain the order of documents and samples. Each dataset has one directory with its arrays and
the SHA-256 of each file. Megatron itself reuses any array with the right name. A damaged array, or an array that is older than its dataset,
then changes the batches without an error, and an array with pickled objects runs code (numpy.load with allow_pickle=True, megatron-core
0.16)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.data.manifest import dataset_paths, has_manifest, load_manifest, sha256_of
from endprompt_megatron.log import get_logger
from endprompt_megatron.mcore.runtime import from_rank_zero
from endprompt_megatron.output_files import replace_text, sweep_leftovers, temporary_name

_DIGESTS = "digests.json"


def dataset_contents(prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a description of the contents of indexed datasets for the key of `index_cache`. The description contains the SHA-256 in the
    manifest of each dataset. Datasets of another program or an earlier release have no SHA-256, so their sizes and modification times are
    used instead."""
    described: list[dict[str, Any]] = []
    for prefix in prefixes:
        paths = dataset_paths(Path(prefix))
        manifest = load_manifest(Path(prefix)) if has_manifest(Path(prefix)) else None
        if manifest is not None and manifest.bin_sha256:
            described.append({"prefix": prefix, "bin": manifest.bin_sha256, "idx": manifest.idx_sha256})
        else:
            stats = {kind: paths[kind].stat() for kind in ("bin", "idx")}
            described.append({"prefix": prefix, **{kind: [stat.st_size, stat.st_mtime_ns] for kind, stat in stats.items()}})
    return described


@contextmanager
def index_cache(cache_dir: Path, key: dict[str, Any], *, verify: bool) -> Iterator[Path]:
    """Yield the directory from which Megatron loads its index arrays, or to which Megatron writes them. All ranks must call this function
    and share the file system.

    The directory is `cache_dir/<hash of key>` if that directory is complete and unchanged. Otherwise, the arrays are written to a temporary
    directory. After the block, their SHA-256 are recorded and the directory is renamed. Two runs that build the same arrays at the same
    time use separate temporary directories.

    Args:
        cache_dir: directory of the caches of all datasets, created if necessary.
        key: all values that determine the arrays, as JSON.
        verify: compare the SHA-256 of every file. False compares only the sizes, and the SHA-256 of files whose modification time has
            changed.
    Raises:
        OSError: the directory cannot be written.
    """
    described = json.dumps({**key, "megatron_core": metadata.version("megatron-core")}, sort_keys=True)
    final = cache_dir / hashlib.sha256(described.encode()).hexdigest()[:16]
    distributed = torch.distributed.is_initialized()
    is_writer = not distributed or torch.distributed.get_rank() == 0
    directory: Path | OSError = final
    if is_writer:
        try:
            directory = _whole_or_new(final, verify=verify)
        except OSError as error:
            directory = error
    directory = from_rank_zero(directory) if distributed else directory
    if isinstance(directory, OSError):
        raise directory  # on all ranks, so that no rank waits for another
    try:
        yield directory
        if distributed:
            torch.distributed.barrier()  # wait until all ranks have opened their files
        if is_writer and directory != final:
            _keep(directory, final)
    except BaseException:
        if is_writer and directory != final:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _whole_or_new(final: Path, *, verify: bool) -> Path:
    """Return `final` if it is complete and unchanged, else a new empty directory beside `final`."""
    if _is_whole(final, verify=verify):
        return final
    sweep_leftovers(final.parent)
    directory = temporary_name(final)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _keep(directory: Path, final: Path) -> None:
    """Record the SHA-256 of new arrays, and rename their directory to `final`."""
    replace_text(directory / _DIGESTS, json.dumps({path.name: _described(path) for path in sorted(directory.iterdir())}, indent=1))
    try:
        directory.replace(final)
    except OSError:
        if not final.is_dir():
            raise
        # Another run was faster. Ranks on other hosts still read this directory, so a later start deletes it.


def _described(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}


def _is_whole(directory: Path, *, verify: bool) -> bool:
    """Return whether the directory contains all of its files, unchanged. A damaged directory is deleted."""
    if not directory.exists():
        return False
    try:
        damage = _damage(directory, verify=verify)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damage = f"{directory / _DIGESTS} is damaged ({type(error).__name__}: {error})"
    if damage is None:
        return True
    get_logger().warning(f"index cache: {damage}. Building it again.")
    _delete(directory)
    return False


def _damage(directory: Path, *, verify: bool) -> str | None:
    """Return a description of the damage to a directory, or None if the directory is intact. New modification times of intact files are
    recorded if the directory is writable."""
    recorded = json.loads((directory / _DIGESTS).read_text(encoding="utf-8"))
    found = {path.name: path for path in directory.iterdir() if path.name != _DIGESTS}
    if not recorded or recorded.keys() != found.keys():
        return f"{directory} holds {sorted(found)}, {_DIGESTS} names {sorted(recorded)}"
    changed = False
    for name, path in found.items():
        stat, expected = path.lstat(), recorded[name]
        if stat.st_size != expected["bytes"]:
            return f"{path} has {stat.st_size} bytes, not {expected['bytes']}"
        if verify or stat.st_mtime_ns != expected["mtime_ns"]:
            if sha256_of(path) != expected["sha256"]:
                return f"the SHA-256 of {path} is not the recorded one"
            changed = changed or stat.st_mtime_ns != expected["mtime_ns"]
            expected["mtime_ns"] = stat.st_mtime_ns
        if path.suffix == ".npy" and np.load(path, mmap_mode="r", allow_pickle=False).dtype.kind not in "iu":
            return f"{path} does not hold integers"
    if changed:
        with suppress(OSError):
            replace_text(directory / _DIGESTS, json.dumps(recorded, indent=1))
    return None


def _delete(path: Path) -> None:
    """Rename and then delete a file or directory, so that no other process sees a partly deleted directory."""
    aside = temporary_name(path)
    path.replace(aside)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()
