"""Run tasks with lm-eval (EleutherAI's language model evaluation harness). The model is loaded once. Each run evaluates one task at one
length and returns the output and the score of every sample. This module fixes settings that are easily wrong: one BOS, raw prompts, the
length, the samples. Only this package imports lm_eval, and this module imports it inside functions, because lm_eval is an optional
dependency and its import takes seconds."""

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
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from endprompt_megatron.checkpoint.hf.no_code import without_custom_generate, without_questions
from endprompt_megatron.checkpoint.hf.tokenizer import end_tokens, load_tokenizer
from endprompt_megatron.errors import BackendUnavailableError, DataError
from endprompt_megatron.evaluation.lm_eval_harness.ruler_prompts import bounded, generator_of
from endprompt_megatron.evaluation.sample import Sample
from endprompt_megatron.evaluation.suite import PREFILL_CHUNK, RULER_SAMPLES, EvaluateConfig
from endprompt_megatron.evaluation.task_sources import SOURCES, is_offline, sources_of
from endprompt_megatron.evaluation.tasks import ESSAYS, MEGATRON, PUNKT, RULER, Task
from endprompt_megatron.log import Progress
from endprompt_megatron.mcore.patching import replaced
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.output_files import writing

VERSION = "0.4.13"
INSTALL = "pip install -e '.[eval]'"
# number of tokens beyond a RULER length, for the answer prefix and the answer (at most 128 tokens). lm-eval does not count these tokens.
ANSWER_ROOM = 512
# lm-eval's folders that contain the tasks of tasks.py; reading all of lm-eval's thousands of task files takes half a minute
_TASK_FOLDERS = ("ruler", "longbench", "mmlu/default", "gsm8k", "hellaswag", "humaneval")
_BOS_CHECK_TEXT = "The grass is green."
_INITIAL_STATE = "_state_when_loaded"  # attribute of a RULER module with the state of its random generator after the import
_REQUESTS_PER_PROGRESS_LINE = {"generate_until": 8, "loglikelihood": 256}  # multiplied by the batch size


def harness_version() -> str:
    """Return the installed version of lm-eval.

    Raises:
        BackendUnavailableError: lm-eval is not installed, or ruler_prompts does not support its version.
    """
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailableError(f"lm-eval is not installed. Install the extra: {INSTALL}") from None
    if found != VERSION:
        raise BackendUnavailableError(f"lm-eval {found} is installed; only {VERSION} is supported. Install the extra: {INSTALL}")
    return found


def check_backend(backend: str) -> None:
    """Check that the backend is installed.

    Raises:
        BackendUnavailableError: the backend is vllm, and vLLM is not installed.
    """
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise BackendUnavailableError("backend=vllm: vLLM is not installed. Install it (pip install vllm, needs a GPU) or set backend=hf.")


def has_punkt() -> bool:
    """Return whether NLTK finds punkt_tab in its own search path."""
    if importlib.util.find_spec("nltk") is None:
        return False
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def bos_token_of(model_dir: Path) -> str | None:
    """Return the tokenizer's BOS token; None if the tokenizer has none, because the model was trained without one."""
    return load_tokenizer(model_dir).bos_token


class Harness:
    """Runs lm-eval's tasks on one model.

    Args:
        config: configuration of the evaluation.
        max_length: maximum number of tokens of a prompt and its answer together.
        model: the loaded model for backend megatron; None for the other backends, for which this class loads the model.
        device: device of `model`.
        lm: an lm-eval LM that replaces the model, for tests.
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
        self._is_real_model = lm is None
        self.lm = lm or (self._load() if model is None else self._wrap(model, device))
        if self._is_real_model:
            self._check_bos(self.lm)

    def _wrap(self, model: EndPromptGPTModel | list[EndPromptGPTModel], device: torch.device) -> Any:
        from endprompt_megatron.evaluation.lm_eval_harness.megatron_lm import MegatronLM

        model_dir = Path(self.config.model)
        tokenizer = load_tokenizer(model_dir)
        return MegatronLM(
            model,
            tokenizer,
            end_tokens=end_tokens(model_dir, tokenizer),
            bos=tokenizer.bos_token_id if self._needs_bos() else None,
            max_length=self.max_length,
            prefill_chunk=PREFILL_CHUNK,
            device=device,
        )

    def _load(self) -> Any:
        config = self.config
        own: dict[str, Any] = {"pretrained": str(config.model), "dtype": config.dtype, "add_bos_token": True if self._needs_bos() else None}
        if config.bos == "none":
            own["add_bos_token"] = False
        if config.backend == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            # vLLM multiplies max_position_embeddings by the factor of linear scaling, and rejects lengths beyond the resulting window
            os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
            own |= {"max_model_len": self.max_length, "tensor_parallel_size": config.tensor_parallel_size, "seed": config.seed}
            return VLLM(**own, batch_size="auto", trust_remote_code=False)
        from lm_eval.models.huggingface import HFLM

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        own |= {"max_length": self.max_length, "device": device, "batch_size": config.batch_size, "attn_implementation": "sdpa"}
        with without_questions(), without_custom_generate():
            return HFLM(**own, trust_remote_code=False)

    def _needs_bos(self) -> bool:
        return self.config.bos == "one" and bos_token_of(Path(self.config.model)) is not None

    def _check_bos(self, lm: Any) -> None:
        """Check that the model's input has the required number of BOS tokens. The tokenizer's settings do not guarantee this number."""
        required = int(self._needs_bos())
        encodings = {"tok_encode": list(lm.tok_encode(_BOS_CHECK_TEXT))}
        if hasattr(lm, "tok_batch_encode"):
            encodings["tok_batch_encode"] = lm.tok_batch_encode([_BOS_CHECK_TEXT])[0][0].tolist()
        for name, ids in encodings.items():
            found = ids.count(lm.tokenizer.bos_token_id) if lm.tokenizer.bos_token_id is not None else 0
            if found != required or (required and ids[0] != lm.tokenizer.bos_token_id):
                raise DataError(
                    f"bos={self.config.bos}: a prompt needs {required} BOS tokens, and {found} were found ({name} returns {ids[:4]}). "
                    f"Set bos={'none' if required else 'one'}, or correct the tokenizer of {self.config.model}."
                )

    def run(self, task: Task, *, length: int | None, window: int, label: str, log_file: Path) -> list[Sample]:
        """Run one task.

        Args:
            task: a task of lm-eval.
            length: length of RULER's prompts, in tokens; None for other tasks.
            window: window of the model, in tokens. Without `length`, prompt and answer together are truncated to the window.
            label: text of the progress display.
            log_file: file to which the output of lm-eval is appended.
        Returns:
            The scored samples, sorted by index.
        Raises:
            Exception: any exception of lm-eval, e.g. if a dataset cannot be loaded or memory runs out.
        """
        from lm_eval.evaluator import evaluate

        suite, seed = self.config.suite, self.config.seed
        self.metadata["max_seq_lengths"] = [length] if length else []
        if self._is_real_model:
            self.lm._max_length = length + ANSWER_ROOM if length else window
        if self.config.backend == MEGATRON:
            self.lm.label = label  # MegatronLM has its own progress display
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with contextlib.ExitStack() as stack:
            with writing(log_file):
                log = stack.enter_context(log_file.open("a"))
            stack.enter_context(contextlib.redirect_stderr(log))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # ruler_vt prints thousands of lines
            for context in self._prepared(task):
                stack.enter_context(context)
            loaded = self._manager.load([task.id])
            for found in loaded["tasks"].values():
                if task.id in suite.num_fewshot:
                    found.set_config(key="num_fewshot", value=suite.num_fewshot[task.id])
                elif found.get_config("num_fewshot") is None:
                    found.set_config(key="num_fewshot", value=0)
                found.set_fewshot_seed(seed=seed)
            for request, per_line in _REQUESTS_PER_PROGRESS_LINE.items():
                if self.config.backend == "hf":
                    stack.enter_context(_in_portions(self.lm, request, per_line * self.config.batch_size, label))
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

    def _prepared(self, task: Task) -> Iterator[contextlib.AbstractContextManager]:
        """Yield the context managers of a run. They replace downloads by local sources, bound the generators and allow code execution."""
        paths = {name: path and str(Path(path).expanduser()) for name, path in sources_of(task, vars(self.config.suite.sources)).items()}
        if PUNKT in task.needs and paths[PUNKT]:
            import nltk

            yield replaced(nltk.data, "path", [paths[PUNKT], *nltk.data.path])
        local = {SOURCES[ESSAYS if ESSAYS in task.needs else name].hub: path for name, path in paths.items() if path and name != PUNKT}
        yield _local_datasets({hub: path for hub, path in local.items() if hub})
        if task.suite == RULER:
            module = self._ruler_module(generator_of(task.id)[0])
            from lm_eval.tasks.ruler import common_utils

            yield replaced(common_utils, "AutoTokenizer", OwnTokenizer)  # lm-eval loads it with trust_remote_code=True
            for name in ("squad", "hotpotqa"):
                path, url = paths.get(name), SOURCES[name].url
                if path and url:
                    yield _local_download(module, url, path)
            yield bounded(task.id, module, samples=self.config.suite.samples or RULER_SAMPLES)
        if task.runs_code:
            yield _environment("HF_ALLOW_CODE_EVAL", "1")

    def _ruler_module(self, name: str) -> ModuleType:
        """Return one of lm-eval's RULER modules, in its initial state. The module of common words has its own random generator, which is
        reset here, because loading the module again takes seconds."""
        from lm_eval.tasks._yaml_loader import _load_module_with_cache

        module = sys.modules.get(f"lm_eval.tasks.ruler.{name}")
        if module is not None and hasattr(module, _INITIAL_STATE):
            module.RNG.setstate(getattr(module, _INITIAL_STATE))
            return module
        sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)
        with _no_nltk_download() if is_offline() else contextlib.nullcontext():
            module = _load_module_with_cache(self._ruler / f"{name}.py")
        if hasattr(module, "RNG"):
            setattr(module, _INITIAL_STATE, module.RNG.getstate())
        if hasattr(module, "get_haystack"):
            module.get_haystack.cache_clear()
        return module

    def _samples(self, task: Task, length: int | None, answered: dict[str, list[dict[str, Any]]]) -> list[Sample]:
        metric = str(length) if task.suite == RULER else task.metric
        found: list[Sample] = []
        for subject in sorted(answered):  # MMLU has 57 subjects, other tasks have one
            for sample in sorted(answered[subject], key=lambda sample: sample["doc_id"]):
                if sample["filter"] != task.filter:
                    continue
                first = sample["resps"][0][0]
                written = isinstance(first, str)
                output = first if written else json.dumps([round(float(choice[0][0]), 4) for choice in sample["resps"]])
                tokens = len(self.lm.tok_encode(sample["arguments"][0][0])) if written and self._is_real_model else None
                found.append(Sample(len(found), 100 * float(sample[metric]), output, _references(task, sample), tokens))
        if not found:
            raise DataError(f"{task.id}: lm-eval returned no sample with the filter {task.filter!r}.")
        return found


class OwnTokenizer:
    """Replaces transformers' AutoTokenizer in lm-eval's RULER."""

    @staticmethod
    def from_pretrained(model_dir: str, **_: Any) -> Any:
        """Same as load_tokenizer."""
        return load_tokenizer(Path(model_dir))


def _references(task: Task, sample: dict[str, Any]) -> Any:
    return sample["doc"]["outputs"] if task.suite == RULER else sample["target"]


@contextlib.contextmanager
def _in_portions(lm: Any, name: str, size: int, label: str) -> Iterator[None]:
    """Pass requests to the model in portions inside the `with` block, and print a progress line after each portion."""
    original: Callable = getattr(lm, name)

    def answer(requests: list, **_: Any) -> list:
        answers = []
        with Progress(label, len(requests)) as progress:
            for first in range(0, len(requests), size):
                portion = requests[first : first + size]
                answers += original(portion, disable_tqdm=True)
                progress.advance(len(portion))
        return answers

    setattr(lm, name, answer)
    try:
        yield
    finally:
        delattr(lm, name)


@contextlib.contextmanager
def _local_datasets(local: dict[str, str]) -> Iterator[None]:
    """Make datasets.load_dataset read local folders instead of datasets of the hub inside the `with` block.

    Args:
        local: {name on the hub: folder}.
    """
    from lm_eval.api.task import datasets

    original = datasets.load_dataset

    def load(path: str, *args: Any, **options: Any) -> Any:
        return original(local.get(path, path), *args, **options)

    with replaced(datasets, "load_dataset", load):
        yield


@contextlib.contextmanager
def _local_download(module: ModuleType, url: str, path: str) -> Iterator[None]:
    """Make the module read a local JSON file instead of downloading `url` inside the `with` block."""
    original = module.download_json

    def read(requested: str) -> Any:
        return json.loads(Path(path).read_text(encoding="utf-8")) if requested == url else original(requested)

    with replaced(module, "download_json", read):
        yield


@contextlib.contextmanager
def _no_nltk_download() -> Iterator[None]:
    """Disable NLTK's downloads inside the `with` block. Importing lm-eval's modules downloads data even for tasks that do not need it."""
    import nltk

    with replaced(nltk, "download", lambda *args, **options: False):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the `with` block and restore it afterwards."""
    kept = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept
