"""What an evaluation with the harness is: which model, which tasks at which lengths, on how many samples. Dataclasses and their rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.task_sources import PROBES, RULER, SUITES, TASKS, HarnessTask, path_problems, tasks_of

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
class SuiteConfig:
    """Tasks of the harness.

    Attributes:
        name: of the suite, for the output directory and the page.
        tasks: names of tasks, or of suites (ruler, longbench, short, probes), which stand for all of theirs.
        lengths: of RULER's prompts, in tokens; null: powers of two from 4096 to the model's window, at most 131072.
        samples: of a task and length (of MMLU: of a subject), the first ones; null: all there are (RULER: 500, probes: 100).
        num_fewshot: {task: worked examples in the prompt}; the others keep the harness's number.
        apply_chat_template: for instruct models; false gives raw prompts, as base models need them.
        allow_code_execution: HumanEval runs what the model wrote, on this machine, unprotected; false leaves it out.
        sources: local copies of what the tasks are made of.
    """

    name: str = "???"
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] | None = None
    samples: int | None = None
    num_fewshot: dict[str, int] = field(default_factory=dict)
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    sources: SourcesConfig = field(default_factory=SourcesConfig)

    def problems(self) -> list[str]:
        """Every rule that is broken, in sentences."""
        problems = []
        known = {*SUITES, *TASKS}
        for name in [name for name in self.tasks if name not in known]:
            problems.append(f"suite.tasks: {name} is neither a suite ({', '.join(SUITES)}) nor one of {', '.join(TASKS)}.")
        if not self.tasks:
            problems.append("suite.tasks=[]: name at least one, e.g. suite.tasks=[niah_single_1].")
        for name, count in self.num_fewshot.items():
            if name not in TASKS or TASKS[name].suite in (RULER, PROBES) or count < 0:
                problems.append(f"suite.num_fewshot.{name}={count}: must be >= 0, for a task of longbench or short.")
        if self.samples is not None and self.samples < 1:
            problems.append(f"suite.samples={self.samples}: must be >= 1, or null for all.")
        if self.lengths is not None:
            if not self.lengths or len(set(self.lengths)) < len(self.lengths):
                problems.append(f"suite.lengths={list(self.lengths)}: name at least one, each once, or null.")
            for length in self.lengths:
                if not SHORTEST <= length <= LONGEST:
                    problems.append(f"suite.lengths: {length} tokens; RULER's prompts are made for {SHORTEST} to {LONGEST}.")
        return problems + path_problems(asdict(self.sources))

    def chosen(self) -> list[HarnessTask]:
        """The tasks, in the order named."""
        return tasks_of(self.tasks)

    def lengths_for(self, window: int) -> list[int]:
        """RULER's lengths for a model whose config.json names `window` positions."""
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
        backend: hf (transformers with SDPA) | vllm | megatron (Megatron-Core), of which probes takes the last alone.
        dtype: of the weights: auto (as stored) | float32 | bfloat16 | float16.
        device: of backend hf, e.g. cuda:0; null: a GPU where there is one, else the CPU.
        batch_size: prompts at once, of backend hf; vllm finds its own.
        tensor_parallel_size: GPUs that share the model, of backend vllm.
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
    bos: str = "one"
    seed: int = 42
    overwrite: bool = False

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

    def _suites(self) -> set[str]:
        return {TASKS[name].suite if name in TASKS else name for name in self.suite.tasks if name in TASKS or name in SUITES}

    @property
    def asks_probes(self) -> bool:
        """Whether the tasks are the built-in ones, which lm-eval does not know."""
        return PROBES in self._suites()

    def _backend_problems(self) -> list[str]:
        problems = []
        if self.asks_probes and self._suites() != {PROBES}:
            problems.append(f"suite.tasks={list(self.suite.tasks)}: lm-eval does not know the tasks of {PROBES}. Ask them in another run.")
        if self.asks_probes and self.backend != MEGATRON:
            problems.append(f"backend={self.backend}: the tasks of {PROBES} run on Megatron-Core. Set backend=megatron.")
        if self.backend == MEGATRON and self.dtype == "float16":
            problems.append("dtype=float16: Megatron-Core evaluates in float32 or bfloat16. Set one of them.")
        if self.asks_probes and self.suite.apply_chat_template:
            problems.append("suite.apply_chat_template=true: the tasks of probes are raw prompts. Set it to false.")
        return problems

    def ignored(self) -> list[str]:
        """Settings that the backend does not read, in words."""
        defaults = EvaluateConfig()
        keys = {"vllm": ("device", "batch_size"), MEGATRON: ("batch_size", "tensor_parallel_size")}.get(self.backend, ())
        changed = [key for key in keys if getattr(self, key) != getattr(defaults, key)]
        return [f"{key}={getattr(self, key)} is ignored: backend={self.backend} has its own" for key in changed]

    def directory(self) -> Path:
        """Where results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = Path(self.model).resolve()
        name = model.parent.name if model.name == "hf" else model.name
        return Path("outputs") / "evaluate" / f"{name}_{self.suite.name}"
