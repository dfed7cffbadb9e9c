"""An evaluation with the harness: task after task and length after length, each finished one a file, so that the same command goes on where
it stopped; results.json and a page are written anew after every one."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.checkpoint.companions import PROVENANCE_FILE
from endprompt_megatron.checkpoint.hf_config import read_hf_config
from endprompt_megatron.comparison.bootstrap import bootstrap_interval
from endprompt_megatron.config import ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.harness import ANSWER_ROOM, Harness, Sample, bos_token_of, check_backend, harness_version, has_punkt
from endprompt_megatron.evaluation.megatron_probes import MegatronProbes, load_model
from endprompt_megatron.evaluation.suite import MEGATRON, EvaluateConfig
from endprompt_megatron.evaluation.task_sources import (
    PROBES,
    HarnessTask,
    fingerprint,
    is_offline,
    missing_offline,
    prose_of,
    sources_of,
    uses_stand_in,
    way_out,
)
from endprompt_megatron.log import get_logger
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.mcore.version import megatron_core_version
from endprompt_megatron.model import backends
from endprompt_megatron.output_files import claimed, replace_text
from endprompt_megatron.report.evaluation import ESSAYS_MARK, STAND_IN_MARK, write_evaluation

RESULTS = "results.json"
_RECORDS = "records"
_OF_A_TASK = ("num_fewshot", "sources")  # conditions that differ between the tasks of one evaluation


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
    def stem(self) -> str:
        """Of its files."""
        haystack = "stand_in" if self.stand_in else "essays" if self.essays else ""
        parts = (self.task.name, haystack, "" if self.length is None else str(self.length))
        return "_".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.name if self.length is None else f"{self.name} at {self.length}"


def evaluate(config: EvaluateConfig, *, command: str, lm: Any = None) -> bool:
    """Carry an evaluation out, or on. Writes results.json, records/ and evaluation.md.

    Args:
        config: what to ask which model.
        command: that reproduces it, for the conditions.
        lm: an lm-eval LM in the model's place, for tests.
    Returns:
        Whether no task failed; one that cannot run here and was named as such beforehand is no failure.
    Raises:
        ConfigError: settings that cannot be, another evaluation's output directory, or a directory that another process writes.
        BackendUnavailableError: lm-eval or the backend is not installed.
        DataError: the model's tokenizer cannot be read, or gives other than the BOS tokens asked for.
    """
    config.validate()
    check_backend(config.backend)
    asked_by = f"megatron-core {megatron_core_version()}, built-in tasks" if config.asks_probes else f"lm-eval {harness_version()}"
    for note in config.ignored():
        get_logger().info(note)
    with claimed(config.directory(), doing="carries this evaluation out") as directory:
        (directory / _RECORDS).mkdir(exist_ok=True)
        return _Evaluation(config, directory, _conditions(config, asked_by, command), lm).carry_out()


def _conditions(config: EvaluateConfig, asked_by: str, command: str) -> dict[str, Any]:
    """What the scores depend on, and where they were made."""
    room = f"RULER: {ANSWER_ROOM} tokens beyond the length; other tasks: prompt and answer are cut to the window"
    token = bos_token_of(Path(config.model)) if config.bos == "one" else None
    window = int(read_hf_config(Path(config.model))["max_position_embeddings"])
    made = Path(config.model) / PROVENANCE_FILE
    native = json.loads(made.read_text()).get("original_context_length", window) if made.is_file() else window
    return {
        "harness": asked_by,
        "model": fingerprint(Path(config.model)),
        "backend": {"hf": "hf, SDPA attention", MEGATRON: "Megatron-Core, SDPA attention"}.get(config.backend, config.backend),
        "dtype": _megatron_dtype(config) if config.backend == MEGATRON else config.dtype,
        "bos": f"one, {token}" if token else "none",
        "chat_template": config.suite.apply_chat_template,
        "samples": config.suite.samples,
        "seed": config.seed,
        "window": window,
        "native_window": native,
        "room_for_answers": "within the length" if config.asks_probes else room,
        "batch_size": config.batch_size if config.backend == "hf" else None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "hardware": _hardware(),
        "command": command,
    }


def _accelerator(config: EvaluateConfig) -> str:
    """Of Megatron-Core, for the device that the config names."""
    return {None: "auto", "cpu": "cpu"}.get(config.device, "gpu")


def _megatron_dtype(config: EvaluateConfig) -> str:
    """What the model computes in: as asked, or what suits the machine."""
    if config.dtype != "auto":
        return config.dtype
    precision = mcore_runtime.resolve_precision("auto", mcore_runtime.resolve_accelerator(_accelerator(config)))
    return {"fp32": "float32", "bf16": "bfloat16"}[precision]


# of _conditions: other values make other scores
_DECISIVE = ("harness", "model", "backend", "dtype", "bos", "chat_template", "samples", "seed", "window")


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@dataclass
class _Evaluation:
    """One evaluation under way."""

    config: EvaluateConfig
    directory: Path
    conditions: dict[str, Any]
    lm: Any
    not_run: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0

    def carry_out(self) -> bool:
        """As evaluate."""
        pairs = [pair for pair in self._pairs() if self._can_run(pair)]
        waiting = [pair for pair in pairs if not self._is_finished(pair)]
        if len(waiting) < len(pairs):
            get_logger().info(f"{len(pairs) - len(waiting)} of {len(pairs)} tasks and lengths are finished already")
        self.write(pending=len(waiting))
        if waiting:
            with self._asker(waiting) as asker:
                for number, pair in enumerate(waiting, 1):
                    self._run(asker, pair, f"[{number}/{len(waiting)}] {pair}")
                    self.write(pending=len(waiting) - number)
        get_logger().info(f"page {self.directory / 'evaluation.md'}")
        return not self.failures

    @contextmanager
    def _asker(self, waiting: list[Pair]) -> Iterator[Harness | MegatronProbes]:
        """What asks the tasks, with the model loaded."""
        config = self.config
        longest = max([self.conditions["window"], *(pair.length + ANSWER_ROOM for pair in waiting if pair.length)])
        if config.backend != MEGATRON:
            yield Harness(config, max_length=longest, lm=self.lm)
            return
        runtime = mcore_runtime.initialize(ParallelConfig(), accelerator=_accelerator(config), seed=config.seed)
        try:
            precision = {"float32": "fp32", "bfloat16": "bf16"}[self.conditions["dtype"]]
            model = load_model(Path(config.model), precision=precision, backend=backends.resolve("auto"), device=runtime.device)
            if config.asks_probes:
                yield MegatronProbes(config, model, device=runtime.device)
            else:
                yield Harness(config, max_length=longest, model=model, device=runtime.device, lm=self.lm)
        finally:
            mcore_runtime.shut_down()

    def _pairs(self) -> list[Pair]:
        lengths = self.config.suite.lengths_for(self.conditions["window"])
        chosen = self.config.suite.chosen()
        if not lengths and any(task.has_lengths for task in chosen):
            raise ConfigError(
                f"suite.lengths=null: the model's window of {self.conditions['window']} tokens is below the shortest length that is asked "
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
        elif is_offline() or pair.task.suite == PROBES:  # which fetch nothing
            reason = missing_offline(pair.task, vars(self.config.suite.sources), has_punkt=has_punkt())
        if reason is not None:
            self._cannot(pair, reason)
        return reason is None

    def _cannot(self, pair: Pair, reason: str) -> None:
        self.not_run.append({"task": pair.name, "length": pair.length, "reason": reason})
        get_logger().info(f"{pair} does not run: {reason}")

    def _conditions_of(self, pair: Pair) -> dict[str, Any]:
        decisive = {name: self.conditions[name] for name in _DECISIVE}
        sources = sources_of(pair.task, vars(self.config.suite.sources))
        return decisive | {
            "num_fewshot": self.config.suite.num_fewshot.get(pair.task.name),
            "sources": {name: path and fingerprint(Path(path)) for name, path in sources.items()},
        }

    def _is_finished(self, pair: Pair) -> bool:
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

    def _run(self, asker: Harness | MegatronProbes, pair: Pair, label: str) -> None:
        started = time.monotonic()
        try:
            samples = asker.run(
                pair.task,
                length=pair.length,
                window=self.conditions["window"],
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
        get_logger().info(f"{label}: {score['score']:.1f} of 100, {len(samples)} samples, {score['seconds']:.0f} s")

    def _score(self, pair: Pair, samples: list[Sample], seconds: float) -> dict[str, Any]:
        values = [sample.score for sample in samples]
        return {
            "suite": pair.task.suite,
            "task": pair.name,
            "group": pair.task.group,
            "length": pair.length,
            "metric": pair.task.metric if pair.task.filter == "none" else f"{pair.task.metric}, {pair.task.filter}",
            "score": float(np.mean(values)),
            "samples": len(values),
            "interval": list(bootstrap_interval(values)) if len(values) > 1 else None,
            "seconds": round(seconds, 1),
            "records": f"{_RECORDS}/{pair.stem}.jsonl",
        }

    def _keep(self, pair: Pair, score: dict[str, Any], samples: list[Sample]) -> None:
        """The samples, then the score, whose file says that the pair is finished."""
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        records = self.directory / _RECORDS
        (records / f"{pair.stem}.json").unlink(missing_ok=True)
        replace_text(records / f"{pair.stem}.jsonl", lines)
        finished = {"conditions": self._conditions_of(pair), "score": score}
        replace_text(records / f"{pair.stem}.json", json.dumps(finished, indent=1, ensure_ascii=False) + "\n")

    def write(self, *, pending: int) -> None:
        """results.json and the page, from every finished pair that was asked under these conditions, in this sitting or before."""
        decisive = {name: self.conditions[name] for name in _DECISIVE}
        scores = []
        for path in sorted((self.directory / _RECORDS).glob("*.json")):
            kept = self._kept(path)
            if kept and {name: value for name, value in kept["conditions"].items() if name not in _OF_A_TASK} == decisive:
                scores.append(kept["score"])
        sources = {name: str(path) for name, path in vars(self.config.suite.sources).items() if path}
        conditions = self.conditions | {"num_fewshot": self.config.suite.num_fewshot, "local_sources": sources}
        results = {"model": str(self.config.model), "conditions": conditions, "scores": scores, "not_run": self.not_run}
        replace_text(self.directory / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_evaluation(self.directory, results, pending=pending)
