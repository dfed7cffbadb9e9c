"""Local prose in the forms that lm-eval's essay tasks read too."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.ruler.haystack_texts import read_texts


def test_every_form_is_read_in_the_order_of_the_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second, ü", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first", "title": "x"}) + "\n\n" + json.dumps({"text": "first again"}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["third"], "id": [1]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "README.md").write_text("no text")
    assert read_texts(tmp_path) == ["first", "first again", "second, ü", "third"]


def test_files_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="no text there"):
        read_texts(tmp_path)
    for name, content in (("a.jsonl", b'{"body": "x"}'), ("a.jsonl", b"no json"), ("a.parquet", b"PAR1"), ("a.txt", b"\xff")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.(jsonl|parquet|txt): no rows"):
            read_texts(tmp_path)
        path.unlink()
