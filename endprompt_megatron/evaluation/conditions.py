"""What scores depend on and where they were made: what a page tells, and what tells one evaluation from another."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE
from endprompt_megatron.checkpoint.hf.config import read_hf_config
from endprompt_megatron.evaluation.lm_eval_harness.harness import ANSWER_ROOM, bos_token_of, harness_version
from endprompt_megatron.evaluation.suite import MEGATRON, EvaluateConfig
from endprompt_megatron.evaluation.tasks import NEEDLE, PERPLEXITY, HarnessTask, fingerprint
from endprompt_megatron.mcore import runtime
from endprompt_megatron.mcore.version import megatron_core_version

LM_EVAL = "lm-eval"
_OF_AN_ENGINE = ("harness", "backend", "dtype")
# other values make other scores
_DECISIVE = ("model", "bos", "chat_template", "samples", "seed", "window")


@dataclass(frozen=True)
class Conditions:
    """Of one evaluation.

    Attributes:
        told: for the page and for results.json.
        engines: {LM_EVAL | MEGATRON: {"harness", "backend", "dtype"}} of those that answer a task of it.
        window: positions of the model's config.json.
        of_suites: {suite: what its tasks depend on besides}.
    """

    told: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    window: int
    of_suites: dict[str, dict[str, Any]]

    @staticmethod
    def engine_of(task: HarnessTask) -> str:
        """Who puts the task to the model."""
        return MEGATRON if task.built_in else LM_EVAL

    def decisive(self, task: HarnessTask, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a task's scores depend on, its sources apart; also of a task that this evaluation does not ask.

        Args:
            task: which.
            settings: of its suite, in place of this evaluation's.
        """
        engine = self.engines.get(self.engine_of(task), {})
        own = self.of_suites.get(task.suite, {}) if settings is None else settings
        return engine | {name: self.told[name] for name in _DECISIVE} | own

    def told_with(self, others: list[dict[str, Any]]) -> dict[str, Any]:
        """`told`, with the engines of earlier sittings beside those of this one, and what their suites depend on.

        Args:
            others: conditions of scores.
        """
        named = [*self.engines.values(), *others]
        own = {name: other[name] for other in others for values in self.of_suites.values() for name in values if name in other}
        return self.told | own | {name: "; ".join(dict.fromkeys(str(engine[name]) for engine in named)) for name in _OF_AN_ENGINE}


def conditions_of(config: EvaluateConfig, *, command: str) -> Conditions:
    """The conditions of an evaluation.

    Args:
        config: validated.
        command: that reproduces it.
    Raises:
        BackendUnavailableError: lm-eval is asked for and not installed, or not in the right version.
    """
    model = Path(config.model)
    window = int(read_hf_config(model)["max_position_embeddings"])
    token = bos_token_of(model) if config.bos == "one" else None
    engines = _engines(config)
    rooms = {
        LM_EVAL: f"RULER: {ANSWER_ROOM} tokens beyond the length; other tasks of lm-eval: prompt and answer are cut to the window",
        MEGATRON: "built-in tasks: within the length",
    }
    needle, perplexity = config.suite.needle, config.suite.perplexity
    of_suites = {
        NEEDLE: {"needle": asdict(needle)},
        PERPLEXITY: {
            "perplexity": {
                "text": [source.path for source in perplexity.text],
                "stride": perplexity.stride,
                "longest": max(config.suite.lengths_for(window), default=None),
            }
        },
    }
    told = {
        **{name: "; ".join(dict.fromkeys(engine[name] for engine in engines.values())) for name in _OF_AN_ENGINE},
        "model": fingerprint(model),
        "bos": f"one, {token}" if token else "none",
        "chat_template": config.suite.apply_chat_template,
        "samples": config.suite.samples,
        "seed": config.seed,
        "window": window,
        "native_window": provenance_of(model).get("original_context_length", window),
        "room_for_answers": "; ".join(rooms[engine] for engine in engines),
        "batch_size": config.batch_size if config.runs_lm_eval and config.backend == "hf" else None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "hardware": _hardware(),
        "command": command,
    }
    for suite in sorted(config.suite.suites() & of_suites.keys()):
        told |= of_suites[suite]
    return Conditions(told, engines, window, of_suites)


def _engines(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    engines = {}
    if config.runs_lm_eval:
        on_megatron = config.backend == MEGATRON
        engines[LM_EVAL] = {
            "harness": f"lm-eval {harness_version()}",
            "backend": {"hf": "hf, SDPA attention", MEGATRON: _megatron()}.get(config.backend, config.backend),
            "dtype": _megatron_dtype(config) if on_megatron else config.dtype,
        }
    if config.suite.has_built_in_tasks():
        engines[MEGATRON] = {
            "harness": f"megatron-core {megatron_core_version()}, built-in tasks",
            "backend": _megatron(),
            "dtype": _megatron_dtype(config),
        }
    return engines


def provenance_of(model: Path) -> dict[str, Any]:
    """endprompt.json of an export; empty for another model."""
    made = Path(model) / PROVENANCE_FILE
    return json.loads(made.read_text()) if made.is_file() else {}


def _megatron() -> str:
    return "Megatron-Core, SDPA attention"


def _megatron_dtype(config: EvaluateConfig) -> str:
    """What the model computes in: as asked, or what suits the machine."""
    if config.dtype != "auto":
        return config.dtype
    precision = runtime.resolve_precision("auto", runtime.resolve_accelerator(config.accelerator))
    return {"fp32": "float32", "bf16": "bfloat16"}[precision]


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
