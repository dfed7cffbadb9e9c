"""lm-eval (EleutherAI's language model evaluation harness) behind one door: a model loaded once, one run a task and length, an answer and a
score for every sample. What people get wrong is set here: one BOS, raw prompts, the length, the samples. The only place that imports
lm_eval, and late: it takes many seconds and is an extra."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from endprompt_megatron.checkpoint.hf.tokenizer import end_tokens, load_tokenizer
from endprompt_megatron.errors import BackendUnavailableError, DataError
from endprompt_megatron.evaluation.lm_eval_harness.ruler_prompts import bounded, generator_of, replaced
from endprompt_megatron.evaluation.suite import MEGATRON, PREFILL_CHUNK, RULER_SAMPLES, EvaluateConfig
from endprompt_megatron.evaluation.tasks import PUNKT, RULER, SOURCES, HarnessTask, is_offline, sources_of
from endprompt_megatron.log import Progress
from endprompt_megatron.model.gpt import EndPromptGPTModel

VERSION = "0.4.13"
INSTALL = "pip install -e '.[eval]'"
# beyond a RULER length, for the answer prefix and the answer, which the harness does not count (at most 128 tokens are generated)
ANSWER_ROOM = 512
# the harness's folders that hold the tasks: reading all of its thousands of descriptions takes half a minute
_TASK_FOLDERS = ("ruler", "longbench", "mmlu/default", "gsm8k", "hellaswag", "humaneval")
_PROBE = "The grass is green."
_START = "_state_when_loaded"  # of the generator of a RULER module
_REQUESTS_AT_ONCE = {"generate_until": 8, "loglikelihood": 256}  # between two progress lines, times the batch size


@dataclass(frozen=True)
class Sample:
    """One question, answered.

    Attributes:
        index: of the sample in its task, the same for every model.
        score: 0 to 100.
        output: what the model wrote; of multiple choice the log-likelihoods of the choices, in nats.
        references: what would have been right.
        prompt_tokens: of what the model was given, before anything was cut; None for multiple choice.
    """

    index: int
    score: float
    output: str
    references: Any
    prompt_tokens: int | None = None


def harness_version() -> str:
    """The installed version.

    Raises:
        BackendUnavailableError: it is not installed, or not in the version that the patches of ruler_prompts were made for.
    """
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailableError(f"lm-eval is not installed. Install the extra: {INSTALL}") from None
    if found != VERSION:
        raise BackendUnavailableError(f"lm-eval {found} is installed; these tasks are made for {VERSION}. Install the extra: {INSTALL}")
    return found


def check_backend(backend: str) -> None:
    """Whether the backend is installed.

    Raises:
        BackendUnavailableError: vllm is asked for and not there.
    """
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError("backend=vllm: vLLM is not installed. Install it (pip install vllm, needs a GPU) or set backend=hf.")


def has_punkt() -> bool:
    """Whether NLTK finds punkt_tab by itself."""
    if importlib.util.find_spec("nltk") is None:
        return False
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def bos_token_of(model_dir: Path) -> str | None:
    """The tokenizer's BOS, None where it names none (such models were trained without)."""
    return load_tokenizer(model_dir).bos_token


class Harness:
    """One model on lm-eval.

    Args:
        config: of the evaluation.
        max_length: tokens that a prompt and its answer may take together, at most.
        model: on Megatron-Core, of backend megatron; the others load theirs.
        device: of that model.
        lm: an lm-eval LM in the model's place, for tests.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        *,
        max_length: int,
        model: EndPromptGPTModel | list[EndPromptGPTModel] | None = None,
        device: torch.device | None = None,
        lm: Any = None,
    ):
        self.config, self.max_length = config, max_length
        self.metadata: dict[str, Any] = {"tokenizer": str(config.model), "max_seq_lengths": []}
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent
        self._ruler = folder / "ruler"
        self._manager = lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=[str(folder / name) for name in _TASK_FOLDERS], metadata=self.metadata
        )
        self._own_model = lm is None
        self.lm = lm or (self._load() if model is None else self._wrap(model, device))
        if self._own_model:
            self._check_bos(self.lm)

    def _wrap(self, model: EndPromptGPTModel | list[EndPromptGPTModel], device: torch.device) -> Any:
        from endprompt_megatron.evaluation.lm_eval_harness.megatron_lm import MegatronLM

        model_dir = Path(self.config.model)
        tokenizer = load_tokenizer(model_dir)
        return MegatronLM(
            model,
            tokenizer,
            end_tokens=end_tokens(model_dir, tokenizer),
            bos=tokenizer.bos_token_id if self._wants_bos() else None,
            max_length=self.max_length,
            prefill_chunk=PREFILL_CHUNK,
            device=device,
        )

    def _load(self) -> Any:
        config = self.config
        own: dict[str, Any] = {"pretrained": str(config.model), "dtype": config.dtype, "add_bos_token": True if self._wants_bos() else None}
        if config.bos == "none":
            own["add_bos_token"] = False
        if config.backend == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            # vLLM multiplies max_position_embeddings by a linear factor, and refuses lengths beyond its own idea of the window
            os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
            own |= {"max_model_len": self.max_length, "tensor_parallel_size": config.tensor_parallel_size, "seed": config.seed}
            return VLLM(**own, batch_size="auto")
        from lm_eval.models.huggingface import HFLM

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        own |= {"max_length": self.max_length, "device": device, "batch_size": config.batch_size, "attn_implementation": "sdpa"}
        return HFLM(**own)

    def _wants_bos(self) -> bool:
        return self.config.bos == "one" and bos_token_of(Path(self.config.model)) is not None

    def _check_bos(self, lm: Any) -> None:
        """Look at what the model will be given, not at what was asked for."""
        wanted = int(self._wants_bos())
        ways = {"tok_encode": list(lm.tok_encode(_PROBE))}
        if hasattr(lm, "tok_batch_encode"):
            ways["tok_batch_encode"] = lm.tok_batch_encode([_PROBE])[0][0].tolist()
        for name, ids in ways.items():
            found = ids.count(lm.tokenizer.bos_token_id) if lm.tokenizer.bos_token_id is not None else 0
            if found != wanted or (wanted and ids[0] != lm.tokenizer.bos_token_id):
                raise DataError(
                    f"bos={self.config.bos}: {wanted} BOS tokens belong before a prompt, and {found} are there ({name} gives {ids[:4]}). "
                    f"Set bos={'none' if wanted else 'one'}, or mend the tokenizer of {self.config.model}."
                )

    def run(self, task: HarnessTask, *, length: int | None, window: int, label: str, log_file: Path) -> list[Sample]:
        """Ask one task.

        Args:
            task: which.
            length: of RULER's prompts, in tokens; None for the other tasks.
            window: of the model, in tokens: what prompts and answers of the other tasks are cut to.
            label: for the progress display.
            log_file: takes what the harness prints.
        Returns:
            the samples in order of their index, scored.
        Raises:
            whatever the harness raises: datasets that cannot be had, memory that does not suffice.
        """
        from lm_eval.evaluator import evaluate

        suite, seed = self.config.suite, self.config.seed
        self.metadata["max_seq_lengths"] = [length] if length else []
        if self._own_model:
            self.lm._max_length = length + ANSWER_ROOM if length else window
        if self.config.backend == MEGATRON:
            self.lm.label = label  # it shows its progress itself
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(log_file.open("a"))
            stack.enter_context(contextlib.redirect_stderr(log))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # thousands of lines of ruler_vt
            for context in self._prepared(task):
                stack.enter_context(context)
            loaded = self._manager.load([task.name])
            for found in loaded["tasks"].values():
                if task.name in suite.num_fewshot:
                    found.set_config(key="num_fewshot", value=suite.num_fewshot[task.name])
                elif found.get_config("num_fewshot") is None:
                    found.set_config(key="num_fewshot", value=0)
                found.set_fewshot_seed(seed=seed)
            for request, at_once in _REQUESTS_AT_ONCE.items():
                if self.config.backend == "hf":
                    stack.enter_context(_in_portions(self.lm, request, at_once * self.config.batch_size, label))
            answered = evaluate(
                lm=self.lm,
                task_dict=loaded,
                limit=suite.samples,
                bootstrap_iters=0,
                apply_chat_template=suite.apply_chat_template,
                fewshot_as_multiturn=suite.apply_chat_template,
                confirm_run_unsafe_code=task.runs_code and suite.allow_code_execution,
            )
        return self._samples(task, length, answered["samples"])

    def _prepared(self, task: HarnessTask) -> Iterator[contextlib.AbstractContextManager]:
        """The surroundings of a run: local sources in place of the net, bounded generators, leave to execute code."""
        paths = {name: path and str(Path(path).expanduser()) for name, path in sources_of(task, vars(self.config.suite.sources)).items()}
        if PUNKT in task.needs and paths[PUNKT]:
            import nltk

            yield replaced(nltk.data, "path", [paths[PUNKT], *nltk.data.path])
        local = {SOURCES["essays" if "essays" in task.needs else name].hub: path for name, path in paths.items() if path and name != PUNKT}
        yield _local_datasets({hub: path for hub, path in local.items() if hub})
        if task.suite == RULER:
            module = self._ruler_module(generator_of(task.name)[0])
            for name in ("squad", "hotpotqa"):
                if paths.get(name):
                    yield _local_download(module, SOURCES[name].url, paths[name])
            yield bounded(task.name, module, samples=self.config.suite.samples or RULER_SAMPLES)
        if task.runs_code:
            yield _environment("HF_ALLOW_CODE_EVAL", "1")

    def _ruler_module(self, name: str) -> ModuleType:
        """The module as the harness itself will find it, fresh: common words draws from a generator of its own that never starts again; it
        is set back, because to load its module anew takes seconds."""
        from lm_eval.tasks._yaml_loader import _load_module_with_cache

        module = sys.modules.get(f"lm_eval.tasks.ruler.{name}")
        if hasattr(module, _START):
            module.RNG.setstate(getattr(module, _START))
            return module
        sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)
        with _no_nltk_download() if is_offline() else contextlib.nullcontext():
            module = _load_module_with_cache(self._ruler / f"{name}.py")
        if hasattr(module, "RNG"):
            setattr(module, _START, module.RNG.getstate())
        if hasattr(module, "get_haystack"):
            module.get_haystack.cache_clear()
        return module

    def _samples(self, task: HarnessTask, length: int | None, answered: dict[str, list[dict[str, Any]]]) -> list[Sample]:
        metric = str(length) if task.suite == RULER else task.metric
        found = []
        for subject in sorted(answered):  # MMLU has 57, the others one
            for sample in sorted(answered[subject], key=lambda sample: sample["doc_id"]):
                if sample["filter"] != task.filter:
                    continue
                first = sample["resps"][0][0]
                written = isinstance(first, str)
                output = first if written else json.dumps([round(float(choice[0][0]), 4) for choice in sample["resps"]])
                tokens = len(self.lm.tok_encode(sample["arguments"][0][0])) if written and self._own_model else None
                found.append(Sample(len(found), 100 * float(sample[metric]), output, _references(task, sample), tokens))
        if not found:
            raise DataError(f"{task.name}: the harness returned no sample with the filter {task.filter!r}.")
        return found


def _references(task: HarnessTask, sample: dict[str, Any]) -> Any:
    return sample["doc"]["outputs"] if task.suite == RULER else sample["target"]


@contextlib.contextmanager
def _in_portions(lm: Any, name: str, size: int, label: str) -> Iterator[None]:
    """Inside the block the model gets its requests in portions, with a progress line between them."""
    original: Callable = getattr(lm, name)

    def ask(requests: list, **_: Any) -> list:
        answers = []
        with Progress(label, len(requests)) as progress:
            for first in range(0, len(requests), size):
                portion = requests[first : first + size]
                answers += original(portion, disable_tqdm=True)
                progress.advance(len(portion))
        return answers

    setattr(lm, name, ask)
    try:
        yield
    finally:
        delattr(lm, name)


@contextlib.contextmanager
def _local_datasets(local: dict[str, str]) -> Iterator[None]:
    """Inside the block datasets.load_dataset reads folders in place of datasets of the hub."""
    from lm_eval.api.task import datasets

    original = datasets.load_dataset

    def load(path: str, *args: Any, **options: Any) -> Any:
        return original(local.get(path, path), *args, **options)

    with replaced(datasets, "load_dataset", load):
        yield


@contextlib.contextmanager
def _local_download(module: ModuleType, url: str, path: str) -> Iterator[None]:
    """Inside the block the module's download of a JSON file reads a local one."""
    original = module.download_json

    def read(asked: str) -> Any:
        return json.loads(Path(path).read_text(encoding="utf-8")) if asked == url else original(asked)

    with replaced(module, "download_json", read):
        yield


@contextlib.contextmanager
def _no_nltk_download() -> Iterator[None]:
    """Inside the block NLTK fetches nothing: the harness would, while a module of it is imported, for tasks too that need none."""
    import nltk

    with replaced(nltk, "download", lambda *args, **options: False):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Inside the block the environment variable has the value."""
    kept = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept
