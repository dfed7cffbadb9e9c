"""Tokenise text into Megatron's indexed format (`.bin` and `.idx`) with a manifest. text_files.py reads local files, and the package
`datasets` reads hub datasets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from endprompt_megatron.data.manifest import (
    Check,
    Manifest,
    check_manifest,
    complete_interrupted,
    dataset_paths,
    delete_hint,
    has_manifest,
    load_manifest,
    record_files,
    rename_dataset,
    sha256_of,
)
from endprompt_megatron.data.text_files import KINDS, files_named, kind_of, read_rows
from endprompt_megatron.errors import DataError
from endprompt_megatron.log import Progress, get_logger
from endprompt_megatron.output_files import sweep_leftovers, temporary_name

BATCH_DOCUMENTS = 64  # documents per tokenizer call; enough for all threads of the tokenizer, and little memory even for books


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
    check: Check = "changed",
) -> Manifest:
    """Tokenise `source` into `<output_prefix>.bin`, `.idx` and `.manifest.json`, or reuse these files if they exist.

    Each row is one document, and each .txt file is one document. No special tokens are added except the end-of-text token.

    Args:
        source: a .jsonl, .json, .parquet or .txt file (plain, .gz or .zst), a folder or glob of them, or a list of any of these; or the
            name of a hub dataset.
        tokenizer: a transformers tokenizer.
        tokenizer_hash: hash of the tokenizer, from `checkpoint.hf.tokenizer.hash_tokenizer`.
        output_prefix: path of the output without suffix.
        text_key: name of the text column.
        append_eod: append the tokenizer's eos token to each document.
        split: split of a hub dataset.
        config_name: configuration of a hub dataset that has several.
        check: files of an existing output to compare with their SHA-256; see `check_manifest`.
    Returns:
        The manifest, which is also written to disk.
    Raises:
        DataError: the source is missing, unreadable or without text, the column or the eos token is missing, the output cannot be written,
            or an existing output is damaged or was made from another source.
    """
    files = local_files(source)
    if append_eod and tokenizer.eos_token_id is None:
        raise DataError("append_eod=True, but the tokenizer has no eos token. Set its eos_token in tokenizer_config.json.")
    inputs: dict[str, Any] = {
        "source": [str(item) for item in _as_list(source)],
        "source_files": [_source_sha256(path) for path in files],
        "config_name": config_name,
        "split": split,
        "text_key": text_key,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "append_eod": append_eod,
    }
    output_prefix = Path(output_prefix)
    complete_interrupted(output_prefix.parent)
    sweep_leftovers(output_prefix.parent)
    if any(path.exists() for path in dataset_paths(output_prefix).values()):
        return _reuse(output_prefix, inputs, check)
    temporary = temporary_name(output_prefix)
    try:
        output_prefix.parent.mkdir(parents=True, exist_ok=True)
        batches = _text_batches(source, files, text_key=text_key, split=split, config_name=config_name)
        counts = _tokenise(batches, tokenizer, temporary, name=output_prefix.name, append_eod=append_eod)
        if counts["num_documents"] == 0:
            raise DataError(f"{_named(source)}: no text in column '{text_key}' ({counts['num_empty_documents']} empty rows).")
        versions = {name: metadata.version(name) for name in ("datasets", "megatron-core", "tokenizers", "transformers")}
        manifest = record_files(temporary, {**inputs, **counts, "versions": versions})
        if has_manifest(output_prefix):  # another process has written the dataset
            return _reuse(output_prefix, inputs, check)
        rename_dataset(temporary, output_prefix)
    except OSError as error:
        raise DataError(
            f"{output_prefix}.bin cannot be written ({type(error).__name__}: {error}). Free space there, or set data.directory to a "
            f"writable directory. Nothing was kept; the same command tokenises again."
        ) from error
    finally:
        for path in temporary.parent.glob(f"{glob.escape(temporary.name)}.*"):
            with suppress(OSError):  # if the disk became read-only, the original error is raised
                path.unlink(missing_ok=True)
    replaced = manifest.num_replaced_characters
    note = f" ({replaced} lone surrogate{'' if replaced == 1 else 's'} replaced by U+FFFD)" if replaced else ""
    get_logger().info(f"wrote {output_prefix}: {manifest.num_documents} documents, {manifest.num_tokens} tokens{note}")
    return manifest


def _tokenise(batches: Iterator[list[str | None]], tokenizer: Any, prefix: Path, *, name: str, append_eod: bool) -> dict[str, Any]:
    """Write the .bin and .idx files of `prefix`, and return the counts and dtype for the manifest. Without any text, no .idx file is
    written."""
    paths = dataset_paths(prefix)
    dtype = DType.optimal_dtype(len(tokenizer))
    eod = [tokenizer.eos_token_id] if append_eod else []
    counts: dict[str, Any] = {"num_documents": 0, "num_tokens": 0, "num_empty_documents": 0, "num_replaced_characters": 0}
    with Progress(f"tokenising {name}", None) as progress:
        builder = IndexedDatasetBuilder(str(paths["bin"]), dtype=dtype)
        with builder.data_file:
            for texts in batches:
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
            if counts["num_documents"]:
                builder.finalize(str(paths["idx"]))
    return {**counts, "dtype": np.dtype(dtype).name}


def _source_sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"source {path}: cannot be read ({type(error).__name__}: {error}).") from error


def read_texts(source: str | Path | Sequence[str | Path], *, text_key: str = "text", split: str = "train") -> Iterator[str]:
    """Yield the nonempty documents of a source in order. The source has the same form as in `prepare_dataset`.

    Raises:
        DataError: the source is missing or unreadable, or the column is missing.
    """
    for batch in _text_batches(source, local_files(source), text_key=text_key, split=split, config_name=None):
        yield from (_encodable(text)[0] for text in batch if text is not None and text.strip())


def _reuse(prefix: Path, inputs: dict[str, Any], check: Check) -> Manifest:
    """Return the manifest of an existing output.

    Raises:
        DataError: the output is incomplete or damaged, or was not made from `inputs`.
    """
    paths = dataset_paths(prefix)
    if not paths["manifest"].exists():
        there = next(path for path in paths.values() if path.exists())
        raise DataError(f"{there} exists without a manifest: it was written by another program, or not completely. {delete_hint(prefix)}")
    manifest = load_manifest(prefix)
    # local files are compared by content, not by path
    compared = [name for name in inputs if not (name == "source" and inputs["source_files"])]
    differing = [name for name in compared if getattr(manifest, name) != inputs[name]]
    if differing:
        changes = ", ".join(f"{name}: {_short(getattr(manifest, name))} there, {_short(inputs[name])} now" for name in differing)
        raise DataError(f"{prefix} exists and was made from something else ({changes}). {delete_hint(prefix)}")
    manifest = check_manifest(prefix, tokenizer_hash=inputs["tokenizer_hash"], check=check)
    get_logger().info(f"reusing {prefix}: {manifest.num_documents} documents, {manifest.num_tokens} tokens")
    return manifest


def local_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files of `source` in a fixed order. The list is empty if `source` is the name of a hub dataset.

    Raises:
        DataError: a path matches no file, a file has an unsupported kind, or the kinds cannot be combined.
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
    """Return whether `source` is the name of a hub dataset ("name" or "owner/name"). A string that looks like a path is never a name, even
    if no such file exists, because the path may be misspelt."""
    looks_like_path = kind_of(Path(source)) is not None or source.startswith((".", "/", "~")) or Path(source).exists()
    return not looks_like_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def _text_batches(source: Any, files: list[Path], *, text_key: str, split: str, config_name: str | None) -> Iterator[list[str | None]]:
    """Yield the texts in batches. The source is streamed, and is neither copied to disk nor loaded into memory as a whole."""
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
    except Exception as error:  # datasets, pyarrow, the hub and the file system have their own exceptions
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
    """Replace lone surrogates by U+FFFD, because tokenizers reject them. Return (text, number of replacements)."""
    try:
        text.encode("utf-8")
        return text, 0
    except UnicodeEncodeError:
        cleaned = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return cleaned, sum(one != other for one, other in zip(text, cleaned, strict=True))


def _as_list(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [source] if isinstance(source, str | Path) else list(source)


def _named(source: str | Path | Sequence[str | Path]) -> str:
    return f"source {', '.join(str(item) for item in _as_list(source))}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
