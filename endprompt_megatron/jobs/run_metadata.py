"""Metadata of a run: the provenance in its export and checkpoints, the conditions on its page, and the content of summary.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.model_card import source_version
from endprompt_megatron.config.resolved import ResolvedRun
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.sittings import Sittings
from endprompt_megatron.jobs.stage_times import StageTimes
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.mcore import version
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.model import backends
from endprompt_megatron.model.fusions import Fusions
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.training.signals import StopRequests
from endprompt_megatron.training.trainer import TrainingResult


@dataclass(frozen=True)
class Run:
    """State that all stages of one run share."""

    resolved: ResolvedRun
    base: preflight.Base
    output_dir: Path
    runtime: mcore_runtime.Runtime
    backend: backends.Backend
    fusions: Fusions
    stop: StopRequests
    times: StageTimes
    sittings: Sittings
    failures: FailureBoard

    @property
    def config(self) -> RunConfig:
        """Configuration of the run, with derived values filled in."""
        return self.resolved.config

    @property
    def rope(self) -> RopeScaling:
        """RoPE scaling that the run trains with."""
        return self.resolved.rope


def provenance_of_run(run: Run, data_hashes: dict[str, str]) -> dict[str, Any]:
    """Return the provenance of the extended model, which endprompt.json and the checkpoints record.

    Args:
        run: the run.
        data_hashes: hashes of the training and validation text.
    """
    config, prompts = run.config, run.base.end_prompts
    return {
        "method": config.method.name,
        "position_scheme": config.method.position_scheme,
        "end_prompts": list(prompts.texts) if prompts else [],
        "end_prompt_lengths": prompts.lengths if prompts else [],
        "end_prompt_loss_weight": config.method.end_prompt_loss_weight,
        "num_chunks": config.method.num_chunks,
        **_adapter_provenance(config),
        "base": config.model.name,
        # the window that rope.factor multiplies: the base's window, or with rope.existing_scaling=replace the window before the base's
        # own scaling
        "original_context_length": round(config.rope.target_context_length / run.resolved.factor),
        "target_context_length": config.rope.target_context_length,
        "rope_type": run.rope.type,
        "rope_factor": run.rope.factor,
        "seq_length": config.data.seq_length,
        "global_batch_size": config.trainer.global_batch_size,
        "learning_rate": config.optim.lr,
        "precision": config.precision.name,
        "seed": config.seed,
        "tokenizer_sha256": run.base.tokenizer_hash,
        "data_sha256": data_hashes,
        "commit": source_version(),
        "megatron_core": f"{version.megatron_core_version()}, torch {torch.__version__}",
    }


def _adapter_provenance(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config.method.attention == "s2":
        found["attention"] = f"S2 in training, {config.method.attention_groups} groups"
    if config.adapter.type == "lora":
        adapter = config.adapter
        in_full = [name for name, trains in (("embedding", adapter.train_embeddings), ("norms", adapter.train_norms)) if trains]
        found["adapter"] = f"LoRA r {adapter.rank}, alpha {adapter.alpha:g}: {', '.join(adapter.target_modules)}" + (
            f"; in full: {', '.join(in_full)}" if in_full else ""
        )
    return found


def conditions_of_run(run: Run) -> dict[str, Any]:
    """Return the conditions of the run. The report lists them next to the conditions of the probes."""
    return {
        "megatron_core": version.megatron_core_version(),
        "torch": torch.__version__,
        "device": mcore_runtime.device_name(run.runtime.device),
        "precision": _precision_in_words(run),
        "learning_rate": run.config.optim.lr,
        "global_batch_size": run.config.trainer.global_batch_size,
        "training_text": ", ".join(f"{source.path} ({source.weight:g})" for source in run.config.data.train),
        "end_prompt_tokens": max(run.base.end_prompts.lengths) if run.base.end_prompts else 0,
    }


def _precision_in_words(run: Run) -> str:
    name = run.config.precision.name
    if run.runtime.device.type != "cpu":
        return name
    return f"{name} (this CPU multiplies bf16 matrices {mcore_runtime.cpu_bf16_speedup():.2g} times as fast as float32 ones)"


def headline_task(system: dict[str, Any]) -> str:
    """Return the retrieval task that summary.json reports as `needle_*`: the pass key if it was probed, else planted numbers, else planted
    words."""
    return next((task for task in ("needle", "number", "word") if task in system), "needle")


def summary_of_run(run: Run, result: TrainingResult, systems: dict[str, Any], export: Path) -> dict[str, Any]:
    """Return the content of summary.json, a flat object for other programs.

    Args:
        run: the run.
        result: result of the training.
        systems: {name of the probed model: results}.
        export: directory of the Hugging Face model.
    """

    def needle(system: str) -> dict[str, float]:
        probed = systems.get(system, {})
        return {length: row["exact_match"] for length, row in probed.get(headline_task(probed), {}).items()}

    def perplexity(system: str) -> dict[str, float]:
        return systems.get(system, {}).get("perplexity", {})

    config, stage_seconds = run.config, run.sittings.stage_seconds()
    return {
        "experiment": config.name,
        "method": config.method.name,
        "seed": config.seed,
        "steps": result.state.step,
        "tokens": result.state.tokens,
        "physical_length": config.data.seq_length,
        "target_length": config.rope.target_context_length,
        "rope_factor": config.rope.factor,
        "loss_first": result.state.loss_first,
        "loss_last": result.state.loss_last,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_gib": result.peak_memory_gib,
        "wall_seconds": run.sittings.wall_seconds(),
        "sittings": run.sittings.count,
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in stage_seconds.items()},
        "backend": run.backend.name,
        "world_size": run.runtime.world_size,
        "hf_checkpoint": str(export),
        "needle_before": needle("base"),
        "needle_untrained": needle("untrained"),
        "needle_after": needle("trained"),
        "perplexity_before": perplexity("base"),
        "perplexity_untrained": perplexity("untrained"),
        "perplexity_after": perplexity("trained"),
    }
