"""What each task of the harness needs besides the model: where its texts come from, where they are looked for, what is missing on a
machine without a network and what to provide. A table, and three questions asked of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.config.validation import RETRIEVAL_TASKS
from endprompt_megatron.evaluation.ruler.tasks import QA_TASKS
from endprompt_megatron.evaluation.ruler.tasks import TASKS as PROBE_TASKS

RULER, LONGBENCH, SHORT, PROBES, NEEDLE, PERPLEXITY = "ruler", "longbench", "short", "probes", "needle", "perplexity"
BUILT_IN = (PROBES, NEEDLE, PERPLEXITY)  # answered by Megatron-Core, without lm-eval
SUITES = (RULER, LONGBENCH, SHORT, *BUILT_IN)
PROBE_PREFIX = "probe_"  # some names are lm-eval's too
NEEDLE_PREFIX = "needle_"
GAP_TASK = NEEDLE_PREFIX + "gap"
LOG_PERPLEXITY = "log_perplexity"
HAYSTACK_STAND_IN = "haystack_stand_in"
PUNKT = "punkt"
_DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".txt", ".csv", ".arrow", ".gz")
_ENDS = 1 << 20  # bytes of a file's head and tail that its fingerprint reads


@dataclass(frozen=True)
class Source:
    """A text that tasks are made of, and does not come with the harness.

    Attributes:
        what: in words.
        hub: its dataset on the Hugging Face hub, which the harness loads by name.
        url: where the harness fetches it over HTTP.
        local: what a local path must be.
    """

    what: str
    local: str
    hub: str | None = None
    url: str | None = None


SOURCES: dict[str, Source] = {
    "essays": Source("Paul Graham's essays", 'a folder of parquet or jsonl files with rows {"text"}', hub="baber/paul_graham_essays"),
    HAYSTACK_STAND_IN: Source(
        "other prose in place of Paul Graham's essays", 'a folder of .txt, or of parquet or jsonl files with rows {"text"}'
    ),
    PUNKT: Source("NLTK's sentence tokenizer punkt_tab", "a folder that holds tokenizers/punkt_tab (what NLTK_DATA names)", url="nltk.org"),
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


@dataclass(frozen=True)
class HarnessTask:
    """One task as the harness knows it.

    Attributes:
        name: the harness's.
        suite: ruler | longbench | short, which lm-eval asks; one of BUILT_IN, which Megatron-Core answers without it.
        group: the benchmark's own.
        metric: of a sample, as the harness calls it; RULER's are called by the length.
        needs: names of SOURCES.
        takes: names of SOURCES that it uses where they are given, and does without where not.
        filter: which of the harness's readings of an answer counts.
        runs_code: whether scoring executes what the model wrote.
    """

    name: str
    suite: str
    group: str
    metric: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    filter: str = "none"
    runs_code: bool = False

    @property
    def built_in(self) -> bool:
        """Whether Megatron-Core answers it, without lm-eval."""
        return self.suite in BUILT_IN

    @property
    def has_lengths(self) -> bool:
        """Whether its prompts are made for a length. The gap probe's are made for the target window alone."""
        return (self.suite == RULER or self.built_in) and self.name != GAP_TASK


def _ruler(group: str, **needs: tuple[str, ...]) -> list[HarnessTask]:
    return [HarnessTask(name, RULER, group, "string match", sources) for name, sources in needs.items()]


def _longbench(group: str, *names: str) -> list[HarnessTask]:
    return [HarnessTask(f"longbench_{name}", LONGBENCH, group, "score", ("longbench",)) for name in names]


def _probe(name: str, *needs: str, takes: tuple[str, ...] = ()) -> HarnessTask:
    return HarnessTask(PROBE_PREFIX + name, PROBES, "in RULER's form", "string match", needs, takes)


_PROSE = ("essays", HAYSTACK_STAND_IN)
_ESSAYS = (PUNKT, "essays")
# RULER's 13 (arXiv 2404.06654, section 3); LongBench's English and code tasks in its six groups (arXiv 2308.14508, table 1: the Chinese
# ones are left out); the short tasks of the paper.
TASKS: dict[str, HarnessTask] = {
    task.name: task
    for task in (
        *_ruler(
            "retrieval",
            niah_single_1=(),
            niah_single_2=_ESSAYS,
            niah_single_3=_ESSAYS,
            niah_multikey_1=_ESSAYS,
            niah_multikey_2=(),
            niah_multikey_3=(),
            niah_multivalue=_ESSAYS,
            niah_multiquery=_ESSAYS,
        ),
        *_ruler("multi-hop tracing", ruler_vt=()),
        *_ruler("aggregation", ruler_cwe=(), ruler_fwe=()),
        *_ruler("question answering", ruler_qa_squad=("squad",), ruler_qa_hotpot=("hotpotqa",)),
        *_longbench("single-document QA", "narrativeqa", "qasper", "multifieldqa_en"),
        *_longbench("multi-document QA", "hotpotqa", "2wikimqa", "musique"),
        *_longbench("summarization", "gov_report", "qmsum", "multi_news"),
        *_longbench("few-shot learning", "trec", "triviaqa", "samsum"),
        *_longbench("synthetic tasks", "passage_count", "passage_retrieval_en"),
        *_longbench("code completion", "lcc", "repobench-p"),
        HarnessTask("mmlu", SHORT, "knowledge", "acc", ("mmlu",)),
        HarnessTask("gsm8k", SHORT, "mathematics", "exact_match", ("gsm8k",), filter="strict-match"),
        HarnessTask("hellaswag", SHORT, "common sense", "acc_norm", ("hellaswag",)),
        HarnessTask("humaneval", SHORT, "code", "pass@1", ("humaneval",), filter="create_test", runs_code=True),
        *(_probe(name, takes=_PROSE if form.made_of is None else ()) for name, form in PROBE_TASKS.items()),
        *(_probe(name, name.removeprefix("qa_")) for name in QA_TASKS),
        *(HarnessTask(NEEDLE_PREFIX + name, NEEDLE, "planted facts, graded", "exact match") for name in (*RETRIEVAL_TASKS, "gap")),
        HarnessTask(LOG_PERPLEXITY, PERPLEXITY, "held-out documents", "nats a token (lower is better)"),
    )
}


def tasks_of(names: list[str]) -> list[HarnessTask]:
    """The tasks that names ask for, each once; the name of a suite stands for all of its tasks.

    Raises:
        KeyError: a name that is neither.
    """
    found = {}
    for name in names:
        for task in [task for task in TASKS.values() if task.suite == name] or [TASKS[name]]:
            found[task.name] = task
    return list(found.values())


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user forbade the network, as Hugging Face's libraries understand it."""
    return any(environment.get(name, "").upper() in ("1", "TRUE", "ON", "YES") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def path_problems(paths: Mapping[str, str | None]) -> list[str]:
    """What is wrong with local paths, in sentences.

    Args:
        paths: {name of SOURCES: local path, or None}.
    """
    problems = []
    for name, given in paths.items():
        if given is None:
            continue
        path, wanted = Path(given).expanduser(), SOURCES[name].local
        if name in ("squad", "hotpotqa"):
            if not path.is_file():
                problems.append(f"suite.sources.{name}={given}: no such file. It must be {wanted}.")
        elif name == PUNKT:
            if not (path / "tokenizers" / "punkt_tab").is_dir():
                problems.append(f"suite.sources.{name}={given}: no tokenizers/punkt_tab there. It must be {wanted}.")
        elif not path.is_dir():
            problems.append(f"suite.sources.{name}={given}: no such folder. It must be {wanted}.")
        elif not any(file.suffix in _DATA_SUFFIXES and file.name != "README.md" for file in path.rglob("*")):
            problems.append(f"suite.sources.{name}={given}: no data files there. It must be {wanted}.")
    if paths.get("essays") and paths.get(HAYSTACK_STAND_IN):
        problems.append(f"suite.sources.essays and suite.sources.{HAYSTACK_STAND_IN} are both set: a haystack is one or the other.")
    return problems


def uses_stand_in(task: HarnessTask, paths: Mapping[str, str | None]) -> bool:
    """Whether the task would run on prose that is not the benchmark's."""
    return "essays" in task.needs + task.takes and bool(paths.get(HAYSTACK_STAND_IN))


def prose_of(task: HarnessTask, paths: Mapping[str, str | None]) -> str | None:
    """The source, essays or stand-in, that a built-in task hides its facts in; None: noise sentences, or what the task is made of."""
    return next((name for name in task.takes if paths.get(name)), None)


def sources_of(task: HarnessTask, paths: Mapping[str, str | None]) -> dict[str, str | None]:
    """{source: local path, or None where the harness fetches it} of what the task will be made of."""
    names = [HAYSTACK_STAND_IN if name == "essays" and uses_stand_in(task, paths) else name for name in task.needs]
    names += [name for name in task.takes if paths.get(name)]
    return {name: paths.get(name) for name in names}


def missing_offline(task: HarnessTask, paths: Mapping[str, str | None], *, has_punkt: bool) -> str | None:
    """Why the task cannot run without a network, as far as that is known before it is tried; None where it can be tried.

    A dataset of the hub may lie in the local cache of the datasets library: whether it does shows when it is loaded.

    Args:
        has_punkt: whether NLTK finds punkt_tab by itself.
    """
    absent = [name for name, path in sources_of(task, paths).items() if path is None and not (name == PUNKT and has_punkt)]
    return way_out(absent) if any(SOURCES[name].hub is None for name in absent) else None


def way_out(names: list[str]) -> str:
    """What to provide, for each of the sources."""
    return "; ".join(f"{SOURCES[name].what} missing: set suite.sources.{name} to {SOURCES[name].local}" for name in names)


def fingerprint(path: Path) -> str:
    """SHA-256 (hex, 16 digits) that tells two files, or two folders of files, from each other: names, sizes, and the first and last MiB of
    every file but .md. Weights of 140 GB are told apart in seconds; a change in the middle alone of a file is not seen."""
    path, digest = Path(path).expanduser(), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not file.is_file() or hidden or file.suffix == ".md":
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}:{size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_ENDS))
            if size > _ENDS:
                opened.seek(max(_ENDS, size - _ENDS))
                digest.update(opened.read())
    return digest.hexdigest()[:16]
