"""Determine the conditions of an evaluation: everything that the scores depend on, and the hardware and software of the measurement. Stored
scores are reused only if the conditions that they depend on are equal."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE
from endprompt_megatron.checkpoint.hf.config import read_hf_config, window_from_hf
from endprompt_megatron.checkpoint.hf.json_files import read_json_object, shown
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.evaluation.lm_eval_harness.harness import ANSWER_ROOM, bos_token_of, harness_version
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.evaluation.task_sources import fingerprint
from endprompt_megatron.evaluation.tasks import LM_EVAL, MEGATRON, NEEDLE, PERPLEXITY, Task
from endprompt_megatron.mcore import runtime
from endprompt_megatron.mcore.version import megatron_core_version

_LENGTHS = ("original_context_length", "target_context_length", "seq_length")  # of endprompt.json, in tokens
_RUNNER_CONDITIONS = ("harness", "backend", "dtype")
# conditions that the scores of every task depend on
_COMMON_CONDITIONS = ("model", "bos", "chat_template", "samples", "seed", "window")


@dataclass(frozen=True)
class Conditions:
    """Conditions of one evaluation.

    Attributes:
        recorded: conditions that the page and results.json contain.
        runners: {LM_EVAL | MEGATRON: {"harness", "backend", "dtype"}} for each runner that this evaluation uses.
        window: max_position_embeddings of the model's config.json, in tokens.
        suite_settings: {suite: settings that affect only the scores of this suite's tasks}.
    """

    recorded: dict[str, Any]
    runners: dict[str, dict[str, Any]]
    window: int
    suite_settings: dict[str, dict[str, Any]]

    def of_task(self, task: Task, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the conditions that the scores of a task depend on, except the task's text sources.

        Args:
            task: any task, not only one of this evaluation.
            settings: settings of the task's suite; None uses those of this evaluation.
        """
        runner = self.runners.get(task.runner, {})
        own = self.suite_settings.get(task.suite, {}) if settings is None else settings
        return runner | {name: self.recorded[name] for name in _COMMON_CONDITIONS} | own

    def recorded_with(self, others: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `recorded`, extended by the runners and suite settings of scores from earlier starts of the evaluation.

        Args:
            others: conditions of the scores from earlier starts.
        """
        runners = [*self.runners.values(), *others]
        own = {name: other[name] for other in others for values in self.suite_settings.values() for name in values if name in other}
        joined = {name: "; ".join(dict.fromkeys(str(runner[name]) for runner in runners)) for name in _RUNNER_CONDITIONS}
        return self.recorded | own | joined


def conditions_of(config: EvaluateConfig, *, command: str) -> Conditions:
    """Return the conditions of an evaluation.

    Args:
        config: validated configuration of the evaluation.
        command: command line that reproduces the evaluation.
    Raises:
        BackendUnavailableError: lm-eval is needed but not installed, or its version is not supported.
        CheckpointError: config.json of the model is damaged or has no window.
    """
    model = Path(config.model)
    window = window_from_hf(read_hf_config(model))
    token = bos_token_of(model) if config.bos == "one" else None
    runners = _runners(config)
    answer_room = {
        LM_EVAL: f"RULER: {ANSWER_ROOM} tokens beyond the length; other tasks of lm-eval: prompt and answer are cut to the window",
        MEGATRON: "built-in tasks: within the length",
    }
    needle, perplexity = config.suite.needle, config.suite.perplexity
    suite_settings = {
        NEEDLE: {"needle": asdict(needle)},
        PERPLEXITY: {
            "perplexity": {
                "text": [source.path for source in perplexity.text],
                "stride": perplexity.stride,
                "longest": max(config.suite.lengths_for(window), default=None),
            }
        },
    }
    recorded = {
        **{name: "; ".join(dict.fromkeys(runner[name] for runner in runners.values())) for name in _RUNNER_CONDITIONS},
        "model": fingerprint(model),
        "bos": f"one, {token}" if token else "none",
        "chat_template": config.suite.apply_chat_template,
        "samples": config.suite.samples,
        "seed": config.seed,
        "window": window,
        "native_window": provenance_of(model).get("original_context_length", window),
        "room_for_answers": "; ".join(answer_room[runner] for runner in runners),
        "batch_size": config.batch_size if config.runs_lm_eval and config.backend == "hf" else None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "hardware": _hardware(),
        "command": command,
    }
    for suite in sorted(config.suite.suites() & suite_settings.keys()):
        recorded |= suite_settings[suite]
    return Conditions(recorded, runners, window, suite_settings)


def _runners(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Return {LM_EVAL | MEGATRON: conditions of the runner}. The texts are compared with those of stored scores, so a change of wording
    invalidates stored scores."""
    runners = {}
    if config.runs_lm_eval:
        on_megatron = config.backend == MEGATRON
        runners[LM_EVAL] = {
            "harness": f"lm-eval {harness_version()}",
            "backend": {"hf": "hf, SDPA attention", MEGATRON: _megatron_backend()}.get(config.backend, config.backend),
            "dtype": _megatron_dtype(config) if on_megatron else config.dtype,
        }
    if config.suite.has_megatron_tasks():
        runners[MEGATRON] = {
            "harness": f"megatron-core {megatron_core_version()}, built-in tasks",
            "backend": _megatron_backend(),
            "dtype": _megatron_dtype(config),
        }
    return runners


def provenance_of(model: Path) -> dict[str, Any]:
    """Return the content of a model's endprompt.json; empty if this package did not export the model.

    Raises:
        CheckpointError: the file cannot be read (see read_json_object), or a length in it is not a whole number of tokens, at least 1.
    """
    path = Path(model) / PROVENANCE_FILE
    values = read_json_object(path) if path.exists() else {}
    lengths = [(name, values[name]) for name in _LENGTHS if values.get(name) is not None]
    prompts = values.get("end_prompt_lengths") or []
    lengths += [("end_prompt_lengths", length) for length in (prompts if isinstance(prompts, list) else [prompts])]
    for name, length in lengths:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < 2**31:
            raise CheckpointError(
                f"{path} has {name}={shown(length)}: must be a whole number from 1 to 2,147,483,647. Copy it again from the model, or "
                f"remove the file."
            )
    return values


def _megatron_backend() -> str:
    return "Megatron-Core, SDPA attention"


def _megatron_dtype(config: EvaluateConfig) -> str:
    """Return the data type in which Megatron-Core computes: the configured type, or the default of this machine for auto."""
    if config.dtype != "auto":
        return config.dtype
    precision = runtime.resolve_precision("auto", runtime.resolve_accelerator(config.accelerator))
    return {"fp32": "float32", "bf16": "bfloat16"}[precision]


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
