"""Verify that a Hugging Face directory contains the same model as a Megatron model in memory or on disk. The verification compares all
tensors bit for bit, the rotary frequencies that transformers builds from config.json, logits of transformers and Megatron at contiguous and
gapped positions, and greedily generated text.

Shapes: b batch size, s number of tokens of a probe, v vocabulary size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from megatron.core import parallel_state

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights, merged_weights_of_whole_model
from endprompt_megatron.checkpoint.hf.mapping import bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader, row_blocks, tensor_bytes
from endprompt_megatron.checkpoint.hf.transformers_model import load_transformers_model, transformers_config, transformers_logits
from endprompt_megatron.checkpoint.hf.weights import count_weights, missing_tensors, unexpected_tensors
from endprompt_megatron.checkpoint.lora_reader import open_torch_dist
from endprompt_megatron.checkpoint.megatron_model import MegatronModel
from endprompt_megatron.checkpoint.training import load_torch_dist
from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import track
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.lora import adapted_layers
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

FREQUENCY_TOLERANCE = 1e-6
LOGIT_TOLERANCE = 1e-3
BF16_LOGIT_TOLERANCE = 0.1  # for a model in bfloat16, in standard deviations of the logits
_PROBE_TOKENS = 64
_PROMPT_TOKENS, _GENERATED_TOKENS = 16, 24


@dataclass(frozen=True)
class Finding:
    """One line of the verification table.

    Attributes:
        check: name of the comparison.
        difference: largest difference.
        tolerance: largest allowed difference.
        where: location of the largest difference.
        skipped: whether the check was skipped. If so, `where` is the reason.
    """

    check: str
    difference: float
    tolerance: float
    where: str
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (NaN is not), or the check was skipped."""
        return self.skipped or self.difference <= self.tolerance


def verify_export(
    chunks: list[EndPromptGPTModel], export: Path, *, architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int
) -> list[Finding]:
    """Compare an export with the model in memory. All ranks must call this function, and either all ranks return or all ranks raise an
    error. Logits are compared only if one process holds the whole model.

    Args:
        chunks: this rank's chunks of the model in memory, without Megatron's wrappers.
        export: exported directory.
        architecture, rope, target_context_length: description of the trained model.
    Returns:
        Findings, which have all passed.
    Raises:
        CheckpointError: a check failed on a rank. The message contains the table of findings.
    """
    failure: Exception | None = None
    findings: list[Finding] = []
    try:
        findings = _findings(chunks, export, architecture, rope, target_context_length)
        if not all(finding.passed for finding in findings):
            failure = CheckpointError(f"{export} is not the trained model:\n{format_findings(findings)}")
    except Exception as error:  # of any class, because the other ranks must not wait for this rank
        failure = error
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, found in enumerate(failures):
        if found is not None:
            raise CheckpointError(f"{export} failed its verification on rank {rank}: {found}")
    return findings


def _findings(
    chunks: list[EndPromptGPTModel], export: Path, architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int
) -> list[Finding]:
    findings = [_verify_tensors(chunks, export, architecture), *_verify_config(export, architecture, rope, target_context_length)]
    reason = _reason_to_skip_logits(findings, architecture)
    if torch.distributed.get_world_size() > 1:
        reason = "the model is split over processes; tools/convert.py verify compares a checkpoint"
    if reason:
        findings.append(_skipped_logits(reason))
    else:
        findings += verify_logits(export, architecture, rope, target_context_length=target_context_length, live=chunks[0])
    return findings


def format_findings(findings: list[Finding]) -> str:
    """Return findings as an aligned table."""
    rows = [("check", "largest difference", "allowed", "where", "")]
    for f in findings:
        verdict = "not checked" if f.skipped else "ok" if f.passed else "FAILED"
        rows.append((f.check, "" if f.skipped else f"{f.difference:.3g}", f"{f.tolerance:g}", f.where, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _verify_tensors(chunks: list[EndPromptGPTModel], export: Path, architecture: ModelArchitecture) -> Finding:
    """Read this rank's slices of the export, and compare them bit for bit with the parameters in memory. Adapters are merged first."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    live = {name: weight for chunk in chunks for name, weight in merged_weights_of_whole_model(chunk).items()}
    worst, where, count = 0.0, "", 0
    with SafetensorsReader(export) as reader:
        wrong = [*unexpected_tensors(reader, architecture), *missing_tensors(reader, architecture)]
        if wrong:
            return Finding("tensors", float("inf"), 0.0, f"names differ, e.g. {wrong[0]}")
        for binding in bindings(architecture):
            if binding.megatron not in live:
                continue
            count += 1
            stored = binding.layout.read(architecture, binding.hugging_face, reader.rows, reader.columns, rank, size)
            difference = largest_difference(stored, live[binding.megatron]().cpu())
            if difference > worst:
                worst, where = difference, binding.megatron
    return Finding(f"tensors ({count} parameters, bit for bit)", worst, 0.0, where)


def verify_megatron_model(
    export: Path, model: MegatronModel, *, dtype: torch.dtype | None = None, with_logits: bool = True
) -> list[Finding]:
    """Compare a Hugging Face directory with a torch_dist directory.

    Weights are compared in blocks, so the model can have any size. Logits and text need both models in memory in float32. If the models do
    not fit, a skipped finding is returned instead.

    Args:
        export: Hugging Face directory.
        model: description of the torch_dist directory, from megatron_model.describe_megatron_model.
        dtype: dtype in which weights are compared; None uses the dtype of the Hugging Face directory.
        with_logits: whether to compare logits and text.
    Returns:
        Findings, some of which may have failed.
    Raises:
        CheckpointError: one of the directories cannot be read.
    """
    findings = [_verify_stored_tensors(export, model, dtype), *_verify_config(export, model.architecture, model.rope, model.context_length)]
    reason = _reason_to_skip_logits(findings, model.architecture) if with_logits else "not requested"
    if reason:
        return [*findings, _skipped_logits(reason)]
    chunk = _build(model.architecture, model.rope, model.context_length, model.adapter)
    load_torch_dist([chunk], model.directory)
    return findings + compare_logits(chunk, export, model.architecture, target_context_length=model.context_length)


def _reason_to_skip_logits(findings: list[Finding], architecture: ModelArchitecture) -> str | None:
    if not all(finding.passed for finding in findings):  # transformers would raise an error for a config with other sizes
        return "the checks above must pass first"
    needed, free = 2 * 4 * count_weights(architecture) * 1.2 / 2**30, psutil.virtual_memory().available / 2**30
    return f"both models in float32 need {needed:.0f} GiB, {free:.0f} GiB are free" if needed > free else None


def _skipped_logits(reason: str) -> Finding:
    return Finding("logits and greedy text", 0.0, LOGIT_TOLERANCE, reason, skipped=True)


def largest_difference(stored: torch.Tensor, expected: torch.Tensor) -> float:
    """Return 0 if two tensors are equal bit for bit, else the largest difference, which is never 0. Return infinity if dtypes or shapes
    differ."""
    if stored.dtype != expected.dtype or stored.shape != expected.shape:
        return float("inf")
    if tensor_bytes(stored) == tensor_bytes(expected):
        return 0.0
    difference = float((stored.double() - expected.double()).abs().max())
    return float("inf") if math.isnan(difference) else difference or float(np.finfo(np.float64).tiny)


def _verify_stored_tensors(export: Path, model: MegatronModel, dtype: torch.dtype | None) -> Finding:
    worst, where, count = 0.0, "", 0
    architecture = model.architecture
    with (
        SafetensorsReader(export, reuse_memory=True) as hugging_face,
        open_torch_dist(model.directory, architecture, model.adapter, reuse_memory=True) as megatron,
    ):
        megatron.check(architecture)
        every = list(bindings(architecture))
        wrong = [*unexpected_tensors(hugging_face, architecture), *missing_tensors(hugging_face, architecture)]
        if wrong:
            return Finding("tensors", float("inf"), 0.0, f"names differ, e.g. {wrong[0]}")
        for binding in track(every, "comparing weights"):
            for source, (name, shape) in enumerate(zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True)):
                count += 1
                if tuple(hugging_face.shape(name)) != shape:
                    return Finding("tensors", float("inf"), 0.0, f"{name} has shape {hugging_face.shape(name)}, expected {list(shape)}")
                row = 0
                for first, last in binding.layout.rows_of_source(architecture, source):
                    for low, high in row_blocks(last, hugging_face.row_bytes(name), first):
                        stored = hugging_face.rows(name, row, row + high - low)
                        expected = megatron.rows(binding.megatron, low, high).to(dtype or stored.dtype)
                        difference = largest_difference(stored.to(dtype or stored.dtype), expected)
                        if difference > worst:
                            worst, where = difference, f"{name}, rows {row} to {row + high - low - 1}"
                        row += high - low
    return Finding(f"tensors ({count}, bit for bit)", worst, 0.0, where)


def _verify_config(export: Path, architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int) -> list[Finding]:
    stored = read_hf_config(export)
    exported = architecture_from_hf(stored)
    config = transformers_config(stored, origin=export)
    window = abs(config.max_position_embeddings - target_context_length)
    expected = replace(architecture, max_position_embeddings=target_context_length, rope_theta=rope.effective_theta)
    differing = [name for name, value in vars(expected).items() if getattr(exported, name) != value]
    frequencies, factor = _transformers_rope(config)
    expected_frequencies = rope.inv_freq()
    if frequencies.shape == expected_frequencies.shape:
        difference = np.abs(frequencies - expected_frequencies) / expected_frequencies
    else:
        difference = np.array([np.inf])
    worst = int(np.argmax(difference))
    return [
        Finding("window (max_position_embeddings)", float(window), 0.0, str(stored["max_position_embeddings"])),
        Finding("fields of config.json that differ", float(len(differing)), 0.0, ", ".join(differing)),
        Finding("rotary frequencies (relative)", float(difference[worst]), FREQUENCY_TOLERANCE, f"frequency {worst}"),
        Finding("attention factor", abs(factor - rope.attention_factor), FREQUENCY_TOLERANCE, f"{factor:g}"),
    ]


def _transformers_rope(config: Any) -> tuple[np.ndarray, float]:
    """Return the frequencies [d / 2] and the attention factor that transformers computes from a config."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config=config)
    return rotary.inv_freq.float().numpy(), float(rotary.attention_scaling)


def verify_logits(
    export: Path,
    architecture: ModelArchitecture,
    rope: RopeScaling,
    *,
    target_context_length: int,
    live: EndPromptGPTModel | None = None,
) -> list[Finding]:
    """Compare logits of transformers and Megatron. transformers builds the model from config.json of the export, and Megatron builds it
    from the description of the trained model. Both models use the weights of the export, in float32 in this process. If `live` has
    adapters, its logits are also compared with those of the merged model.

    Args:
        export: model directory.
        architecture, rope: description of the trained model.
        target_context_length: L; positions go up to L - 1.
        live: trained model in memory, if this process holds the whole model; else None.
    """
    chunk = _build(architecture, rope, target_context_length)
    load_hf_weights([chunk], export, architecture)
    findings = compare_logits(chunk, export, architecture, target_context_length=target_context_length)
    if live is not None and adapted_layers(live):
        findings.append(_compare_with_adapters(live, chunk, architecture, target_context_length))
    return findings


@torch.no_grad()
def _compare_with_adapters(
    live: EndPromptGPTModel, merged: EndPromptGPTModel, architecture: ModelArchitecture, target_context_length: int
) -> Finding:
    """Compare the logits of the model with adapters and of the merged model, by their RMS difference in standard deviations of the logits.
    The logits differ because bfloat16 rounds both the merged weights and every operation of the model with adapters."""
    was_training = live.training
    live.eval()
    tokens, device = _probe_tokens(architecture), next(live.parameters()).device
    worst, where = 0.0, ""
    for label, positions in probe_positions(_PROBE_TOKENS, target_context_length).items():
        ours = megatron_logits(live, tokens.to(device), positions.to(device)).cpu()[..., : architecture.vocab_size]
        expected = megatron_logits(merged, tokens, positions)[..., : architecture.vocab_size]
        difference = float((ours - expected).square().mean().sqrt() / expected.std())
        if not difference <= worst:
            worst, where = difference, f"{label} positions"
    live.train(was_training)
    tolerance = LOGIT_TOLERANCE if live.config.params_dtype == torch.float32 else BF16_LOGIT_TOLERANCE
    return Finding("logits with adapters and merged (RMS / deviation)", worst, tolerance, where)


def _probe_tokens(architecture: ModelArchitecture) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, architecture.vocab_size, _PROBE_TOKENS))[None]


def compare_logits(chunk: EndPromptGPTModel, export: Path, architecture: ModelArchitecture, *, target_context_length: int) -> list[Finding]:
    """Compare `export` in transformers with a whole Megatron model in this process, both in float32: logits at positions across the window,
    and greedily generated text.

    Args:
        target_context_length: L; positions go up to L - 1.
    """
    reference = load_transformers_model(export)
    tokens = _probe_tokens(architecture)
    findings = []
    for label, positions in probe_positions(_PROBE_TOKENS, target_context_length).items():
        ours = megatron_logits(chunk, tokens, positions)[..., : architecture.vocab_size]
        theirs = transformers_logits(reference, tokens, positions)
        difference = (ours - theirs).abs().amax(dim=(0, 2))
        worst = int(difference.argmax())
        findings.append(
            Finding(f"logits at {label} positions", float(difference[worst]), LOGIT_TOLERANCE, f"position {int(positions[worst])}")
        )
    return [*findings, _compare_greedy_text(chunk, reference, tokens[:, :_PROMPT_TOKENS], architecture.vocab_size)]


@torch.no_grad()
def _compare_greedy_text(chunk: EndPromptGPTModel, reference: Any, prompt: torch.Tensor, vocab_size: int) -> Finding:
    """Generate text greedily with the cache and the positions of transformers, and count the tokens that Megatron predicts differently."""
    from transformers import GenerationConfig

    # min_new_tokens suppresses the end of text, so that all tokens are generated
    settings = GenerationConfig(do_sample=False, max_new_tokens=_GENERATED_TOKENS, min_new_tokens=_GENERATED_TOKENS, pad_token_id=0)
    reference.generation_config = settings
    generated = reference.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    logits = megatron_logits(chunk, generated[:, :-1], torch.arange(generated.shape[1] - 1))[0, prompt.shape[1] - 1 :, :vocab_size]
    differs = logits.argmax(-1) != generated[0, prompt.shape[1] :]
    where = f"token {int(differs.nonzero()[0])}" if differs.any() else ""
    return Finding(f"greedy text ({_GENERATED_TOKENS} tokens that differ)", float(differs.sum()), 0.0, where)


def _build(
    architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int, adapter: AdapterConfig | None = None
) -> EndPromptGPTModel:
    return build_model_chunks(
        architecture,
        rope=rope,
        max_sequence_length=target_context_length,
        parallel=ParallelConfig(),
        precision="fp32",
        backend=BACKENDS["torch"],
        device=torch.device("cpu"),
        adapter=adapter,
    )[0].eval()


def probe_positions(num_tokens: int, target_context_length: int) -> dict[str, torch.Tensor]:
    """Return {label: positions [s]} that together cover the window: contiguous from 0, with EndPrompt's gap, evenly spread, and at the end
    of the window."""
    half = num_tokens // 2
    gapped = torch.cat([torch.arange(num_tokens - half), torch.arange(target_context_length - half, target_context_length)])
    spread = torch.linspace(0, target_context_length - 1, num_tokens).long()
    return {
        "ordinary": torch.arange(num_tokens),
        "gapped": gapped,
        "spread": spread,
        "last": torch.arange(target_context_length - num_tokens, target_context_length),
    }


@torch.no_grad()
def megatron_logits(chunk: EndPromptGPTModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits [b, s, v] of a Megatron model that is whole on this rank.

    Args:
        tokens: int64 [b, s].
        positions: int64 [s] or [b, s].
    """
    return chunk(tokens, positions, None).float()
