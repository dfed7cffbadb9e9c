"""The corpora of a config: named, local or hub texts turned into indexed datasets on first use, and read as text for the probes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.config.schema import TextSource
from endprompt_megatron.data.dataset import Blend
from endprompt_megatron.data.preprocess import (
    check_manifest,
    has_manifest,
    load_manifest,
    local_files,
    prepare_dataset,
    read_texts,
)
from endprompt_megatron.data.texts import SOURCES, fetch_texts
from endprompt_megatron.errors import ConfigError, DataError

_PACKAGE, _INDEXED = "package:", "indexed:"


@dataclass(frozen=True)
class CorpusState:
    """What is there of a corpus before a run.

    Attributes:
        path: as configured.
        weight: share in the blend, relative to the others.
        num_tokens: of its indexed dataset; None where there is none yet.
        words: what is there, and what the run will do about the rest.
    """

    path: str
    weight: float
    num_tokens: int | None
    words: str


def prepare_corpora(sources: list[TextSource], *, directory: Path, tokenizer: Any, tokenizer_hash: str) -> tuple[Blend, dict[str, str]]:
    """Fetch and index what is not there yet.

    Args:
        sources: corpora of the config.
        directory: where texts and indexed datasets are kept.
        tokenizer, tokenizer_hash: of the base model.
    Returns:
        (blend, {prefix: SHA-256 of its manifest's inputs}) in the order of the sources.
    Raises:
        DataError: text that is missing or empty, or an indexed dataset that is damaged or was made with another tokenizer.
    """
    prefixes, hashes = [], {}
    for source in sources:
        if source.path.startswith(_INDEXED):
            prefix = Path(source.path.removeprefix(_INDEXED))
            manifest = check_manifest(prefix, tokenizer_hash=tokenizer_hash)
        else:
            prefix = _prefix(source, directory, tokenizer_hash)
            manifest = prepare_dataset(
                _resolve(source.path, directory),
                tokenizer=tokenizer,
                tokenizer_hash=tokenizer_hash,
                output_prefix=prefix,
                text_key=source.text_key,
            )
        prefixes.append(str(prefix))
        hashes[str(prefix)] = manifest.identity()
    return Blend(prefixes, [source.weight for source in sources]), hashes


def inspect_corpora(sources: list[TextSource], *, directory: Path, tokenizer_hash: str | None) -> list[CorpusState]:
    """What is there of each corpus, without fetching, tokenising or writing anything.

    Args:
        sources: corpora of the config.
        directory: where texts and indexed datasets are kept.
        tokenizer_hash: of the base model; None while its tokenizer is not at hand.
    Raises:
        ConfigError: a package that nobody knows.
        DataError: an indexed dataset that is damaged or was made with another tokenizer.
    """
    return [_inspect(source, Path(directory), tokenizer_hash) for source in sources]


def _inspect(source: TextSource, directory: Path, tokenizer_hash: str | None) -> CorpusState:
    def state(words: str, num_tokens: int | None = None) -> CorpusState:
        return CorpusState(source.path, source.weight, num_tokens, words)

    prefix = None
    if source.path.startswith(_INDEXED):
        prefix = Path(source.path.removeprefix(_INDEXED))
        if not has_manifest(prefix):
            return state("not there yet: needed before the run; recipes/prepare_data.py makes it")
    elif tokenizer_hash is not None:
        try:
            prefix = _prefix(source, directory, tokenizer_hash)
        except DataError as error:
            return state(f"not there yet: needed before the run ({error})")
    if prefix is not None and has_manifest(prefix):
        manifest = load_manifest(prefix) if tokenizer_hash is None else check_manifest(prefix, tokenizer_hash=tokenizer_hash)
        return state(f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens in {prefix}", manifest.num_tokens)
    if source.path.startswith(_PACKAGE):
        name, part = _package_part(source.path)
        there = (directory / "texts" / name / f"{part}.jsonl").is_file()
        return state("will be tokenised on first use" if there else "not there yet: will be fetched and tokenised on first use")
    try:
        files = local_files(source.path)
    except DataError as error:
        return state(f"not there yet: needed before the run ({error})")
    if not files:
        return state("a dataset of the hub: will be fetched and tokenised on first use")
    return state(f"{len(files):,} file{'' if len(files) == 1 else 's'}, will be tokenised on first use")


def corpus_texts(sources: list[TextSource], *, directory: Path) -> Iterator[str]:
    """The documents of the corpora, one corpus after the other.

    Raises:
        DataError: an indexed dataset is named: tokens are no text.
    """
    for source in sources:
        if source.path.startswith(_INDEXED):
            raise DataError(f"{source.path}: text is needed here, not an indexed dataset. Name the .jsonl it was made from.")
        yield from read_texts(_resolve(source.path, directory), text_key=source.text_key)


def check_corpora(sources: list[TextSource], *, directory: Path) -> None:
    """Fetch what is named as a package and read the first document of each corpus.

    Raises:
        DataError: a corpus is missing, unreadable or empty.
    """
    for source in sources:
        if next(corpus_texts([source], directory=directory), None) is None:
            raise DataError(f"{source.path}: holds no text. Name a corpus with at least one document.")


def _resolve(path: str, directory: Path) -> str:
    if not path.startswith(_PACKAGE):
        return path
    name, part = _package_part(path)
    return str(fetch_texts([name], Path(directory) / "texts")[name][part])


def _package_part(path: str) -> tuple[str, str]:
    """Name and part, "train" or "heldout", of `package:NAME/PART`."""
    name, _, part = path.removeprefix(_PACKAGE).partition("/")
    if name not in SOURCES:
        raise ConfigError(f"{path}: no text of this name. Choose one of {', '.join(SOURCES)}.")
    if part not in ("train", "heldout"):
        raise DataError(f"{path}: write package:{name}/train or package:{name}/heldout.")
    return name, part


def _prefix(source: TextSource, directory: Path, tokenizer_hash: str) -> Path:
    name = _slug(source.path)
    if not source.path.startswith(_PACKAGE):
        name = f"{name}-{_identity(source)}"
    return Path(directory) / "indexed" / f"{name}-{tokenizer_hash[:8]}"


def _identity(source: TextSource) -> str:
    """What keeps two corpora apart whose names look alike: the files by name and size, or the hub's name, and the column that is read."""
    files = [(str(path.resolve()), path.stat().st_size) for path in local_files(source.path)]
    return hashlib.sha256(json.dumps([files or source.path, source.text_key]).encode()).hexdigest()[:8]


def _slug(path: str) -> str:
    """A readable part of a file name: of a path its end."""
    return re.sub(r"[^A-Za-z0-9]+", "-", path.removeprefix(_PACKAGE)).strip("-").lower()[-40:].strip("-") or "text"
