"""Read the texts of a local folder, for tasks that hide facts in prose. lm-eval's essay tasks read the same folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from endprompt_megatron.errors import DataError


def read_texts(folder: Path) -> list[str]:
    """Return every text of a folder, sorted by path.

    Args:
        folder: folder with .txt files of one text each, or .jsonl or .parquet files with rows {"text"}. Subfolders are read too.
    Raises:
        DataError: the folder contains no text, or a file has another format.
    """
    folder = Path(folder).expanduser()
    texts: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in _READERS and path.is_file():
            try:
                texts += _READERS[path.suffix](path)
            except (ValueError, KeyError, TypeError) as error:  # pyarrow's own errors are ValueErrors
                raise DataError(f'{path}: no rows {{"text"}} there ({error!r}). Provide .txt, or rows in .jsonl or .parquet.') from error
    if not any(text.strip() for text in texts):
        raise DataError(f'{folder}: no text there. Provide .txt files, or .jsonl or .parquet files with rows {{"text"}}.')
    return texts


def _jsonl(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)["text"]


def _parquet(path: Path) -> list[str]:
    import pyarrow.parquet  # the import takes half a second; pyarrow is a dependency of datasets

    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


_READERS = {".txt": lambda path: [path.read_text(encoding="utf-8")], ".jsonl": _jsonl, ".parquet": _parquet}
