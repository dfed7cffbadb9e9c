"""Names of the indexed datasets of corpora."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.config.schema import TextSource
from endprompt_megatron.data.corpora import inspect_corpora, prepare_corpora


@pytest.fixture
def prepare(tiny_model_dir, tmp_path):
    options = dict(directory=tmp_path / "datasets", tokenizer=load_tokenizer(tiny_model_dir), tokenizer_hash=hash_tokenizer(tiny_model_dir))
    return lambda *sources: prepare_corpora(list(sources), **options)[0].prefixes


def _write(path: Path, *rows: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_names_that_look_alike_have_an_index_each(prepare, tmp_path):
    row = {"text": "A question.", "question": "Who?", "answer": "He."}
    names = (
        "训练.jsonl",
        "验证.jsonl",
        "EN_v1.jsonl",
        "en-v1.jsonl",
        "a" * 120 + "1.jsonl",
        "a" * 120 + "2.jsonl",
        "x/same.jsonl",
        "y/same.jsonl",
    )
    sources = [TextSource(_write(tmp_path / name, row)) for name in names]
    sources += [TextSource(sources[0].path, text_key=key) for key in ("question", "answer")]
    prefixes = prepare(*sources)
    assert len(set(prefixes)) == len(sources) and prepare(*sources) == prefixes
    assert all(len(Path(prefix).name) < 80 for prefix in prefixes)


def test_a_file_that_has_grown_has_an_index_of_its_own(prepare, tmp_path):
    path = _write(tmp_path / "a.jsonl", {"text": "one"})
    before = prepare(TextSource(path))
    _write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    assert prepare(TextSource(path)) != before


def test_a_corpus_that_is_not_there_yet_is_described(tiny_model_dir, tmp_path):
    options = dict(directory=tmp_path / "datasets", tokenizer_hash=hash_tokenizer(tiny_model_dir))
    (state,) = inspect_corpora([TextSource(str(tmp_path / "missing.jsonl"))], **options)
    assert state.num_tokens is None and "needed before the run" in state.description
