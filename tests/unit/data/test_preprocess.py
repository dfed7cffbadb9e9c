"""Round trip text -> .bin/.idx -> ids -> text, and errors for damaged or mismatched datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.data import preprocess
from endprompt_megatron.data.manifest import check_manifest, load_manifest
from endprompt_megatron.data.preprocess import prepare_dataset
from endprompt_megatron.errors import DataError

TEXTS = ["The key is 48213.\n\n3:16 And  two spaces.", "naïve café, 日本, 🎉", "End. " * 200]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_random(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> dict:
    return {"tokenizer": load_tokenizer(tokenizer_dir), "tokenizer_hash": hash_tokenizer(tokenizer_dir)}


def write_jsonl(path: Path, texts: list, key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text, "id": index}) + "\n" for index, text in enumerate(texts)))
    return path


def documents(prefix: Path) -> list[np.ndarray]:
    indexed = IndexedDataset(str(prefix))
    assert list(indexed.document_indices) == list(range(len(indexed) + 1))
    return [indexed[index].copy() for index in range(len(indexed))]  # views of a file that closes with `indexed`


def test_text_comes_back_from_disk(tmp_path, tokenizer):
    prefix = tmp_path / "out" / "set.v1"
    manifest = prepare_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), output_prefix=prefix, **tokenizer)
    found = documents(prefix)
    eos = tokenizer["tokenizer"].eos_token_id
    assert [tokenizer["tokenizer"].decode(ids[:-1]) for ids in found] == TEXTS
    assert all(ids[-1] == eos and eos not in ids[:-1] for ids in found)
    assert manifest.num_documents == 3 and manifest.num_tokens == sum(map(len, found))
    assert manifest.dtype == "uint16" == str(found[0].dtype)
    assert manifest.bin_bytes == 2 * manifest.num_tokens
    assert load_manifest(prefix) == check_manifest(prefix, tokenizer_hash=tokenizer["tokenizer_hash"]) == manifest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["set.v1.bin", "set.v1.idx", "set.v1.manifest.json"]


def test_without_end_of_text(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with_eod = prepare_dataset(source, output_prefix=tmp_path / "with", **tokenizer)
    without = prepare_dataset(source, output_prefix=tmp_path / "without", append_eod=False, **tokenizer)
    assert with_eod.num_tokens - without.num_tokens == len(TEXTS)
    assert [tokenizer["tokenizer"].decode(ids) for ids in documents(tmp_path / "without")] == TEXTS


def test_large_vocabulary_is_stored_in_int32(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer["tokenizer"]), "__len__", lambda _: 128256)
    manifest = prepare_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), output_prefix=tmp_path / "b", **tokenizer)
    assert manifest.dtype == "int32" and manifest.bin_bytes == 4 * manifest.num_tokens
    assert tokenizer["tokenizer"].decode(documents(tmp_path / "b")[1][:-1]) == TEXTS[1]


def test_more_documents_than_a_batch_keep_their_order(tmp_path, tokenizer):
    texts = [f"Story {index} of {index * 7}." for index in range(3 * preprocess.BATCH_DOCUMENTS + 5)]
    prepare_dataset(write_jsonl(tmp_path / "a.jsonl", texts), output_prefix=tmp_path / "b", **tokenizer)
    assert [tokenizer["tokenizer"].decode(ids[:-1]) for ids in documents(tmp_path / "b")] == texts


def test_every_kind_of_source_gives_the_same_tokens(tmp_path, tokenizer):
    jsonl = write_jsonl(tmp_path / "one" / "a.jsonl", TEXTS)
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    pq.write_table(pa.table({"body": TEXTS, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    for index, text in enumerate(TEXTS):
        (tmp_path / f"part_{index}.txt").write_text(text)
    write_jsonl(tmp_path / "folder" / "1.jsonl", TEXTS[:1])
    write_jsonl(tmp_path / "folder" / "deeper" / "2.jsonl", TEXTS[1:])
    (tmp_path / "folder" / "README.md").write_text("not data")
    sources = {
        "path": (jsonl, "text"),
        "string": (str(jsonl), "text"),
        "array": (tmp_path / "array.json", "text"),
        "parquet": (tmp_path / "a.parquet", "body"),
        "glob": (str(tmp_path / "part_*.txt"), "text"),
        "folder": (tmp_path / "folder", "text"),
        "list": ([tmp_path / "folder" / "1.jsonl", tmp_path / "folder" / "deeper" / "2.jsonl"], "text"),
    }
    for name, (source, key) in sources.items():
        manifest = prepare_dataset(source, output_prefix=tmp_path / name, text_key=key, **tokenizer)
        assert manifest.num_documents == 3, name
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "path.bin").read_bytes(), name


def test_hub_name_goes_to_datasets(tmp_path, tokenizer, monkeypatch):
    import datasets

    call = {}

    def load_dataset(*args, **kwargs):
        call["args"], call["kwargs"] = args, kwargs
        return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manifest = prepare_dataset("owner/corpus", output_prefix=tmp_path / "b", split="validation", config_name="en", **tokenizer)
    assert call == {"args": ("owner/corpus", "en"), "kwargs": {"split": "validation", "streaming": True}}
    assert manifest.source == ["owner/corpus"] and manifest.source_files == [] and manifest.num_documents == 3


def test_hub_out_of_reach(tmp_path, tokenizer, monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="owner/corpus.*no route.*meant as a path.*set HF_HOME to a writable directory"):
        prepare_dataset("owner/corpus", output_prefix=tmp_path / "b", **tokenizer)


def test_empty_documents_are_counted_and_left_out(tmp_path, tokenizer):
    texts = ["", TEXTS[0], None, "  \n", TEXTS[1]]
    manifest = prepare_dataset(write_jsonl(tmp_path / "a.jsonl", texts), output_prefix=tmp_path / "b", **tokenizer)
    assert (manifest.num_documents, manifest.num_empty_documents) == (2, 3)
    assert len(documents(tmp_path / "b")) == 2


def test_same_inputs_reuse_the_output(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = prepare_dataset(source, output_prefix=tmp_path / "b", **tokenizer)
    written = (tmp_path / "b.bin").stat().st_mtime_ns
    moved = source.rename(tmp_path / "moved.jsonl")
    assert prepare_dataset(moved, output_prefix=tmp_path / "b", **tokenizer) == first
    assert (tmp_path / "b.bin").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_hash": "f" * 64}, "tokenizer_hash"),
        ({"append_eod": False}, "append_eod: True there, False now"),
        ({"text_key": "id"}, "text_key"),
    ],
)
def test_output_of_other_inputs_is_not_touched(tmp_path, tokenizer, change, message):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_dataset(source, output_prefix=tmp_path / "b", **tokenizer)
    before = (tmp_path / "b.bin").read_bytes()
    with pytest.raises(DataError, match=f"made from something else.*{message}.*Delete .*b.bin, .idx and"):
        prepare_dataset(source, output_prefix=tmp_path / "b", **(tokenizer | change))
    write_jsonl(source, ["another text"])
    with pytest.raises(DataError, match="made from something else.*source_files"):
        prepare_dataset(source, output_prefix=tmp_path / "b", **tokenizer)
    assert (tmp_path / "b.bin").read_bytes() == before


def test_output_without_manifest_is_not_overwritten(tmp_path, tokenizer):
    (tmp_path / "b.bin").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="without a manifest"):
        prepare_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), output_prefix=tmp_path / "b", **tokenizer)
    assert (tmp_path / "b.bin").read_bytes() == b"somebody's"


def test_bad_sources(tmp_path, tokenizer):
    cases = {
        "missing.jsonl": "does not exist",
        str(tmp_path / "no_such_folder" / "x" / "*.jsonl"): "does not exist",
        write_jsonl(tmp_path / "body.jsonl", ["x"], key="body"): "no column 'text'; it has: body, id",
        write_jsonl(tmp_path / "numbers.jsonl", [1, 2]): "holds int, not text",
        write_jsonl(tmp_path / "blank.jsonl", ["", None]): r"no text in column 'text' \(2 empty rows\)",
        write_jsonl(tmp_path / "nothing.jsonl", []): "no text in column",
        tmp_path: "mixes .jsonl, .txt",
        (): "empty list",
    }
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.csv").write_text("text\nx")
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    cases |= {tmp_path / "a.csv": "must end in .jsonl", tmp_path / "cut.jsonl": "cut.jsonl, line 2: not JSON"}
    for source, message in cases.items():
        with pytest.raises(DataError, match=message):
            prepare_dataset(source, output_prefix=tmp_path / "out" / "b", **tokenizer)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), source


def test_nothing_is_left_by_a_run_that_breaks(tmp_path, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        yield [TEXTS[0]]
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "_text_batches", broken)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(source, output_prefix=tmp_path / "out" / "b", **tokenizer)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert prepare_dataset(source, output_prefix=tmp_path / "out" / "b", **tokenizer).num_documents == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-4]), "bin has .* truncated"),
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b""), "idx has 0 bytes"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), "idx is missing"),
        (lambda prefix: Path(f"{prefix}.manifest.json").unlink(), "does not exist"),
        (lambda prefix: Path(f"{prefix}.manifest.json").write_text("{"), "is damaged"),
        (lambda prefix: Path(f"{prefix}.manifest.json").write_text("{}"), "is damaged"),
    ],
)
def test_damage_is_found(tmp_path, tokenizer, damage, message):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_dataset(source, output_prefix=tmp_path / "b", **tokenizer)
    damage(tmp_path / "b")
    with pytest.raises(DataError, match=message):
        check_manifest(tmp_path / "b", tokenizer_hash=tokenizer["tokenizer_hash"])
    with pytest.raises(DataError):
        prepare_dataset(source, output_prefix=tmp_path / "b", **tokenizer)


def test_foreign_tokenizer_is_refused(tmp_path, tokenizer):
    prepare_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), output_prefix=tmp_path / "b", **tokenizer)
    other = hash_tokenizer(build_tiny_random(tmp_path / "other", vocab_size=400))
    with pytest.raises(DataError, match="another tokenizer"):
        check_manifest(tmp_path / "b", tokenizer_hash=other)


def test_no_end_of_text_to_append(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        prepare_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=tokenizer, tokenizer_hash="0", output_prefix=tmp_path / "b")
