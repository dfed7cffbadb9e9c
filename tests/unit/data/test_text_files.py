"""Local text files: names with special characters, different columns, compressed files, damaged rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from endprompt_megatron.data.text_files import KINDS, files_named, kind_of, read_rows
from endprompt_megatron.errors import DataError

TEXTS = ["First.", "Zweite: ü.", "第三。"]


def _lines(texts: list, **columns) -> bytes:
    return "".join(json.dumps({"text": text, **columns}, ensure_ascii=False) + "\n" for text in texts).encode()


def _content(kind: str, folder: Path) -> tuple[bytes, list[str]]:
    plain = kind.split(".")[1]
    if plain == "jsonl":
        return _lines(TEXTS), TEXTS
    if plain == "json":
        return json.dumps([{"text": text} for text in TEXTS]).encode(), TEXTS
    if plain == "txt":
        return TEXTS[1].encode(), TEXTS[1:2]
    pq.write_table(pa.table({"other": [1, 2, 3], "text": TEXTS}), folder / "made")
    return (folder / "made").read_bytes(), TEXTS


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(tmp_path, kind, upper):
    content, expected = _content(kind, tmp_path)
    if kind.endswith(".gz"):
        content = gzip.compress(content)
    elif kind.endswith(".zst"):  # two frames, as parallel compressors write them
        content = zstandard.compress(content[:7]) + zstandard.compress(content[7:])
    path = tmp_path / f"my.texts{kind.upper() if upper else kind}"
    path.write_bytes(content)
    assert kind_of(path) == kind and list(read_rows(path, text_key="text")) == expected


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "zip::a.jsonl", "a b.jsonl", "[x] y/b.jsonl", "{a,b}.jsonl", "训练.jsonl"]
)
def test_a_file_that_exists_is_that_file_whatever_its_name(tmp_path, name):
    """Also if the name, read as a glob, matches other files."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_lines(["the right one"]))
    for other in ("a1.jsonl", "ab.jsonl", "axx.jsonl", "x"):
        if not (tmp_path / other).exists():
            (tmp_path / other).write_bytes(_lines(["another"]))
    assert files_named(path) == [path] and list(read_rows(path, text_key="text")) == ["the right one"]
    if path.parent != tmp_path:
        assert files_named(path.parent) == [path]


def test_globs_match_where_no_file_has_the_name(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(_lines([name]))
    assert [path.name for path in files_named(tmp_path / "a?.jsonl")] == ["a1.jsonl", "a2.jsonl"]
    assert files_named(tmp_path / "c*.jsonl") == []


def test_other_columns_may_be_anything(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": 1, "text": "a"}, {"id": "two", "text": "b", "meta": {"x": [1]}}, {"meta": None}, {"text": None, "id": None}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n  \n")
    assert list(read_rows(path, text_key="text")) == ["a", "b", None, None]


def test_files_without_rows(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    (tmp_path / "empty.jsonl").write_text("")
    pq.write_table(pa.table({"text": pa.array([], type=pa.string())}), tmp_path / "rows.parquet")
    for name in ("blank.jsonl", "empty.jsonl", "rows.parquet"):
        assert list(read_rows(tmp_path / name, text_key="text")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a.jsonl, line 2: not JSON .*'\{\"text\": \"b'"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, row 2: list instead of an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "a.jsonl, row 2: column 'text' holds int, not text"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "a.jsonl has no column 'text'; it has: body, id. Set text_key"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON"),
        ("a.txt", b"abc\xffd", "a.txt: is not UTF-8 .byte 3 is 0xff"),
        ("a.parquet", b"no parquet file", "a.parquet: cannot be read"),
        ("a.jsonl.gz", b"not packed", "a.jsonl.gz: cannot be read .BadGzipFile"),
        ("a.jsonl.gz", gzip.compress(_lines(TEXTS * 999))[:-60], "a.jsonl.gz: cannot be read .EOFError"),
        ("a.jsonl.zst", zstandard.compress(_lines(TEXTS))[:20], "a.jsonl.zst"),
        ("a.csv", b"text\na", r"a.csv: cannot be read; the files must end in .jsonl, .jsonl.gz"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name, text_key="text"))
