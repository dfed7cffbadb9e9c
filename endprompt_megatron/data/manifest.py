"""The manifest of an indexed dataset, a JSON file beside the `.bin` and `.idx` files. The manifest records the source, the tokenizer and
the SHA-256 of both files. It is checked before every use, because training on a damaged dataset or with another tokenizer raises no error
but is useless."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import types
import typing
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from endprompt_megatron.errors import DataError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import final_name, temporary_name

MANIFEST_VERSION = 2
_WITHOUT_DIGESTS = 1  # version of manifests that record only sizes
Check = Literal["changed", "all", "sizes"]
_FILES = ("bin", "idx")
_ENDINGS = {"bin": "bin", "idx": "idx", "manifest": "manifest.json"}


@dataclass(frozen=True)
class Manifest:
    """Source and contents of an indexed dataset.

    Attributes:
        source: paths, or name of the hub dataset, as configured.
        source_files: SHA-256 of each local file, in reading order; empty for a hub dataset.
        config_name, split, text_key: configuration, split and text column of the source.
        tokenizer_hash: hash of the tokenizer from `checkpoint.hf.tokenizer.hash_tokenizer`.
        vocab_size: size of the tokenizer's vocabulary.
        eos_token_id: id of the end-of-text token; None if the tokenizer has no such token.
        append_eod: whether each document ends with `eos_token_id`.
        num_documents, num_tokens: numbers of documents and tokens in the .bin file, including end-of-text tokens.
        num_empty_documents: number of documents without text, which were skipped.
        num_replaced_characters: number of lone surrogates that were replaced by U+FFFD.
        dtype: numpy dtype of the ids on disk.
        bin_bytes, idx_bytes: sizes of the two files.
        bin_sha256, idx_sha256: SHA-256 (hex) of the two files; empty in manifest version 1.
        bin_mtime_ns, idx_mtime_ns: modification times of the two files when they were last compared with their SHA-256, in nanoseconds
            since 1970; 0 in manifest version 1.
        versions: versions of the libraries that wrote the dataset.
        manifest_version: version of the manifest format.
    """

    source: list[str]
    source_files: list[str]
    config_name: str | None
    split: str
    text_key: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_id: int | None
    append_eod: bool
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    versions: dict[str, str]
    manifest_version: int = MANIFEST_VERSION
    num_replaced_characters: int = 0
    bin_sha256: str = ""
    idx_sha256: str = ""
    bin_mtime_ns: int = 0
    idx_mtime_ns: int = 0

    def identity(self) -> str:
        """Return the SHA-256 (hex) of the fields that describe the contents. The result is equal for datasets made from the same text with
        the same tokenizer and settings."""
        left_out = ("versions", "source", "num_replaced_characters", "manifest_version", *_file_fields("sha256"), *_file_fields("mtime_ns"))
        described = {key: value for key, value in asdict(self).items() if key not in left_out}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def dataset_paths(prefix: Path) -> dict[str, Path]:
    """Return the paths of the files "bin", "idx" and "manifest" of a dataset."""
    # not with_suffix: a prefix may contain dots
    return {kind: Path(f"{prefix}.{ending}") for kind, ending in _ENDINGS.items()}


def delete_hint(prefix: Path) -> str:
    """Return the sentence at the end of every error message about a damaged dataset."""
    return f"Delete {prefix}.bin, .idx and .manifest.json; the same command creates them again."


def has_manifest(prefix: Path) -> bool:
    """Return whether a complete indexed dataset exists under this prefix. Only the manifest is checked, because it is renamed last."""
    return dataset_paths(prefix)["manifest"].is_file()


def load_manifest(prefix: Path) -> Manifest:
    """Read the manifest of an indexed dataset.

    Raises:
        DataError: the file is missing or unreadable, is not a manifest, contradicts itself, or has another format version.
    """
    path = dataset_paths(prefix)["manifest"]
    if not path.exists():
        raise DataError(f"{path} does not exist: no dataset was prepared under this prefix. Run recipes/prepare_data.py.")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {delete_hint(prefix)}") from error
    if manifest.manifest_version not in (_WITHOUT_DIGESTS, MANIFEST_VERSION):
        raise DataError(
            f"{path}: manifest_version={manifest.manifest_version!r}, this program reads {MANIFEST_VERSION}. {delete_hint(prefix)}"
        )
    contradiction = _contradiction(manifest)
    if contradiction:
        raise DataError(f"{path} is damaged ({contradiction}). {delete_hint(prefix)}")
    return manifest


def check_manifest(prefix: Path, *, tokenizer_hash: str, check: Check = "changed", record: bool = True) -> Manifest:
    """Check that the indexed dataset exists, is complete and was made with this tokenizer.

    The sizes of both files are always compared. A manifest of version 1 has no SHA-256. In this case, the counts in the .idx file are
    compared with the manifest instead, and the SHA-256 of both files are recorded.

    Args:
        prefix: path without suffix.
        tokenizer_hash: hash of the tokenizer, from `checkpoint.hf.tokenizer.hash_tokenizer`.
        check: files to compare with their SHA-256. "changed" compares the files whose modification time differs from the recorded one,
            "all" compares both files, and "sizes" compares no file.
        record: write new modification times and SHA-256 to the manifest if the manifest is writable.
    Returns:
        The manifest.
    Raises:
        DataError: a file is missing, its size or SHA-256 differs, or the dataset was made with another tokenizer.
    """
    manifest = load_manifest(prefix)
    paths = dataset_paths(prefix)
    for kind in _FILES:
        expected = getattr(manifest, f"{kind}_bytes")
        if not paths[kind].is_file():
            raise DataError(f"{paths[kind]} is missing. {delete_hint(prefix)}")
        found = paths[kind].stat().st_size
        if found != expected:
            raise DataError(f"{paths[kind]} has {found} bytes, not {expected}: it is truncated or was changed. {delete_hint(prefix)}")
    if manifest.tokenizer_hash != tokenizer_hash:
        raise DataError(
            f"{prefix} was made with another tokenizer (hash {manifest.tokenizer_hash[:12]}, vocabulary {manifest.vocab_size}; "
            f"this model's is {tokenizer_hash[:12]}): its ids mean other tokens. {delete_hint(prefix)}"
        )
    if check == "sizes":
        return manifest
    checked = _with_digests(prefix, manifest) if manifest.manifest_version == _WITHOUT_DIGESTS else _compared(prefix, manifest, check)
    if record and checked != manifest:
        _record(prefix, checked)
    return checked


def record_files(prefix: Path, described: dict[str, Any]) -> Manifest:
    """Write the manifest of a new dataset beside its .bin and .idx files, and fsync all three files.

    Args:
        prefix: path without suffix.
        described: fields of the manifest other than the sizes, modification times and SHA-256 of the two files.
    Raises:
        OSError: the manifest cannot be written.
    """
    manifest = Manifest(**described, **_facts(prefix))
    for kind in _FILES:
        with dataset_paths(prefix)[kind].open("rb") as file:
            os.fsync(file.fileno())
    _write(dataset_paths(prefix)["manifest"], manifest)
    return manifest


def rename_dataset(temporary: Path, prefix: Path) -> None:
    """Rename the complete files of `temporary` to those of `prefix`, with the manifest last. Another process may do the same at the same
    time, so files that are already renamed are skipped.

    Raises:
        OSError: a file cannot be renamed, or exists under neither name.
    """
    for kind, path in dataset_paths(prefix).items():
        try:
            dataset_paths(temporary)[kind].replace(path)
        except FileNotFoundError:
            if not path.exists():
                raise


def complete_interrupted(directory: Path) -> None:
    """Complete the datasets whose writer was killed between its renames.

    A temporary manifest is written only after its .bin and .idx files are complete. If both files, under their temporary or final names,
    have the sizes and SHA-256 of the temporary manifest, the remaining files are renamed. The writer may still be running, because it would
    rename the same files. Files with other contents are not changed.
    """
    ending = "." + _ENDINGS["manifest"]
    for found in directory.glob(f".*.tmp{glob.escape(ending)}"):
        temporary = found.with_name(found.name.removesuffix(ending))
        prefix = final_name(temporary)
        if prefix is None or has_manifest(prefix):
            continue
        try:
            manifest = load_manifest(temporary)
            whole = all(_is_whole(temporary, prefix, manifest, kind) for kind in _FILES)
        except (DataError, OSError):
            continue
        if whole:
            with suppress(OSError):  # if the directory is not writable, prepare_dataset raises the error
                rename_dataset(temporary, prefix)
                get_logger().info(f"{prefix}: completed a dataset whose preparation was interrupted after its last token")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_fields(ending: str) -> list[str]:
    return [f"{kind}_{ending}" for kind in _FILES]


def _facts(prefix: Path) -> dict[str, Any]:
    """Return the fields of the manifest that describe the two files."""
    facts: dict[str, Any] = {}
    for kind in _FILES:
        path = dataset_paths(prefix)[kind]
        stat = path.stat()
        facts |= {f"{kind}_bytes": stat.st_size, f"{kind}_mtime_ns": stat.st_mtime_ns, f"{kind}_sha256": sha256_of(path)}
    return facts


def _is_whole(temporary: Path, prefix: Path, manifest: Manifest, kind: str) -> bool:
    """Return whether a file has the size and SHA-256 in the manifest. The file is read under its final name if that exists, else under its
    temporary name."""
    path = dataset_paths(prefix)[kind]
    path = path if path.exists() else dataset_paths(temporary)[kind]
    return path.stat().st_size == getattr(manifest, f"{kind}_bytes") and sha256_of(path) == getattr(manifest, f"{kind}_sha256")


def _compared(prefix: Path, manifest: Manifest, check: Check) -> Manifest:
    """Compare the files with their SHA-256, and return the manifest with their current modification times."""
    times: dict[str, Any] = {}
    for kind in _FILES:
        path = dataset_paths(prefix)[kind]
        mtime_ns = path.stat().st_mtime_ns
        if check != "all" and mtime_ns == getattr(manifest, f"{kind}_mtime_ns"):
            continue
        expected, found = getattr(manifest, f"{kind}_sha256"), sha256_of(path)
        if found != expected:
            raise DataError(
                f"{path} is damaged or was changed: its SHA-256 is {found[:12]}..., the manifest has {expected[:12]}.... "
                f"{delete_hint(prefix)}"
            )
        get_logger().info(f"{path}: the SHA-256 matches the manifest")
        times[f"{kind}_mtime_ns"] = mtime_ns
    return replace(manifest, **times)


def _with_digests(prefix: Path, manifest: Manifest) -> Manifest:
    """Convert a manifest of version 1 to the current version, after a check that the .idx file has the counts of the manifest."""
    try:
        indexed = IndexedDataset(str(prefix))
        found = (len(indexed.document_indices) - 1, int(indexed.sequence_lengths.sum()))
        pointers = np.cumsum(indexed.sequence_lengths, dtype=np.int64) - indexed.sequence_lengths
        same = np.array_equal(pointers * np.dtype(manifest.dtype).itemsize, indexed.index.sequence_pointers)
        same = same and np.array_equal(indexed.document_indices, np.arange(len(indexed) + 1))
    except Exception as error:  # megatron raises AssertionError, KeyError, struct.error and ValueError for a damaged .idx file
        raise DataError(f"{prefix}.idx is damaged ({type(error).__name__}: {error}). {delete_hint(prefix)}") from error
    if found != (manifest.num_documents, manifest.num_tokens) or not same:
        raise DataError(
            f"{prefix}.idx is damaged: it has {found[0]} documents with {found[1]} tokens, the manifest {manifest.num_documents} with "
            f"{manifest.num_tokens}, or the documents are not consecutive. {delete_hint(prefix)}"
        )
    get_logger().warning(
        f"{prefix} was prepared by an earlier release, which recorded no SHA-256. Sizes and counts are right; the SHA-256 of the files as "
        f"they are now are recorded."
    )
    return replace(manifest, manifest_version=MANIFEST_VERSION, **_facts(prefix))


def _record(prefix: Path, manifest: Manifest) -> None:
    try:
        _write(dataset_paths(prefix)["manifest"], manifest)
    except OSError as error:
        get_logger().warning(f"{prefix}.manifest.json cannot be written ({error}), so every start reads the dataset whole")


def _write(path: Path, manifest: Manifest) -> None:
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(manifest), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _contradiction(manifest: Manifest) -> str | None:
    """Return a description of an invalid field, or None if `record_files` could have written this manifest."""
    for name, hint in _field_types().items():
        value = getattr(manifest, name)
        if not _fits(value, hint):
            return f"{name} is {str(value)[:40]!r}"
        if type(value) is int and value < 0:
            return f"{name}={value} is negative"
    if manifest.dtype not in ("uint16", "int32"):
        return f"dtype is {manifest.dtype!r}"
    if manifest.num_tokens * np.dtype(manifest.dtype).itemsize != manifest.bin_bytes:
        return f"{manifest.num_tokens} tokens of {manifest.dtype} are not {manifest.bin_bytes} bytes"
    pattern = "" if manifest.manifest_version == _WITHOUT_DIGESTS else "[0-9a-f]{64}"
    odd = [name for name in _file_fields("sha256") if not re.fullmatch(pattern, getattr(manifest, name))]
    return f"{odd[0]} is {getattr(manifest, odd[0])[:70]!r} in version {manifest.manifest_version}" if odd else None


@functools.cache
def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(Manifest)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return type(value) is list and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return type(value) is dict and all(_fits(item, arguments[1]) for item in value.values())
    return type(value) is hint
