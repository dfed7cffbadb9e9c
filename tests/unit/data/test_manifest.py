"""Damage to an indexed dataset and to its manifest, and preparations that were killed, by every point."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.config.schema import TextSource
from endprompt_megatron.data import manifest as manifest_module
from endprompt_megatron.data.corpora import inspect_corpora, prepare_corpora
from endprompt_megatron.data.manifest import Manifest, check_manifest, complete_interrupted, dataset_paths, load_manifest, rename_dataset
from endprompt_megatron.data.preprocess import prepare_dataset
from endprompt_megatron.errors import DataError
from endprompt_megatron.output_files import owner, temporary_name

DEAD = 4194305  # one more than the largest process id of Linux
TEXTS = {"one": ["aaa bbb ccc", "ddd", "eee fff"], "two": ["ddd", "ccc bbb aaa", "fff eee"]}  # as many tokens in other places
HOST = owner().split(".", maxsplit=1)[0]


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two datasets whose files have the same sizes, and how they were made."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = {"tokenizer": load_tokenizer(tiny_model_dir), "tokenizer_hash": hash_tokenizer(tiny_model_dir)}
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_dataset(folder / f"{name}.jsonl", output_prefix=folder / name, **tokenizer)
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, hash=tokenizer["tokenizer_hash"])


@pytest.fixture
def place(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy with the same times of change."""
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def flip(path: Path, offset: int, *, keep_time: bool = False) -> None:
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_new_datasets_are_whole(made, place):
    for name in TEXTS:
        manifest = check_manifest(place / name, tokenizer_hash=made.hash, check="all")
        assert manifest == load_manifest(made.folder / name) and len(manifest.bin_sha256) == len(manifest.idx_sha256) == 64
    assert {path.stat().st_size for path in place.glob("*.bin")} == {load_manifest(place / "one").bin_bytes}


@pytest.mark.parametrize("kind", ["bin", "idx"])
@pytest.mark.parametrize("offset", [0, 20, -1])
def test_a_flipped_byte_is_found_by_every_reader(made, place, kind, offset):
    path = place / f"one.{kind}"
    flip(path, offset)
    assert path.stat().st_size == getattr(load_manifest(place / "one"), f"{kind}_bytes")
    source = [TextSource(f"indexed:{place / 'one'}")]
    options = dict(directory=place, tokenizer_hash=made.hash)
    for read in (
        lambda: check_manifest(place / "one", tokenizer_hash=made.hash),
        lambda: prepare_dataset(place / "one.jsonl", output_prefix=place / "one", **made.tokenizer),
        lambda: prepare_corpora(source, tokenizer=made.tokenizer["tokenizer"], **options),
        lambda: inspect_corpora(source, **options),
    ):
        with pytest.raises(DataError, match=rf"one.{kind} is damaged or was changed.*Delete .*the same command creates them again"):
            read()


def test_damage_that_keeps_the_time_of_change_needs_verify(made, place):
    flip(place / "one.bin", 4, keep_time=True)
    check_manifest(place / "one", tokenizer_hash=made.hash)
    for read in (check_manifest, lambda prefix, **more: inspect_corpora([TextSource(f"indexed:{prefix}")], directory=place, **more)):
        with pytest.raises(DataError, match="one.bin is damaged"):
            read(place / "one", tokenizer_hash=made.hash, check="all")


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_files_of_two_corpora_that_are_swapped(made, place, kind):
    first, second = place / f"one.{kind}", place / f"two.{kind}"
    first.rename(place / "aside")
    second.rename(first)
    (place / "aside").rename(second)
    for name in TEXTS:
        with pytest.raises(DataError, match=f"{name}.{kind} is damaged or was changed"):
            check_manifest(place / name, tokenizer_hash=made.hash)


def test_a_new_time_of_change_is_recorded_once(made, place, monkeypatch):
    for kind in ("bin", "idx"):
        os.utime(place / f"one.{kind}", ns=(1, 10**18))
    assert check_manifest(place / "one", tokenizer_hash=made.hash, record=False).bin_mtime_ns == 10**18
    assert load_manifest(place / "one") == load_manifest(made.folder / "one")
    check_manifest(place / "one", tokenizer_hash=made.hash)
    assert load_manifest(place / "one").idx_mtime_ns == 10**18
    assert load_manifest(place / "one").identity() == load_manifest(made.folder / "one").identity()
    monkeypatch.setattr(manifest_module, "sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    check_manifest(place / "one", tokenizer_hash=made.hash)


def test_a_read_only_directory_is_read_whole_and_said(made, place, monkeypatch, caplog):
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(manifest_module, "_write", read_only)
    monkeypatch.setattr(logging.getLogger("endprompt_megatron"), "propagate", True)
    os.utime(place / "one.bin", ns=(1, 10**18))
    check_manifest(place / "one", tokenizer_hash=made.hash)
    assert "cannot be written ([Errno 30] Read-only file system), so every start reads the dataset whole" in caplog.text
    assert load_manifest(place / "one") == load_manifest(made.folder / "one")


ODD = {
    "empty": b"",
    "cut": b'{"source": ["x"], ',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"manifest"',
    "no fields": b"{}",
    "not UTF-8": b'{"source": "\xff"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_manifest_that_is_none(made, place, content):
    (place / "one.manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="manifest.json is damaged.*the same command creates them again"):
        check_manifest(place / "one", tokenizer_hash=made.hash)


def test_a_directory_in_the_place_of_the_manifest(made, place):
    (place / "one.manifest.json").unlink()
    (place / "one.manifest.json").mkdir()
    with pytest.raises(DataError, match="manifest.json is damaged"):
        check_manifest(place / "one", tokenizer_hash=made.hash)


@pytest.mark.parametrize("field", [field.name for field in fields(Manifest)])
def test_a_field_of_another_type(made, place, field):
    path = place / "one.manifest.json"
    whole = json.loads(path.read_text())
    for value in ([1], {"a": 1}, -1, 1.5, True, None, "x" * 64):
        if type(value) is type(whole[field]) or (value is None and field in ("config_name", "eos_token_id")):
            continue
        if field == "config_name" and value == "x" * 64:  # a name that a hub dataset may have
            continue
        path.write_text(json.dumps(whole | {field: value}))
        with pytest.raises(DataError):
            check_manifest(place / "one", tokenizer_hash=made.hash)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 1}, "1 tokens of uint16 are not"),
        ({"dtype": "int64"}, "dtype is 'int64'"),
        ({"bin_sha256": ""}, "bin_sha256 is '' in version 2"),
        ({"idx_sha256": "0" * 63}, "idx_sha256 is '0+' in version 2"),
        ({"manifest_version": 1}, "bin_sha256 is '.*' in version 1"),
        ({"manifest_version": 3}, "manifest_version=3, this program reads 2"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself(made, place, change, message):
    path = place / "one.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        check_manifest(place / "one", tokenizer_hash=made.hash)


def test_a_flipped_byte_of_the_manifest_is_no_traceback(made, place):
    path = place / "one.manifest.json"
    for offset in range(0, path.stat().st_size, 3):
        flip(path, offset)
        try:
            found = check_manifest(place / "one", tokenizer_hash=made.hash, check="all", record=False)
            assert (found.bin_sha256, found.num_tokens) == (load_manifest(made.folder / "one").bin_sha256, found.bin_bytes // 2)
        except DataError:
            pass
        flip(path, offset)


def as_of_version_1(prefix: Path) -> None:
    path = dataset_paths(prefix)["manifest"]
    old = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith(("sha256", "mtime_ns"))}
    path.write_text(json.dumps(old | {"manifest_version": 1}))


def test_a_dataset_of_an_earlier_release_gets_its_digests(made, place):
    as_of_version_1(place / "one")
    identity = load_manifest(place / "one").identity()
    check_manifest(place / "one", tokenizer_hash=made.hash, record=False)
    assert load_manifest(place / "one").manifest_version == 1
    prepare_dataset(place / "one.jsonl", output_prefix=place / "one", **made.tokenizer)
    assert load_manifest(place / "one") == load_manifest(made.folder / "one") and identity == load_manifest(place / "one").identity()


def test_an_index_of_an_earlier_release_that_is_damaged(made, place):
    as_of_version_1(place / "one")
    for offset in range((place / "one.idx").stat().st_size):
        flip(place / "one.idx", offset)
        with pytest.raises(DataError, match=r"one.idx is damaged"):
            check_manifest(place / "one", tokenizer_hash=made.hash)
        flip(place / "one.idx", offset)


def killed(place: Path, renamed: int, *, host: str = HOST, pid: int = DEAD) -> dict[str, Path]:
    """Give the files of "one" the names that they have when their writer was killed after `renamed` renames."""
    temporary = dataset_paths(place / f".one.{host}.{pid}.tmp")
    for kind in list(temporary)[renamed:]:
        dataset_paths(place / "one")[kind].rename(temporary[kind])
    return temporary


class NoTokenizer:
    eos_token_id: int

    def __init__(self, tokenizer: Any):
        self.eos_token_id, self._length = tokenizer.eos_token_id, len(tokenizer)

    def __len__(self) -> int:
        return self._length

    def __call__(self, *args: object, **kwargs: object) -> None:
        pytest.fail("tokenises again")


@pytest.mark.parametrize("host", [HOST, "0" * 8], ids=["this host", "another host"])
@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_between_the_renames_needs_no_hand(made, place, renamed, host):
    killed(place, renamed, host=host)
    found = prepare_dataset(
        place / "one.jsonl", output_prefix=place / "one", tokenizer=NoTokenizer(made.tokenizer["tokenizer"]), tokenizer_hash=made.hash
    )
    assert found == load_manifest(made.folder / "one") == check_manifest(place / "one", tokenizer_hash=made.hash, check="all")
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in made.folder.iterdir())


def test_an_indexed_corpus_is_completed_too(made, place):
    killed(place, 1)
    source = [TextSource(f"indexed:{place / 'one'}")]
    prepare_corpora(source, directory=place, tokenizer=made.tokenizer["tokenizer"], tokenizer_hash=made.hash)
    assert check_manifest(place / "one", tokenizer_hash=made.hash, check="all")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_real_kill_between_the_renames(made, place, renames):
    before = {kind: path.read_bytes() for kind, path in dataset_paths(place / "one").items()}
    child = os.fork()
    if not child:  # only os and the library from here on: the kill must be the only way out
        try:
            temporary, done = temporary_name(place / "one"), []
            for kind, path in dataset_paths(place / "one").items():
                path.rename(dataset_paths(temporary)[kind])
            original = Path.replace

            def replace(path: Path, target: Path) -> Path:
                if len(done) == renames:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(path)
                return original(path, target)

            Path.replace = replace  # type: ignore[assignment,method-assign]
            rename_dataset(temporary, place / "one")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not dataset_paths(place / "one")["manifest"].exists()
    complete_interrupted(place)
    assert {kind: path.read_bytes() for kind, path in dataset_paths(place / "one").items()} == before


@pytest.mark.parametrize("part", ["bin", "idx", "manifest"])
def test_leftovers_that_are_not_whole_are_swept_and_made_again(made, place, part):
    leftovers = killed(place, 0)
    leftovers[part].write_bytes(leftovers[part].read_bytes()[:-2])
    again = prepare_dataset(place / "one.jsonl", output_prefix=place / "one", **made.tokenizer)
    assert again.bin_sha256 == load_manifest(made.folder / "one").bin_sha256 and not list(place.glob(".*"))


def test_leftovers_never_replace_a_strangers_file(made, place):
    killed(place, 0)
    (place / "one.bin").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="one.bin exists without a manifest"):
        prepare_dataset(place / "one.jsonl", output_prefix=place / "one", **made.tokenizer)
    assert (place / "one.bin").read_bytes() == b"somebody's"


@pytest.mark.parametrize(("host", "pid"), [(HOST, os.getppid()), ("0" * 8, DEAD)], ids=["a running process", "another host"])
def test_half_written_files_of_others_stay(made, place, host, pid):
    leftovers = killed(place, 0, host=host, pid=pid)
    leftovers["manifest"].unlink()
    prepare_dataset(place / "one.jsonl", output_prefix=place / "one", **made.tokenizer)
    assert leftovers["bin"].exists() and leftovers["idx"].exists()


def test_leftovers_of_other_corpora_are_completed_before_they_are_swept(made, place):
    killed(place, 1)
    prepare_dataset(place / "two.jsonl", output_prefix=place / "two", **made.tokenizer)
    assert check_manifest(place / "one", tokenizer_hash=made.hash, check="all") and not list(place.glob(".*"))


@pytest.mark.parametrize("kind", ["bin", "idx", "manifest"])
def test_a_full_disk_while_tokenising(made, tmp_path, kind):
    """/dev/full in the place of one of the files."""
    prefix = tmp_path / "out" / "one"
    prefix.parent.mkdir()
    full = dataset_paths(temporary_name(prefix))[kind]
    full = temporary_name(full) if kind == "manifest" else full
    full.symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"out/one.bin cannot be written \(OSError: .*No space left.*the same command tokenises again"):
        prepare_dataset(made.folder / "one.jsonl", output_prefix=prefix, **made.tokenizer)
    assert not list(prefix.parent.iterdir())
    assert prepare_dataset(made.folder / "one.jsonl", output_prefix=prefix, **made.tokenizer).num_documents == 3


def test_a_directory_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written.*set data.directory"):
        prepare_dataset(made.folder / "one.jsonl", output_prefix=tmp_path / "file" / "one", **made.tokenizer)


def test_another_process_that_is_first_is_believed_after_a_check(made, place, tmp_path, monkeypatch):
    """The dataset appears while this process tokenises."""
    prefix = tmp_path / "late" / "one"

    def record(temporary: Path, described: dict) -> Manifest:
        for kind, path in dataset_paths(place / "one").items():
            shutil.copy2(path, dataset_paths(prefix)[kind])
        return manifest_module.record_files(temporary, described)

    monkeypatch.setattr("endprompt_megatron.data.preprocess.record_files", record)
    found = prepare_dataset(place / "one.jsonl", output_prefix=prefix, **made.tokenizer)
    assert found == load_manifest(made.folder / "one") and len(list(prefix.parent.iterdir())) == 3
