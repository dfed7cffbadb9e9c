"""Manage the text sources of the evaluation tasks: data sets and prose that neither lm-eval nor this package contains. This module checks
local copies, selects the sources of a task, and reports the sources that are missing on a machine without a network."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.evaluation.tasks import (
    BENCHMARK_HAYSTACK,
    ESSAYS,
    ESSAYS_HAYSTACK,
    HAYSTACK_STAND_IN,
    PUNKT,
    STAND_IN_HAYSTACK,
    Task,
)

_DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".txt", ".csv", ".arrow", ".gz")
_FINGERPRINT_BYTES = 1 << 20  # number of bytes that are read from the head, and from the tail, of each file


@dataclass(frozen=True)
class Source:
    """A text source.

    Attributes:
        what: description, for messages.
        local: description of the required local path, for messages.
        hub: name of the dataset on the Hugging Face hub that lm-eval loads; None if lm-eval does not load the source from the hub.
        url: URL or site from which lm-eval downloads the source over HTTP; None if lm-eval does not download it over HTTP.
    """

    what: str
    local: str
    hub: str | None = None
    url: str | None = None


SOURCES: dict[str, Source] = {
    ESSAYS: Source("Paul Graham's essays", 'a folder of parquet or jsonl files with rows {"text"}', hub="baber/paul_graham_essays"),
    HAYSTACK_STAND_IN: Source(
        "other prose in place of Paul Graham's essays", 'a folder of .txt, or of parquet or jsonl files with rows {"text"}'
    ),
    PUNKT: Source(
        "NLTK's sentence tokenizer punkt_tab", "a folder with tokenizers/punkt_tab, such as the folder in NLTK_DATA", url="nltk.org"
    ),
    "squad": Source(
        "SQuAD 2.0, development set",
        "the file dev-v2.0.json",
        url="https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    ),
    "hotpotqa": Source(
        "HotpotQA, development set with distractors",
        "the file hotpot_dev_distractor_v1.json",
        url="https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/7e54db4656209750ff487f6fdf8e39a66dba136b/hotpot_dev_distractor_v1.json",
    ),
    "longbench": Source("LongBench", "a copy of the dataset's repository", hub="Xnhyacinth/LongBench"),
    "mmlu": Source("MMLU", "a copy of the dataset's repository", hub="cais/mmlu"),
    "gsm8k": Source("GSM8K", "a copy of the dataset's repository", hub="openai/gsm8k"),
    "hellaswag": Source("HellaSwag", "a copy of the dataset's repository", hub="Rowan/hellaswag"),
    "humaneval": Source("HumanEval", "a copy of the dataset's repository", hub="openai/openai_humaneval"),
}


def is_offline(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the user disabled the network, by the rules of Hugging Face's libraries.

    Args:
        environment: environment variables; None reads those of the process.
    """
    variables = os.environ if environment is None else environment
    return any(variables.get(name, "").upper() in ("1", "TRUE", "ON", "YES") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def path_problems(paths: Mapping[str, str | None]) -> list[str]:
    """Check local paths and return one message per problem.

    Args:
        paths: {name in SOURCES: local path, or None}.
    """
    problems = []
    for name, given in paths.items():
        if given is None:
            continue
        path, required = Path(given).expanduser(), SOURCES[name].local
        if name in ("squad", "hotpotqa"):
            if not path.is_file():
                problems.append(f"suite.sources.{name}={given}: no such file. It must be {required}.")
        elif name == PUNKT:
            if not (path / "tokenizers" / "punkt_tab").is_dir():
                problems.append(f"suite.sources.{name}={given}: no tokenizers/punkt_tab there. It must be {required}.")
        elif not path.is_dir():
            problems.append(f"suite.sources.{name}={given}: no such folder. It must be {required}.")
        elif not any(file.suffix in _DATA_SUFFIXES and file.name != "README.md" for file in path.rglob("*")):
            problems.append(f"suite.sources.{name}={given}: no data files there. It must be {required}.")
    if paths.get(ESSAYS) and paths.get(HAYSTACK_STAND_IN):
        problems.append(f"suite.sources.{ESSAYS} and suite.sources.{HAYSTACK_STAND_IN} are both set: set only one of them.")
    return problems


def uses_stand_in(task: Task, paths: Mapping[str, str | None]) -> bool:
    """Return whether the task uses the stand-in prose in place of the benchmark's essays."""
    return ESSAYS in task.needs + task.optional_sources and bool(paths.get(HAYSTACK_STAND_IN))


def prose_source_of(task: Task, paths: Mapping[str, str | None]) -> str | None:
    """Return the source of prose (essays or stand-in) in which a task of suite ruler_offline hides its facts. Return None if the task uses
    noise sentences or no prose."""
    return next((name for name in task.optional_sources if paths.get(name)), None)


def haystack_of(task: Task, paths: Mapping[str, str | None]) -> str:
    """Return the haystack that the task uses, one of tasks.HAYSTACK_MARKS."""
    if uses_stand_in(task, paths):
        return STAND_IN_HAYSTACK
    return ESSAYS_HAYSTACK if prose_source_of(task, paths) == ESSAYS else BENCHMARK_HAYSTACK


def sources_of(task: Task, paths: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the sources that the task will use, as {source: local path, or None if lm-eval downloads the source}."""
    names = [HAYSTACK_STAND_IN if name == ESSAYS and uses_stand_in(task, paths) else name for name in task.needs]
    names += [name for name in task.optional_sources if paths.get(name)]
    return {name: paths.get(name) for name in names}


def missing_offline(task: Task, paths: Mapping[str, str | None], *, has_punkt: bool) -> str | None:
    """Return the reason why the task cannot run without a network; None if it may run.

    A dataset of the hub counts as present, because it may be in the cache of the datasets library, and only loading it shows whether it is.

    Args:
        has_punkt: whether NLTK finds punkt_tab without suite.sources.punkt.
    """
    absent = [name for name, path in sources_of(task, paths).items() if path is None and not (name == PUNKT and has_punkt)]
    return way_out(absent) if any(SOURCES[name].hub is None for name in absent) else None


def way_out(names: list[str]) -> str:
    """Return a message with the setting that provides each missing source."""
    return "; ".join(f"{SOURCES[name].what} missing: set suite.sources.{name} to {SOURCES[name].local}" for name in names)


def fingerprint(path: Path) -> str:
    """Return the SHA-256 (first 16 hex digits) of a file, or of the files in a folder.

    The hash covers the path within the folder, the size, and the first and last MiB of every file, except .md files and hidden files.
    Hashing 140 GB of weights therefore takes seconds, but a change in only the middle of a file is not detected. The name of a single file
    is not covered.
    """
    path, digest = Path(path).expanduser(), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not file.is_file() or hidden or file.suffix == ".md":
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}:{size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_FINGERPRINT_BYTES))
            if size > _FINGERPRINT_BYTES:
                opened.seek(max(_FINGERPRINT_BYTES, size - _FINGERPRINT_BYTES))
                digest.update(opened.read())
    return digest.hexdigest()[:16]
