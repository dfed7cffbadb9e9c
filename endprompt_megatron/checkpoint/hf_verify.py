"""Proof that an export is the trained model: every tensor read back bit for bit, the frequencies that transformers builds from
config.json, and logits of plain transformers against Megatron's at ordinary and at gapped positions.

Shapes: s tokens of a probe, v vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from endprompt_megatron.checkpoint.hf_config import architecture_from_hf
from endprompt_megatron.checkpoint.hf_import import SafetensorsReader, load_hf_weights, named_parameters_of_whole_model
from endprompt_megatron.checkpoint.hf_mapping import bindings
from endprompt_megatron.config import ParallelConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.model.architecture import ModelArchitecture
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.rope.scaling import RopeScaling

FREQUENCY_TOLERANCE = 1e-6
LOGIT_TOLERANCE = 1e-3
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Finding:
    """One line of the verification table.

    Attributes:
        check: what was compared.
        difference: the largest difference found.
        tolerance: what is allowed.
        where: where the largest difference stands.
    """

    check: str
    difference: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed (NaN is not)."""
        return self.difference <= self.tolerance


def verify_export(
    chunks: list[EndPromptGPTModel], export: Path, *, architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int
) -> list[Finding]:
    """Compare an export with the live model; every rank takes part. Logits are compared where one process holds the model.

    Args:
        chunks: this rank's live model, without Megatron's wrappers.
        export: the exported directory.
        architecture, rope, target_context_length: what was trained.
    Returns:
        Findings, all passed.
    Raises:
        CheckpointError: with the table, if a check fails.
    """
    findings = [_verify_tensors(chunks, export, architecture), *_verify_config(export, architecture, rope, target_context_length)]
    # a config of other sizes would end in transformers' own error before this table could name the fields
    if torch.distributed.get_world_size() == 1 and all(finding.passed for finding in findings):
        findings += verify_logits(export, architecture, rope, target_context_length=target_context_length)
    if not all(finding.passed for finding in findings):
        raise CheckpointError(f"{export} is not the trained model:\n{format_findings(findings)}")
    return findings


def format_findings(findings: list[Finding]) -> str:
    """An aligned table of findings."""
    rows = [("check", "largest difference", "allowed", "where", "")]
    rows += [(f.check, f"{f.difference:.3g}", f"{f.tolerance:g}", f.where, "ok" if f.passed else "FAILED") for f in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _verify_tensors(chunks: list[EndPromptGPTModel], export: Path, architecture: ModelArchitecture) -> Finding:
    """Read this rank's slices of the export back and compare them with the live parameters, bit for bit."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    live = dict(pair for chunk in chunks for pair in named_parameters_of_whole_model(chunk))
    worst, where, count = 0.0, "", 0
    with SafetensorsReader(export) as reader:
        expected = {name for binding in bindings(architecture) for name in binding.hugging_face}
        surplus = set(reader.names()) ^ expected
        if surplus:
            return Finding("tensors", float("inf"), 0.0, f"names differ, e.g. {sorted(surplus)[0]}")
        for binding in bindings(architecture):
            if binding.megatron not in live:
                continue
            count += 1
            stored = binding.layout.read(architecture, binding.hugging_face, reader.rows, reader.columns, rank, size)
            parameter = live[binding.megatron].detach().cpu()
            if stored.dtype != parameter.dtype or not torch.equal(stored, parameter):
                difference = float((stored.double() - parameter.double()).abs().max()) if stored.shape == parameter.shape else np.inf
                if not difference < worst:  # a NaN counts as the worst
                    worst, where = (difference or float(np.finfo(np.float64).tiny)), binding.megatron
    return Finding(f"tensors ({count} parameters, bit for bit)", worst, 0.0, where)


def _verify_config(export: Path, architecture: ModelArchitecture, rope: RopeScaling, target_context_length: int) -> list[Finding]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(export)
    stored = json.loads((export / "config.json").read_text())
    window = abs(config.max_position_embeddings - target_context_length)
    expected = replace(architecture, max_position_embeddings=target_context_length)
    exported = architecture_from_hf(stored)
    differing = [name for name, value in vars(expected).items() if getattr(exported, name) != value]
    frequencies, factor = _transformers_rope(config)
    difference = np.abs(frequencies - rope.inv_freq()) / rope.inv_freq()
    worst = int(np.argmax(difference))
    return [
        Finding("window (max_position_embeddings)", float(window), 0.0, str(stored["max_position_embeddings"])),
        Finding("fields of config.json that differ", float(len(differing)), 0.0, ", ".join(differing)),
        Finding("rotary frequencies (relative)", float(difference[worst]), FREQUENCY_TOLERANCE, f"frequency {worst}"),
        Finding("attention factor", abs(factor - rope.attention_factor), FREQUENCY_TOLERANCE, f"{factor:g}"),
    ]


def _transformers_rope(config) -> tuple[np.ndarray, float]:
    """Frequencies [d / 2] and attention factor as transformers builds them from a config."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config=config)
    return rotary.inv_freq.float().numpy(), float(rotary.attention_scaling)


def verify_logits(
    export: Path, architecture: ModelArchitecture, rope: RopeScaling, *, target_context_length: int
) -> list[Finding]:
    """Logits of transformers, which believes the export's config.json, and of Megatron, which believes what was trained; both with the
    export's weights in float32 in this process.

    Args:
        export: model directory.
        architecture, rope: what was trained.
        target_context_length: L; positions reach L - 1.
    """
    chunk = build_model_chunks(
        architecture,
        rope=rope,
        max_sequence_length=target_context_length,
        parallel=ParallelConfig(),
        precision="fp32",
        backend=BACKENDS["torch"],
        device=torch.device("cpu"),
    )[0].eval()
    load_hf_weights([chunk], export, architecture)
    reference = load_transformers_model(export)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, architecture.vocab_size, _PROBE_TOKENS))[None]
    findings = []
    for label, positions in probe_positions(_PROBE_TOKENS, target_context_length).items():
        ours = megatron_logits(chunk, tokens, positions)[..., : architecture.vocab_size]
        theirs = transformers_logits(reference, tokens, positions)
        difference = (ours - theirs).abs().amax(dim=(0, 2))
        worst = int(difference.argmax())
        findings.append(
            Finding(f"logits at {label} positions", float(difference[worst]), LOGIT_TOLERANCE, f"position {int(positions[worst])}")
        )
    return findings


def probe_positions(num_tokens: int, target_context_length: int) -> dict[str, torch.Tensor]:
    """Position rows [s] that together touch the whole window: ordinary, EndPrompt's gap, spread, and the last ones."""
    half = num_tokens // 2
    gapped = torch.cat([torch.arange(num_tokens - half), torch.arange(target_context_length - half, target_context_length)])
    spread = torch.linspace(0, target_context_length - 1, num_tokens).long()
    return {
        "ordinary": torch.arange(num_tokens),
        "gapped": gapped,
        "spread": spread,
        "last": torch.arange(target_context_length - num_tokens, target_context_length),
    }


def load_transformers_model(hf_path: Path, dtype: torch.dtype = torch.float32):
    """The directory in plain transformers, in evaluation mode on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf_path, dtype=dtype, attn_implementation="sdpa").eval()


@torch.no_grad()
def transformers_logits(model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of transformers at explicit positions.

    A 4-D causal mask goes along: without one, transformers takes a jump in position_ids for the boundary of a packed sequence, and
    the end prompt would not see the context.

    Args:
        tokens: [b, s]; positions: [s].
    """
    length = tokens.shape[1]
    blocked = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
    mask = blocked[None, None].expand(tokens.shape[0], 1, length, length)
    return model(input_ids=tokens, position_ids=positions[None].expand_as(tokens), attention_mask=mask, use_cache=False).logits.float()


@torch.no_grad()
def megatron_logits(chunk: EndPromptGPTModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of a Megatron model that is whole on this rank.

    Args:
        tokens: [b, s]; positions: [s] or [b, s].
    """
    return chunk(tokens, positions, None).float()
