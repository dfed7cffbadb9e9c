"""Tokenise text into Megatron's indexed format (`.bin`, `.idx`). text_files reads local files, `datasets` reads hub datasets. A manifest
next to the dataset records its source and tokenizer. Training on a truncated dataset, or on one of another tokenizer, raises no error but
is useless, so the manifest is checked before every use."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from endprompt_megatron.data.text_files import KINDS, files_named, kind_of, read_rows
from endprompt_megatron.errors import DataError
from endprompt_megatron.log import Progress, get_logger

BATCH_DOCUMENTS = 64  # documents per tokenizer call: enough for the tokenizer's threads, yet little memory even for books
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Source and contents of an indexed dataset.

    Attributes:
        source: source as configured: paths, or the name of the hub dataset.
        source_files: SHA-256 of each local file, in reading order; empty for a hub dataset.
        config_name, split, text_key: the part of the source that was read.
        tokenizer_hash: from `checkpoint.hf.tokenizer.hash_tokenizer`.
        vocab_size: size of the tokenizer's vocabulary.
        eos_token_id: the end-of-text id; None if the tokenizer has none.
        append_eod: whether each document ends with `eos_token_id`.
        num_documents, num_tokens: counts of the .bin file, end-of-text tokens included.
        num_empty_documents: documents without text, which were skipped.
        num_replaced_characters: lone surrogates that were replaced by U+FFFD.
        dtype: numpy dtype of the ids on disk.
        bin_bytes, idx_bytes: sizes of the two files.
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

    def identity(self) -> str:
        """SHA-256 (hex) of the manifest: equal for datasets made from the same text with the same tokenizer and settings."""
        described = {key: value for key, value in asdict(self).items() if key not in ("versions", "source", "num_replaced_characters")}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def prepare_dataset(
    source: str | Path | Sequence[str | Path],
    *,
    tokenizer: Any,
    tokenizer_hash: str,
    output_prefix: Path,
    text_key: str = "text",
    append_eod: bool = True,
    split: str = "train",
    config_name: str | None = None,
) -> Manifest:
    """Tokenise `source` into `<output_prefix>.bin`, `.idx` and `.manifest.json`, or reuse them if they exist.

    Each row is a document; a .txt file is one document. No special tokens are added except the end of text.

    Args:
        source: a .jsonl, .json, .parquet or .txt file (plain, .gz or .zst), a folder or glob of them, or a list of any of these; or the
            name of a hub dataset.
        tokenizer: a transformers tokenizer.
        tokenizer_hash: hash of the tokenizer, from `checkpoint.hf.tokenizer.hash_tokenizer`.
        output_prefix: path without suffix.
        text_key: name of the text column.
        append_eod: append the tokenizer's eos token to each document.
        split: split of a hub dataset.
        config_name: configuration of a hub dataset that has several.
    Returns:
        The manifest, also written to disk.
    Raises:
        DataError: the source is missing, unreadable or without text, the column or the eos token is missing, or the output exists and is
            damaged or was made from another source.
    """
    files = local_files(source)
    if append_eod and tokenizer.eos_token_id is None:
        raise DataError("append_eod=True, but the tokenizer has no eos token. Set its eos_token in tokenizer_config.json.")
    inputs: dict[str, Any] = {
        "source": [str(item) for item in _as_list(source)],
        "source_files": [_sha256(path) for path in files],
        "config_name": config_name,
        "split": split,
        "text_key": text_key,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "append_eod": append_eod,
    }
    existing = [path for path in _paths(output_prefix).values() if path.exists()]
    if existing:
        return _reuse(output_prefix, inputs, existing)

    dtype = DType.optimal_dtype(len(tokenizer))
    eod = [tokenizer.eos_token_id] if append_eod else []
    counts: dict[str, Any] = {"num_documents": 0, "num_tokens": 0, "num_empty_documents": 0, "num_replaced_characters": 0}
    with _replacing(output_prefix) as paths, Progress(f"tokenising {Path(output_prefix).name}", None) as progress:
        builder = IndexedDatasetBuilder(str(paths["bin"]), dtype=dtype)
        with builder.data_file:
            for texts in _text_batches(source, files, text_key=text_key, split=split, config_name=config_name):
                cleaned = [_encodable(text) for text in texts if text is not None and text.strip()]
                kept = [text for text, _ in cleaned]
                counts["num_replaced_characters"] += sum(replaced for _, replaced in cleaned)
                # verbose=False: no warnings about documents longer than the model's maximum, which are expected here
                encoded = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if kept else []
                for ids in filter(None, encoded):
                    builder.add_document(np.asarray(ids + eod), [len(ids) + len(eod)])
                    counts["num_documents"] += 1
                    counts["num_tokens"] += len(ids) + len(eod)
                counts["num_empty_documents"] += len(texts) - sum(map(bool, encoded))
                progress.advance(len(texts), f"{counts['num_tokens'] / 1e6:.2f}M tokens")
            if counts["num_documents"] == 0:
                raise DataError(f"{_named(source)}: no text in column '{text_key}' ({counts['num_empty_documents']} empty rows).")
            builder.finalize(str(paths["idx"]))
        manifest = Manifest(
            **inputs,
            **counts,
            dtype=np.dtype(dtype).name,
            bin_bytes=paths["bin"].stat().st_size,
            idx_bytes=paths["idx"].stat().st_size,
            versions={name: metadata.version(name) for name in ("datasets", "megatron-core", "tokenizers", "transformers")},
        )
        paths["manifest"].write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    replaced = manifest.num_replaced_characters
    note = f" ({replaced} lone surrogate{'' if replaced == 1 else 's'} replaced by U+FFFD)" if replaced else ""
    get_logger().info(f"wrote {output_prefix}: {manifest.num_documents} documents, {manifest.num_tokens} tokens{note}")
    return manifest


def read_texts(source: str | Path | Sequence[str | Path], *, text_key: str = "text", split: str = "train") -> Iterator[str]:
    """Yield the documents of a source (same form as for `prepare_dataset`) in order, without empty ones.

    Raises:
        DataError: as for prepare_dataset.
    """
    for batch in _text_batches(source, local_files(source), text_key=text_key, split=split, config_name=None):
        yield from (_encodable(text)[0] for text in batch if text is not None and text.strip())


def load_manifest(prefix: Path) -> Manifest:
    """Read the manifest of an indexed dataset.

    Raises:
        DataError: it is missing, is not JSON, or has another format version.
    """
    path = _paths(prefix)["manifest"]
    if not path.is_file():
        raise DataError(f"{path} does not exist: no dataset was prepared under this prefix. Run recipes/prepare_data.py.")
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}). {_delete(prefix)}") from error
    if manifest.manifest_version != MANIFEST_VERSION:
        raise DataError(f"{path}: manifest_version={manifest.manifest_version}, this program reads {MANIFEST_VERSION}. {_delete(prefix)}")
    return manifest


def has_manifest(prefix: Path) -> bool:
    """Whether a complete indexed dataset exists under this prefix; the manifest is written last."""
    return _paths(prefix)["manifest"].is_file()


def check_manifest(prefix: Path, *, tokenizer_hash: str) -> Manifest:
    """Check that the indexed dataset exists, is complete and was made with this tokenizer.

    Returns:
        The manifest.
    Raises:
        DataError: a file is missing or its size has changed, or the dataset was made with another tokenizer.
    """
    manifest = load_manifest(prefix)
    for suffix, expected in (("bin", manifest.bin_bytes), ("idx", manifest.idx_bytes)):
        path = _paths(prefix)[suffix]
        if not path.is_file():
            raise DataError(f"{path} is missing. {_delete(prefix)}")
        if path.stat().st_size != expected:
            raise DataError(f"{path} has {path.stat().st_size} bytes, not {expected}: it is truncated or was changed. {_delete(prefix)}")
    if manifest.tokenizer_hash != tokenizer_hash:
        raise DataError(
            f"{prefix} was made with another tokenizer (hash {manifest.tokenizer_hash[:12]}, vocabulary {manifest.vocab_size}; "
            f"this model's is {tokenizer_hash[:12]}): its ids mean other tokens. {_delete(prefix)}"
        )
    return manifest


def _reuse(prefix: Path, inputs: dict[str, Any], existing: list[Path]) -> Manifest:
    """Return the manifest of an existing output; raise if the output is incomplete or was not made from `inputs`."""
    if not _paths(prefix)["manifest"].exists():
        raise DataError(f"{existing[0]} exists without a manifest: it was written by another program, or not completely. {_delete(prefix)}")
    manifest = load_manifest(prefix)
    # local files are compared by content, not by path
    compared = [name for name in inputs if not (name == "source" and inputs["source_files"])]
    differing = [name for name in compared if getattr(manifest, name) != inputs[name]]
    if differing:
        changes = ", ".join(f"{name}: {_short(getattr(manifest, name))} there, {_short(inputs[name])} now" for name in differing)
        raise DataError(f"{prefix} exists and was made from something else ({changes}). {_delete(prefix)}")
    check_manifest(prefix, tokenizer_hash=inputs["tokenizer_hash"])
    get_logger().info(f"reusing {prefix}: {manifest.num_documents} documents, {manifest.num_tokens} tokens")
    return manifest


def local_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files of `source` in a fixed order; empty if it is the name of a hub dataset.

    Raises:
        DataError: no file exists, a file has an unsupported kind, or the kinds cannot be combined.
    """
    items = _as_list(source)
    if not items:
        raise DataError("source is an empty list: name a file, a folder, a glob or a hub dataset.")
    if len(items) == 1 and _is_hub_name(str(items[0])):
        return []
    files: list[Path] = []
    for item in items:
        found = files_named(item)
        if not found:
            raise DataError(f"source {item} does not exist, or names no {', '.join(KINDS)} file.")
        files += found
    unreadable = [path for path in files if kind_of(path) is None]
    if unreadable:
        raise DataError(f"source {unreadable[0]}: cannot be read; the files must end in {', '.join(KINDS)}.")
    plain = {kind.split(".")[1] for kind in map(kind_of, files) if kind is not None}
    if "txt" in plain and len(plain) > 1:
        raise DataError(
            f"{_named(source)} mixes {', '.join(sorted(f'.{kind}' for kind in plain))}: a .txt file is one document, a file of another "
            f"kind has one document per row. Prepare each kind separately."
        )
    return files


def _is_hub_name(source: str) -> bool:
    """Whether `source` has the form of a hub dataset ("name" or "owner/name") and not of a path, which may be misspelt."""
    looks_like_path = kind_of(Path(source)) is not None or source.startswith((".", "/", "~")) or Path(source).exists()
    return not looks_like_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def _text_batches(source: Any, files: list[Path], *, text_key: str, split: str, config_name: str | None) -> Iterator[list[str | None]]:
    """Yield batches of texts as a stream: neither copied to disk nor held in memory as a whole."""
    if files:
        rows = chain.from_iterable(read_rows(path, text_key=text_key) for path in files)
        while batch := list(islice(rows, BATCH_DOCUMENTS)):
            yield batch
        return
    import datasets  # the import takes two seconds, and only hub datasets need it

    try:
        hub = datasets.load_dataset(str(_as_list(source)[0]), config_name, split=split, streaming=True)
        yield from (_column(batch, text_key, source) for batch in hub.iter(batch_size=BATCH_DOCUMENTS))
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, the hub and the file system each raise their own
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        home = ""
        if isinstance(error, OSError):
            home = " If the Hugging Face cache is not writable, set HF_HOME to a writable directory."
        raise DataError(
            f"{_named(source)}: datasets cannot read it ({cause}). If it was meant as a path, that path does not exist.{home}"
        ) from error


def _column(batch: dict[str, list[Any]], text_key: str, source: Any) -> list[str | None]:
    if text_key not in batch:
        raise DataError(f"{_named(source)} has no column '{text_key}'; it has: {', '.join(batch)}. Set text_key to one of them.")
    for value in batch[text_key]:
        if value is not None and not isinstance(value, str):
            raise DataError(f"{_named(source)}: column '{text_key}' holds {type(value).__name__}, not text. Set text_key.")
    return batch[text_key]


def _encodable(text: str) -> tuple[str, int]:
    """Replace lone surrogates by U+FFFD, because tokenizers reject them; return (text, number of replacements)."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        cleaned = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return cleaned, sum(one != other for one, other in zip(text, cleaned, strict=True))


@contextmanager
def _replacing(prefix: Path) -> Iterator[dict[str, Path]]:
    """Yield temporary paths. They are renamed to their final names if the block succeeds, the manifest last, and deleted if it fails."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    temporary = _paths(Path(prefix).with_name(f".{Path(prefix).name}.{os.getpid()}.tmp"))
    try:
        yield temporary
        for kind, path in _paths(prefix).items():
            temporary[kind].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _paths(prefix: Path) -> dict[str, Path]:
    # not with_suffix: a prefix may contain dots
    return {kind: Path(f"{prefix}.{ending}") for kind, ending in (("bin", "bin"), ("idx", "idx"), ("manifest", "manifest.json"))}


def _as_list(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [source] if isinstance(source, str | Path) else list(source)


def _named(source: str | Path | Sequence[str | Path]) -> str:
    return f"source {', '.join(str(item) for item in _as_list(source))}"


def _delete(prefix: Path) -> str:
    return f"Delete {prefix}.bin, .idx and .manifest.json; the same command creates them again."


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
