"""An evaluation: task after task and length after length, each finished one a file, so that the same command goes on where it stopped;
results.json and a page are written anew after every one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.comparison.bootstrap import bootstrap_interval
from endprompt_megatron.config.validation import cut_problems
from endprompt_megatron.data.corpora import check_corpora, corpus_texts
from endprompt_megatron.data.preprocess import local_files
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.built_in import BuiltInTasks
from endprompt_megatron.evaluation.conditions import LM_EVAL, Conditions, conditions_of, provenance_of
from endprompt_megatron.evaluation.lm_eval_harness.harness import ANSWER_ROOM, Harness, Sample, check_backend, has_punkt
from endprompt_megatron.evaluation.probes.offline import NO_SEGMENTS, TrainedSegments, graded_details, trained_segments
from endprompt_megatron.evaluation.ruler.offline import load_model
from endprompt_megatron.evaluation.suite import MEGATRON, EvaluateConfig
from endprompt_megatron.evaluation.tasks import (
    GAP_TASK,
    PERPLEXITY,
    TASKS,
    HarnessTask,
    fingerprint,
    is_offline,
    missing_offline,
    prose_of,
    sources_of,
    uses_stand_in,
    way_out,
)
from endprompt_megatron.launch import launcher
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.model import backends
from endprompt_megatron.output_files import claimed, replace_text
from endprompt_megatron.report.evaluation import write_evaluation
from endprompt_megatron.report.figures.by_length import ESSAYS_MARK, STAND_IN_MARK

RESULTS = "results.json"
_RECORDS = "records"


@dataclass(frozen=True)
class Pair:
    """A task at a length.

    Attributes:
        task: which.
        length: of its prompts in tokens; None where the task has no lengths.
        stand_in: whether its haystack is not the benchmark's.
        essays: whether a built-in task has the benchmark's in place of noise sentences.
    """

    task: HarnessTask
    length: int | None
    stand_in: bool
    essays: bool = False

    @property
    def name(self) -> str:
        """Of the task in results."""
        return self.task.name + (STAND_IN_MARK if self.stand_in else ESSAYS_MARK if self.essays else "")

    @property
    def unit(self) -> str:
        """Of its score."""
        return "nats a token" if self.task.suite == PERPLEXITY else "of 100"

    @property
    def stem(self) -> str:
        """Of its files."""
        haystack = "stand_in" if self.stand_in else "essays" if self.essays else ""
        parts = (self.task.name, haystack, "" if self.length is None else str(self.length))
        return "_".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.name if self.length is None else f"{self.name} at {self.length}"


def prepare(config: EvaluateConfig) -> None:
    """Everything that can be checked before a process is started.

    Raises:
        ConfigError: settings that cannot be, or another evaluation's output directory.
        BackendUnavailableError: lm-eval or the backend is not installed, or a GPU is asked for and there is none.
        DataError: the model's tokenizer cannot be read.
    """
    config.validate()
    world_size = launcher.planned_world_size(config)
    if config.runs_lm_eval and config.backend != MEGATRON and world_size > 1:
        raise ConfigError(
            f"backend={config.backend} with {world_size} processes: lm-eval's models of transformers and vLLM run in one. Set "
            f"launch.nproc_per_node=1, or backend=megatron."
        )
    if config.runs_megatron:
        mcore_runtime.resolve_accelerator(config.accelerator)
        architecture = architecture_from_hf(read_hf_config(Path(config.model)))
        problems = cut_problems(config.parallel, world_size=world_size, architecture=architecture)
        if problems:
            raise ConfigError(*problems)
    if config.runs_lm_eval:
        check_backend(config.backend)
    evaluation = _Evaluation(config, config.directory(), conditions_of(config, command=""), None)
    pairs = evaluation.pairs()
    for pair in pairs:
        evaluation.is_finished(pair)
    if any(pair.task.suite == PERPLEXITY for pair in pairs) and not launcher.is_worker():
        evaluation.text_problem  # noqa: B018  fetched once, before several processes would


def evaluate(config: EvaluateConfig, *, command: str, lm: Any = None) -> bool:
    """Carry an evaluation out, or on. Writes results.json, records/ and evaluation.md. Every process of a job calls it; rank 0 writes.

    Args:
        config: what to ask which model.
        command: that reproduces it, for the conditions.
        lm: an lm-eval LM in the model's place, for tests.
    Returns:
        Whether no task failed; one that cannot run here and was named as such beforehand is no failure.
    Raises:
        as prepare; ConfigError also for a directory that another process writes, DataError for a tokenizer that gives other than the BOS
        tokens asked for.
    """
    prepare(config)
    for note in config.ignored():
        get_logger().info(note)
    conditions = conditions_of(config, command=command)
    if global_rank() > 0:
        return _Evaluation(config, config.directory(), conditions, lm, writes=False).carry_out()
    with claimed(config.directory(), doing="carries this evaluation out") as directory:
        (directory / _RECORDS).mkdir(exist_ok=True)
        return _Evaluation(config, directory, conditions, lm).carry_out()


@dataclass
class _Evaluation:
    """One evaluation under way, in one of its processes."""

    config: EvaluateConfig
    directory: Path
    conditions: Conditions
    lm: Any
    writes: bool = True
    not_run: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0

    def carry_out(self) -> bool:
        """As evaluate."""
        pairs = [pair for pair in self.pairs() if self._can_run(pair)]
        waiting = [pair for pair in pairs if not self.is_finished(pair)]
        if len(waiting) < len(pairs):
            get_logger().info(f"{len(pairs) - len(waiting)} of {len(pairs)} tasks and lengths are finished already")
        self.write(pending=len(waiting))
        number = 0
        # one engine after the other: a model is in memory once
        for engine in (LM_EVAL, MEGATRON):
            its_pairs = [pair for pair in waiting if self.conditions.engine_of(pair.task) == engine]
            if not its_pairs:
                continue
            with self._asker(engine, its_pairs) as asker:
                for pair in its_pairs:
                    number += 1
                    self._run(asker, pair, f"[{number}/{len(waiting)}] {pair}")
                    self.write(pending=len(waiting) - number)
        get_logger().info(f"page {self.directory / 'evaluation.md'}")
        return not self.failures

    @contextmanager
    def _asker(self, engine: str, waiting: list[Pair]) -> Iterator[Harness | BuiltInTasks]:
        """What asks the tasks, with the model loaded."""
        config = self.config
        longest = max([self.conditions.window, *(pair.length + ANSWER_ROOM for pair in waiting if pair.length)])
        if engine == LM_EVAL and config.backend != MEGATRON:
            yield Harness(config, max_length=longest, lm=self.lm)
            return
        runtime = mcore_runtime.initialize(
            config.parallel,
            accelerator=config.accelerator,
            seed=config.seed,
            timeout_minutes=config.launch.hang_timeout_minutes or None,
        )
        try:
            precision = {"float32": "fp32", "bfloat16": "bf16"}[self.conditions.engines[engine]["dtype"]]
            chunks = load_model(
                Path(config.model),
                precision=precision,
                backend=backends.resolve("torch"),  # as the conditions say
                device=runtime.device,
                parallel=config.parallel,
            )
            if engine == LM_EVAL:
                yield Harness(config, max_length=longest, model=chunks, device=runtime.device, lm=self.lm)
            else:
                options = dict(lengths=self._lengths(), texts=self._texts, trained=self._trained())
                yield BuiltInTasks(config, chunks, **options, device=runtime.device)
        finally:
            mcore_runtime.shut_down()

    @cached_property
    def text_problem(self) -> str | None:
        """What is wrong with the held-out text, which is fetched where it is a package; None where nothing is."""
        perplexity = self.config.suite.perplexity
        try:
            check_corpora(perplexity.text, directory=Path(perplexity.directory))
        except DataError as error:
            return f"suite.perplexity.text: {error}"
        return None

    def _texts(self) -> Iterator[str]:
        perplexity = self.config.suite.perplexity
        return corpus_texts(perplexity.text, directory=Path(perplexity.directory))

    def _trained(self) -> TrainedSegments | None:
        return trained_segments(self.config, provenance_of(Path(self.config.model)))

    def _lengths(self) -> list[int]:
        return self.config.suite.lengths_for(self.conditions.window)

    def pairs(self) -> list[Pair]:
        """What is asked for.

        Raises:
            ConfigError: no lengths are named, and the model's window is shorter than any that would be.
        """
        lengths = self._lengths()
        chosen = self.config.suite.chosen()
        if not lengths and any(task.has_lengths for task in chosen):
            raise ConfigError(
                f"suite.lengths=null: the model's window of {self.conditions.window} tokens is below the shortest length that is asked "
                f"unless you name others, 4096. Name the lengths, e.g. suite.lengths=[1024]."
            )
        paths = vars(self.config.suite.sources)
        return [
            Pair(task, length, uses_stand_in(task, paths), prose_of(task, paths) == "essays")
            for task in chosen
            for length in (lengths if task.has_lengths else [None])
        ]

    def _can_run(self, pair: Pair) -> bool:
        """Whether anything known before speaks against it; what does is kept."""
        reason = None
        if pair.task.runs_code and not self.config.suite.allow_code_execution:
            reason = "it executes code that the model wrote: set suite.allow_code_execution=true where that may be"
        elif pair.task.name == GAP_TASK and self._trained() is None:
            reason = NO_SEGMENTS
        elif pair.task.suite == PERPLEXITY and self.text_problem:
            reason = self.text_problem
        elif is_offline() or pair.task.built_in:  # which fetch nothing
            reason = missing_offline(pair.task, vars(self.config.suite.sources), has_punkt=has_punkt())
        if reason is not None:
            self._cannot(pair, reason)
        return reason is None

    def _cannot(self, pair: Pair, reason: str) -> None:
        self.not_run.append({"task": pair.name, "length": pair.length, "reason": reason})
        get_logger().info(f"{pair} does not run: {reason}")

    def _conditions_of(self, pair: Pair) -> dict[str, Any]:
        sources = sources_of(pair.task, vars(self.config.suite.sources))
        told = {name: path and fingerprint(Path(path)) for name, path in sources.items()}
        return self.conditions.decisive(pair.task) | {
            "num_fewshot": self.config.suite.num_fewshot.get(pair.task.name),
            "sources": told | (self._held_out if pair.task.suite == PERPLEXITY else {}),
        }

    @cached_property
    def _held_out(self) -> dict[str, list[str] | None]:
        """Column and contents of local held-out texts; None for one that is not there. What a package holds does not change."""
        found: dict[str, list[str] | None] = {}
        for source in self.config.suite.perplexity.text:
            if not source.path.startswith("package:"):
                try:
                    found[source.path] = [f"{source.text_key} {fingerprint(file)}" for file in local_files(source.path)]
                except DataError:
                    found[source.path] = None
        return found

    def is_finished(self, pair: Pair) -> bool:
        """Whether the pair was asked under the same conditions.

        Raises:
            ConfigError: it was asked under others, and config.overwrite does not say to ask again.
        """
        kept = self._kept(self.directory / _RECORDS / f"{pair.stem}.json")
        if kept is None:
            return False
        asked = self._conditions_of(pair)
        before = kept["conditions"]
        differing = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in asked.items() if before.get(name) != value]
        if not differing:
            return True
        if not self.config.overwrite:
            raise ConfigError(
                f"output_dir={self.directory}: {pair} was asked under other conditions ({'; '.join(differing)}). "
                f"Set another output_dir, or overwrite=true to ask again."
            )
        get_logger().info(f"{pair} is asked again: {'; '.join(differing)}")
        return False

    @staticmethod
    def _kept(path: Path) -> dict[str, Any] | None:
        if not path.is_file() or not path.with_suffix(".jsonl").is_file():
            return None
        return json.loads(path.read_text())

    def _run(self, asker: Harness | BuiltInTasks, pair: Pair, label: str) -> None:
        started = time.monotonic()
        try:
            samples = asker.run(
                pair.task,
                length=pair.length,
                window=self.conditions.window,
                label=label,
                log_file=self.directory / "harness.log",
            )
        except Exception as error:  # the others go on
            self.failures += 1
            fetched = [name for name, path in sources_of(pair.task, vars(self.config.suite.sources)).items() if path is None]
            words = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            self._cannot(pair, words if not fetched else f"{words} (if it could not be fetched: {way_out(fetched)})")
            return
        score = self._score(pair, samples, time.monotonic() - started)
        self._keep(pair, score, samples)
        get_logger().info(f"{label}: {score['score']:.4g} {pair.unit}, {len(samples)} samples, {score['seconds']:.0f} s")

    def _score(self, pair: Pair, samples: list[Sample], seconds: float) -> dict[str, Any]:
        together: dict[int, list[float]] = {}  # questions about one haystack are not independent of each other
        for sample in samples:
            together.setdefault(getattr(sample, "haystack", sample.index), []).append(sample.score)
        values = [float(np.mean(scores)) for scores in together.values()]
        graded = graded_details(samples, self._trained())
        return {
            "suite": pair.task.suite,
            "task": pair.name,
            "group": pair.task.group,
            "length": pair.length,
            "metric": pair.task.metric if pair.task.filter == "none" else f"{pair.task.metric}, {pair.task.filter}",
            "score": float(np.mean([sample.score for sample in samples])),
            "samples": len(samples),
            "interval": list(bootstrap_interval(values)) if len(values) > 1 else None,
            "seconds": round(seconds, 1),
            "records": f"{_RECORDS}/{pair.stem}.jsonl",
            **({} if graded is None else {"graded": graded}),
        }

    def _keep(self, pair: Pair, score: dict[str, Any], samples: list[Sample]) -> None:
        """The samples, then the score, whose file says that the pair is finished."""
        if not self.writes:
            return
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        records = self.directory / _RECORDS
        (records / f"{pair.stem}.json").unlink(missing_ok=True)
        replace_text(records / f"{pair.stem}.jsonl", lines)
        finished = {"conditions": self._conditions_of(pair), "score": score}
        replace_text(records / f"{pair.stem}.json", json.dumps(finished, indent=1, ensure_ascii=False) + "\n")

    def write(self, *, pending: int) -> None:
        """results.json and the page, from every finished pair that was asked under these conditions, in this sitting or before."""
        if not self.writes:
            return
        of_this = self._of_this_evaluation()
        scores = [found["score"] for found in of_this]
        sources = {name: str(path) for name, path in vars(self.config.suite.sources).items() if path}
        told = self.conditions.told_with([found["conditions"] for found in of_this])
        conditions = told | {"num_fewshot": self.config.suite.num_fewshot, "local_sources": sources}
        results = {"model": str(self.config.model), "conditions": conditions, "scores": scores, "not_run": self.not_run}
        replace_text(self.directory / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_evaluation(self.directory, results, pending=pending)

    def _of_this_evaluation(self) -> list[dict[str, Any]]:
        """What was asked under these conditions, in this sitting or before. A suite that this sitting leaves out may have settings of its
        own (depths, held-out text), which are those of its newest score."""
        paths = sorted((self.directory / _RECORDS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        settings = {suite: self.conditions.of_suites.get(suite, {}) for suite in self.config.suite.suites()}
        found = {}
        for path in paths:
            kept = self._kept(path)
            task = kept and TASKS.get(kept["score"]["task"].partition(" (")[0])
            if not task:
                continue
            before = kept["conditions"]
            own = {name: before.get(name) for name in self.conditions.of_suites.get(task.suite, {})}
            wanted = self.conditions.decisive(task, settings=settings.get(task.suite, own))
            if all(before.get(name) == value for name, value in wanted.items()):
                settings.setdefault(task.suite, own)
                found[path.name] = kept
        return [found[name] for name in sorted(found)]
