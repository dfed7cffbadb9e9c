"""Read the rows of local text files. The files are .jsonl, .json, .parquet or .txt files, either uncompressed or with .gz or .zst
compression. Only the text column is read, so the other columns may differ between files. Error messages state the file and the row."""

from __future__ import annotations

import glob
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from endprompt_megatron.errors import DataError

_PLAIN = (".jsonl", ".json", ".parquet", ".txt")
_PACKED = ("", ".gz", ".zst")
KINDS = tuple(kind + packed for kind in _PLAIN for packed in _PACKED)
_ROWS_AT_ONCE = 1024  # rows per batch of a parquet file
_PACKED_BYTES = 2**17  # bytes of a .zst file per read
_SHOWN = 60  # characters of a damaged line in an error message


def kind_of(path: Path) -> str | None:
    """Return the kind of a file, which is one of KINDS, or None for any other file. Upper and lower case are equivalent."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    for count in (2, 1):
        joined = "".join(suffixes[-count:])
        if joined in KINDS:
            return joined
    return None


def files_named(item: str | Path) -> list[Path]:
    """Return the files for a path of the config, in a fixed order.

    Args:
        item: file, folder or glob pattern. An existing file or folder of this name takes precedence over a pattern, even if the name
            contains [ ] * ? or ::.
    Returns:
        For a folder, the files of KINDS in the folder and its subfolders. For a file, the file itself, whatever its kind. Otherwise, the
        files that match the pattern. The list is empty if no file exists.
    """
    path = Path(item).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file))
    if path.is_file():
        return [path]
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())


def read_rows(path: Path, *, text_key: str) -> Iterator[str | None]:
    """Yield the text of each row of a file in order, or None if the text is null or missing. A .txt file is a single row.

    Raises:
        DataError: the file cannot be read, a row is damaged, no row has the column, or the column does not contain text. The message states
            the file and the row.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"source {path}: cannot be read; the files must end in {', '.join(KINDS)}.")
    reader = _READERS[next(plain for plain in _PLAIN if kind == plain or kind.startswith(plain + "."))]
    with _explained(path):
        if not path.stat().st_size:
            return
        with _opened(path, kind) as stream:
            yield from reader(path, stream, text_key)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, ImportError) as error:
        raise DataError(f"source {path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}).") from error
    except Exception as error:  # pyarrow and zstandard have their own exceptions
        if type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard", "zlib"):
            raise
        raise DataError(f"source {path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}).") from error


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[IO[bytes]]:
    if kind.endswith(".gz"):
        with gzip.open(path) as stream:
            yield cast(IO[bytes], stream)
    elif kind.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"source {path}: .zst needs the package zstandard. pip install zstandard, or unpack the file.") from error
        with path.open("rb") as packed:
            yield io.BufferedReader(_ZstdStream(packed, zstandard.ZstdDecompressor()))
    else:
        with path.open("rb") as stream:
            yield stream


class _ZstdStream(io.RawIOBase):
    """Stream that decompresses all frames of a .zst file. Unlike zstandard's stream reader, this class raises EOFError if the last frame is
    truncated."""

    def __init__(self, packed: IO[bytes], decompressor: Any):
        self._packed, self._decompressor = packed, decompressor
        self._frame: Any = None
        self._rest, self._out = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            chunk = self._rest or self._packed.read(_PACKED_BYTES)
            self._rest = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._out = self._frame.decompress(chunk)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count


def _json_lines(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str | None]:
    def rows() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, _parsed(path, number, line)

    yield from _texts(path, rows(), text_key)


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        shown = line[:_SHOWN].decode("utf-8", errors="replace").strip()
        raise DataError(f"source {path}, line {number}: not JSON ({error}): {shown!r}.") from error


def _json(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str | None]:
    """Yield the texts of a .json file, which contains an array of rows, a single row, or one row per line."""
    content = stream.read()
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        yield from _json_lines(path, io.BytesIO(content), text_key)
        return
    rows = whole if isinstance(whole, list) else [whole]
    yield from _texts(path, enumerate(rows, start=1), text_key)


def _texts(path: Path, rows: Iterator[tuple[int, Any]], text_key: str) -> Iterator[str | None]:
    """Yield the text of each row. If any row of the file has the column, a row without the column counts as empty."""
    columns: dict[str, None] = {}
    found = False
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"source {path}, row {number}: {type(row).__name__} instead of an object with a column '{text_key}'.")
        columns.update(dict.fromkeys(row))
        found = found or text_key in row
        yield _text(path, number, row.get(text_key), text_key)
    if columns and not found:
        raise _no_column(path, text_key, list(columns))


def _text(path: Path, number: int, value: Any, text_key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"source {path}, row {number}: column '{text_key}' holds {type(value).__name__}, not text. Set text_key to the text column."
        )
    return value


def _no_column(path: Path, text_key: str, columns: list[str]) -> DataError:
    return DataError(f"source {path} has no column '{text_key}'; it has: {', '.join(columns)}. Set text_key to one of them.")


def _parquet(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str | None]:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
    if text_key not in table.schema_arrow.names:
        raise _no_column(path, text_key, table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[text_key]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _text(path, number, value, text_key)


def _plain_text(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str | None]:
    content = stream.read()
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"source {path}: is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}). Convert it, for example with iconv."
        ) from error


_READERS: dict[str, Callable[[Path, IO[bytes], str], Iterator[str | None]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _plain_text,
}
