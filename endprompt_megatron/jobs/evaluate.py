"""Run an evaluation. A pair is a task and a length. The job runs one pair after another and writes each result to a file, so that the same
command resumes a stopped evaluation. It rewrites results.json and the page after each pair."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.no_code import refuse_code
from endprompt_megatron.checkpoint.hf.transformers_config import check_same_config
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights
from endprompt_megatron.comparison.bootstrap import bootstrap_interval
from endprompt_megatron.config.layout_rules import cut_problems
from endprompt_megatron.data.corpora import check_corpora, corpus_texts
from endprompt_megatron.data.preprocess import local_files
from endprompt_megatron.errors import ConfigError, DataError, OutputError
from endprompt_megatron.evaluation.conditions import Conditions, conditions_of, provenance_of
from endprompt_megatron.evaluation.earlier_results import with_identity
from endprompt_megatron.evaluation.lm_eval_harness.harness import ANSWER_ROOM, Harness, check_backend, has_punkt
from endprompt_megatron.evaluation.megatron_tasks import MegatronTasks
from endprompt_megatron.evaluation.probes.log_probability_tasks import (
    NO_SEGMENTS,
    TrainedSegments,
    log_probability_details,
    trained_segments,
)
from endprompt_megatron.evaluation.sample import Sample
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.evaluation.task_sources import fingerprint, haystack_of, is_offline, missing_offline, sources_of, way_out
from endprompt_megatron.evaluation.tasks import (
    BENCHMARK_HAYSTACK,
    GAP_TASK,
    LM_EVAL,
    MEGATRON,
    PERPLEXITY,
    TASKS,
    Task,
    name_in_results,
)
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.launch import launcher
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.model import backends
from endprompt_megatron.output_files import claimed, directory_problem, json_digest, make_directory, read_or_set_aside, replace_text
from endprompt_megatron.report.evaluation import write_evaluation
from endprompt_megatron.training.watchdog import Watchdog

RESULTS = "results.json"
_RECORDS = "records"


@dataclass(frozen=True)
class Pair:
    """A task and a length.

    Attributes:
        task: row of the table of tasks.
        length: length of the task's prompts or windows in tokens; None if the task has no lengths.
        haystack: one of evaluation.tasks.HAYSTACK_MARKS.
    """

    task: Task
    length: int | None
    haystack: str

    @property
    def name(self) -> str:
        """Name of the task's scores in results.json and on the page."""
        return name_in_results(self.task, self.haystack)

    @property
    def stem(self) -> str:
        """File name of the pair's records, without suffix."""
        haystack = "" if self.haystack == BENCHMARK_HAYSTACK else self.haystack
        parts = (self.task.id, haystack, "" if self.length is None else str(self.length))
        return "_".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.name if self.length is None else f"{self.name} at {self.length}"


def prepare(config: EvaluateConfig) -> None:
    """Check everything that can be checked before worker processes start.

    Raises:
        ConfigError: the settings are invalid, or the output directory holds scores under other conditions.
        BackendUnavailableError: lm-eval or the backend is not installed, or the device is a GPU and this machine has none.
        CheckpointError: the model's config.json or weights are damaged or not supported, or the model's files refer to code.
        DataError: the model's tokenizer cannot be read.
    """
    config.validate()
    problem = directory_problem("output_dir", config.directory())
    if problem is not None:
        raise ConfigError(problem)
    refuse_code(Path(config.model))
    world_size = launcher.planned_world_size(config)
    if config.runs_lm_eval and config.backend != MEGATRON and world_size > 1:
        raise ConfigError(
            f"backend={config.backend} with {world_size} processes: lm-eval's transformers and vLLM models run in one process. Set "
            f"launch.nproc_per_node=1, or backend=megatron."
        )
    if config.runs_megatron:
        mcore_runtime.resolve_accelerator(config.accelerator)
        model, stored = Path(config.model), read_hf_config(Path(config.model))
        architecture = architecture_from_hf(stored)
        check_hf_weights(model, architecture)
        check_same_config(model, architecture, rope_from_hf(stored))
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
        evaluation.text_problem  # noqa: B018  downloads the text once, before the worker processes need it


def evaluate(config: EvaluateConfig, *, command: str, lm: Any = None) -> bool:
    """Run or resume an evaluation, and write results.json, records/ and evaluation.md. Every process of a job calls this function; only
    rank 0 writes.

    Args:
        config: configuration of the evaluation.
        command: command line that reproduces the evaluation, for the conditions.
        lm: an lm-eval LM that replaces the model, for tests.
    Returns:
        Whether no task failed. A task that is skipped because it cannot run on this machine does not count as failed.
    Raises:
        ConfigError: see prepare; or another process writes to the output directory.
        BackendUnavailableError, CheckpointError: see prepare.
        OutputError: the results cannot be written. The results of finished pairs are kept.
        DataError: see prepare; or the tokenizer does not return the configured number of BOS tokens.
    """
    prepare(config)
    for note in config.ignored():
        get_logger().info(note)
    conditions = conditions_of(config, command=command)
    if global_rank() > 0:
        return _Evaluation(config, config.directory(), conditions, lm, writes=False).run()
    with claimed(config.directory(), doing="runs this evaluation") as directory:
        make_directory(directory / _RECORDS)
        return _Evaluation(config, directory, conditions, lm).run()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class _Evaluation:
    """State of an evaluation in one process.

    Attributes:
        config: configuration of the evaluation.
        directory: output directory.
        conditions: conditions of the scores.
        lm: an lm-eval LM that replaces the model, for tests, or None.
        writes: whether this process writes files.
        not_run: tasks and lengths that were skipped or failed, with the reason.
        failures: number of pairs that failed.
    """

    config: EvaluateConfig
    directory: Path
    conditions: Conditions
    lm: Any
    writes: bool = True
    not_run: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0

    def run(self) -> bool:
        """Run the pairs that are not finished; see evaluate."""
        pairs = [pair for pair in self.pairs() if self._can_run(pair)]
        waiting = [pair for pair in pairs if not self.is_finished(pair)]
        if len(waiting) < len(pairs):
            get_logger().info(f"{len(pairs) - len(waiting)} of {len(pairs)} tasks and lengths are finished already")
        self.write(pending=len(waiting))
        number = 0
        # one runner after the other, so that the model is in memory only once at a time
        for runner in (LM_EVAL, MEGATRON):
            own_pairs = [pair for pair in waiting if pair.task.runner == runner]
            if not own_pairs:
                continue
            with self._loaded(runner, own_pairs) as tasks:
                for pair in own_pairs:
                    number += 1
                    self._run_pair(tasks, pair, f"[{number}/{len(waiting)}] {pair}")
                    self.write(pending=len(waiting) - number)
        get_logger().info(f"page {self.directory / 'evaluation.md'}")
        return not self.failures

    @contextmanager
    def _loaded(self, runner: str, waiting: list[Pair]) -> Iterator[Harness | MegatronTasks]:
        """Load the model and yield the tasks of a runner."""
        config = self.config
        longest = max([self.conditions.window, *(pair.length + ANSWER_ROOM for pair in waiting if pair.length)])
        if runner == LM_EVAL and config.backend != MEGATRON:
            yield Harness(config, max_length=longest, lm=self.lm)
            return
        runtime = mcore_runtime.initialize(
            config.parallel,
            accelerator=config.accelerator,
            seed=config.seed,
            timeout_minutes=config.launch.hang_timeout_minutes or None,
        )
        try:
            precision = {"float32": "fp32", "bfloat16": "bf16"}[self.conditions.runners[runner]["dtype"]]
            chunks = load_model(
                Path(config.model),
                precision=precision,
                backend=backends.resolve("torch"),  # results.json records SDPA as the attention
                device=runtime.device,
                parallel=config.parallel,
            )
            with Watchdog(0, FailureBoard()):  # only rank 0 writes; if a write fails, the watchdog ends the other ranks
                if runner == LM_EVAL:
                    yield Harness(config, max_length=longest, model=chunks, device=runtime.device, lm=self.lm)
                else:
                    yield MegatronTasks(
                        config, chunks, lengths=self._lengths(), texts=self._texts, trained=self._trained(), device=runtime.device
                    )
        finally:
            mcore_runtime.shut_down()

    @cached_property
    def text_problem(self) -> str | None:
        """Reason why the held-out text cannot be used, or None. The text is downloaded if it comes from a package."""
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
        """Return all pairs of a task and a length of the evaluation.

        Raises:
            ConfigError: suite.lengths is null, and the model's window is shorter than the shortest default length.
        """
        lengths = self._lengths()
        chosen = self.config.suite.chosen()
        if not lengths and any(task.has_lengths for task in chosen):
            raise ConfigError(
                f"suite.lengths=null: the model's window of {self.conditions.window} tokens is shorter than the shortest default length, "
                f"4096. Name the lengths, e.g. suite.lengths=[1024]."
            )
        paths = vars(self.config.suite.sources)
        return [Pair(task, length, haystack_of(task, paths)) for task in chosen for length in (lengths if task.has_lengths else [None])]

    def _can_run(self, pair: Pair) -> bool:
        """Return whether the pair can run, as far as this is known beforehand. If it cannot, record the reason."""
        reason = None
        if pair.task.runs_code and not self.config.suite.allow_code_execution:
            reason = "it executes code that the model wrote: set suite.allow_code_execution=true to allow this"
        elif pair.task.id == GAP_TASK and self._trained() is None:
            reason = NO_SEGMENTS
        elif pair.task.suite == PERPLEXITY and self.text_problem:
            reason = self.text_problem
        elif is_offline() or pair.task.runner == MEGATRON:  # Megatron-Core's tasks download nothing
            reason = missing_offline(pair.task, vars(self.config.suite.sources), has_punkt=has_punkt())
        if reason is not None:
            self._skip(pair, reason)
        return reason is None

    def _skip(self, pair: Pair, reason: str) -> None:
        identity = {"task_id": pair.task.id, "haystack": pair.haystack}
        self.not_run.append({"task": pair.name, **identity, "length": pair.length, "reason": reason})
        get_logger().info(f"{pair} does not run: {reason}")

    def _conditions_of(self, pair: Pair) -> dict[str, Any]:
        sources = sources_of(pair.task, vars(self.config.suite.sources))
        fingerprints: dict[str, Any] = {name: path and fingerprint(Path(path)) for name, path in sources.items()}
        return self.conditions.of_task(pair.task) | {
            "num_fewshot": self.config.suite.num_fewshot.get(pair.task.id),
            "sources": fingerprints | (self._held_out if pair.task.suite == PERPLEXITY else {}),
        }

    @cached_property
    def _held_out(self) -> dict[str, list[str] | None]:
        """{path: columns and fingerprints} of local held-out texts; the value is None for a missing text. Texts from packages are left
        out, because their content is fixed."""
        found: dict[str, list[str] | None] = {}
        for source in self.config.suite.perplexity.text:
            if not source.path.startswith("package:"):
                try:
                    found[source.path] = [f"{source.text_key} {fingerprint(file)}" for file in local_files(source.path)]
                except DataError:
                    found[source.path] = None
        return found

    def is_finished(self, pair: Pair) -> bool:
        """Return whether the output directory contains a score of the pair under the same conditions.

        Raises:
            ConfigError: the score has other conditions, and config.overwrite is false.
        """
        kept = self._kept(self.directory / _RECORDS / f"{pair.stem}.json")
        if kept is None:
            return False
        now = self._conditions_of(pair)
        before = kept["conditions"]
        differing = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items() if before.get(name) != value]
        if not differing:
            return True
        if not self.config.overwrite:
            raise ConfigError(
                f"output_dir={self.directory}: {pair} was evaluated under other conditions ({'; '.join(differing)}). "
                f"Set another output_dir, or overwrite=true to repeat it."
            )
        get_logger().info(f"{pair} is evaluated again: {'; '.join(differing)}")
        return False

    @staticmethod
    def _kept(path: Path) -> dict[str, Any] | None:
        """Return the score in a file of records/ with its conditions, or None if the score or its samples are missing or damaged."""
        samples = path.with_suffix(".jsonl")
        if not samples.is_file():
            return None

        def is_whole(kept: dict[str, Any]) -> bool:
            """Return whether score and samples have the content that was written. Records of earlier releases have no digests."""
            score, conditions, digest = kept["score"], kept["conditions"], kept.get("samples_digest")
            if not (isinstance(score["score"], int | float) and isinstance(score["task"], str) and isinstance(conditions, dict)):
                return False
            return digest is None or (digest == _file_digest(samples) and kept["digest"] == json_digest([conditions, score]))

        kept = read_or_set_aside(path, is_valid=is_whole, consequence="the task is evaluated again")
        return {**kept, "score": with_identity(kept["score"])} if kept else None

    def _run_pair(self, tasks: Harness | MegatronTasks, pair: Pair, label: str) -> None:
        started = time.monotonic()
        try:
            samples = tasks.run(
                pair.task,
                length=pair.length,
                window=self.conditions.window,
                label=label,
                log_file=self.directory / "harness.log",
            )
        except OutputError:
            raise  # the results of the other tasks could not be written either
        except Exception as error:  # the other tasks still run
            self.failures += 1
            downloaded = [name for name, path in sources_of(pair.task, vars(self.config.suite.sources)).items() if path is None]
            words = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            self._skip(pair, words if not downloaded else f"{words} (if a download failed: {way_out(downloaded)})")
            return
        score = self._score(pair, samples, time.monotonic() - started)
        self._keep(pair, score, samples)
        get_logger().info(f"{label}: {score['score']:.4g} {pair.task.unit}, {len(samples)} samples, {score['seconds']:.0f} s")

    def _score(self, pair: Pair, samples: list[Sample], seconds: float) -> dict[str, Any]:
        by_text: dict[int, list[float]] = {}  # questions about one text are not independent of each other
        for sample in samples:
            by_text.setdefault(getattr(sample, "haystack", sample.index), []).append(sample.score)
        values = [float(np.mean(scores)) for scores in by_text.values()]
        details = log_probability_details(samples, self._trained())
        return {
            "suite": pair.task.suite,
            "task": pair.name,
            "task_id": pair.task.id,
            "haystack": pair.haystack,
            "group": pair.task.group,
            "length": pair.length,
            "metric": pair.task.metric if pair.task.filter == "none" else f"{pair.task.metric}, {pair.task.filter}",
            "score": float(np.mean([sample.score for sample in samples])),
            "samples": len(samples),
            "interval": list(bootstrap_interval(values)) if len(values) > 1 else None,
            "seconds": round(seconds, 1),
            "records": f"{_RECORDS}/{pair.stem}.jsonl",
            **({} if details is None else {"graded": details}),
        }

    def _keep(self, pair: Pair, score: dict[str, Any], samples: list[Sample]) -> None:
        """Write the samples, then the score. The file with the score marks the pair as finished."""
        if not self.writes:
            return
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        records = self.directory / _RECORDS
        (records / f"{pair.stem}.json").unlink(missing_ok=True)
        replace_text(records / f"{pair.stem}.jsonl", lines)
        conditions = self._conditions_of(pair)
        digests = {"digest": json_digest([conditions, score]), "samples_digest": _file_digest(records / f"{pair.stem}.jsonl")}
        finished = {"conditions": conditions, "score": score, **digests}
        replace_text(records / f"{pair.stem}.json", json.dumps(finished, indent=1, ensure_ascii=False) + "\n")

    def write(self, *, pending: int) -> None:
        """Write results.json and the page. They contain all pairs that finished under these conditions, including those of earlier starts.

        Args:
            pending: number of pairs that are not finished.
        """
        if not self.writes:
            return
        finished = self._finished_under_these_conditions()
        scores = [kept["score"] for kept in finished]
        sources = {name: str(path) for name, path in vars(self.config.suite.sources).items() if path}
        recorded = self.conditions.recorded_with([kept["conditions"] for kept in finished])
        conditions = recorded | {"num_fewshot": self.config.suite.num_fewshot, "local_sources": sources}
        results = {"model": str(self.config.model), "conditions": conditions, "scores": scores, "not_run": self.not_run}
        replace_text(self.directory / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_evaluation(self.directory, results, pending=pending)

    def _finished_under_these_conditions(self) -> list[dict[str, Any]]:
        """Return the scores under these conditions, including those of earlier starts. Conditions include the settings of a score's suite
        (depths, held-out text). The configuration gives them only for the suites that it runs. For any other suite, the newest score that
        meets the remaining conditions gives them, and older scores with other settings are left out."""
        paths = sorted((self.directory / _RECORDS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        settings = {suite: self.conditions.suite_settings.get(suite, {}) for suite in self.config.suite.suites()}
        found = {}
        for path in paths:
            kept = self._kept(path)
            task = TASKS.get(kept["score"]["task_id"]) if kept else None
            if not kept or not task:
                continue
            before = kept["conditions"]
            own = {name: before.get(name) for name in self.conditions.suite_settings.get(task.suite, {})}
            required = self.conditions.of_task(task, settings=settings.get(task.suite, own))
            if all(before.get(name) == value for name, value in required.items()):
                settings.setdefault(task.suite, own)
                found[path.name] = kept
        return [found[name] for name in sorted(found)]
