"""Compare RoPE scalings for a model and a target window. The job applies each scaling to the untrained base and runs the same probes inside
the native window and beyond it. The page recommends a scaling and states whether the scaling needs training."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.sources import ensure_base_model
from endprompt_megatron.config.resolved import ResolvedRun
from endprompt_megatron.config.schema import ProbesConfig, RunConfig
from endprompt_megatron.data.corpora import check_corpora
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.probes.results import probe_system
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.run_probes import check_probe_memory, make_probes
from endprompt_megatron.launch import launcher
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.model import backends
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.output_files import claimed, replace_text
from endprompt_megatron.report.rope_advice import write_rope_page
from endprompt_megatron.rope.scaling import RopeScaling

PAGE, FIGURES = "ropes.md", "ropes.json"
_KINDS = ("pi", "ntk", "yarn")
_TAIL = 1024


def compare_ropes(config: RunConfig, *, command: str) -> list[str]:
    """Probe the untrained base with each scaling and write the page.

    Args:
        config: configuration of the run. Its rope.type, method and training settings are validated but not used.
        command: command line of the comparison, for the page.
    Returns:
        The lines of the table and the recommendation.
    Raises:
        OutputError: the page or the probes' results cannot be written.
        ConfigError, DataError, CheckpointError: the configuration, the base or the text is invalid.
    """
    world_size = launcher.planned_world_size(config)
    run = preflight.resolve(config, world_size=world_size)
    if config.parallel.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size={config.parallel.context_parallel_size}: probes need whole contexts on a rank. Set it to 1."
        )
    ensure_base_model(config.model.source, Path(config.model.hf_path))
    base = preflight.check_base(run)
    native = base.rope.unscaled_window(base.architecture.max_position_embeddings)
    run = replace(run, config=replace(run.config, probes=_probes_beyond_the_window(run.config, native)))
    config = run.config
    check_probe_memory(run)
    check_corpora(config.probes.text, directory=Path(config.data.directory))
    if run.accelerator == "cpu" and config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    output_dir = Path(config.output_dir).with_name(Path(config.output_dir).name + "_ropes")
    with claimed(output_dir, doing="compares RoPE scalings there"):
        return _compare(run, base, native, output_dir, command)


def _compare(run: ResolvedRun, base: preflight.Base, native: int, output_dir: Path, command: str) -> list[str]:
    config = run.config
    backend = backends.resolve(config.backend, accelerator=run.accelerator, precision=config.precision.name)
    runtime = mcore_runtime.initialize(config.parallel, accelerator=run.accelerator, seed=config.seed)
    try:
        probes = make_probes(config, base)
        chunks = build_model_chunks(
            base.architecture,
            rope=base.rope,
            max_sequence_length=config.rope.target_context_length,
            parallel=config.parallel,
            precision=config.precision.name,
            backend=backend,
            device=runtime.device,
        )
        load_hf_weights(chunks, base.hf_path, base.architecture)
        systems: dict[str, Any] = {}
        for name, (label, rope) in candidates(config, base.rope, native).items():
            for chunk in chunks:
                chunk.set_rope(rope)
            started = time.monotonic()
            found = probe_system(
                "base" if name == "base" else name, label, chunks, probes, device=runtime.device,
                cache=output_dir / "probes" / f"{name}.json", kept_beside=base.hf_path,
            )  # fmt: skip
            systems[name] = {**found, "seconds": time.monotonic() - started}
        described = {
            "experiment": config.name,
            "native": native,
            "target": config.rope.target_context_length,
            "command": command,
            "conditions": {**probes.conditions(), "precision": config.precision.name, "device": mcore_runtime.device_name(runtime.device)},
            "systems": systems,
        }
        if global_rank() > 0:
            return []
        replace_text(output_dir / FIGURES, json.dumps(described, indent=2) + "\n")
        lines = write_rope_page(output_dir / PAGE, described)
        get_logger().info(f"page {output_dir / PAGE}")
        return lines
    finally:
        mcore_runtime.shut_down()


def candidates(config: RunConfig, base: RopeScaling, native: int) -> dict[str, tuple[str, RopeScaling]]:
    """Return {name: (label, RoPE scaling)} of the unmodified base and of every scaling for the target window.

    Args:
        config: configuration of the run. abf uses its rope.theta. If rope.theta is null, abf uses the theta that the static NTK rule gives
            for twice the factor. The doubling is our choice, because the theta of ABF is usually larger than necessary.
        base: RoPE scaling of the base.
        native: window before any scaling, in positions.
    """
    factor = config.rope.target_context_length / native
    found = {"base": ("base model, untouched", base)}
    for kind in _KINDS:
        rope = replace(config.rope, type=kind, factor=factor, theta=None, ntk_dynamic_factor=None, existing_scaling=None)
        found[kind] = (f"{kind.upper()} x{factor:g}, untrained", base.extended(asdict(rope), max_position_embeddings=native))
    theta = config.rope.theta or RopeScaling("ntk", base.rope_theta, base.head_dim, factor=2 * factor).effective_theta
    raised = RopeScaling("abf", base.rope_theta, base.head_dim, factor=factor, theta=theta)
    return {**found, "abf": (f"ABF, theta {theta:.3g}, untrained", raised)}


def _probes_beyond_the_window(config: RunConfig, native: int) -> ProbesConfig:
    """Return the run's probes with three changes: the tasks become word and number if word is not among them, the lengths are replaced if
    all of them are within the native window, and a missing perplexity tail is added."""
    probes, target = config.probes, config.rope.target_context_length
    if "word" not in probes.tasks:
        probes = replace(probes, tasks=["word", "number"])
    if max(probes.lengths) <= native:
        lengths = (native // 4, native // 2, native, (native + target) // 2, target)
        probes = replace(probes, lengths=[length for length in lengths if length >= 128])
    if not probes.perplexity_tail:
        probes = replace(probes, perplexity_tail=min(_TAIL, min(probes.lengths) // 2))
    return probes
