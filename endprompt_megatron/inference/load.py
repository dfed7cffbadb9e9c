"""Loads a Hugging Face checkpoint into Megatron-Core for inference."""

from __future__ import annotations

from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.backends import Backend, resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel


def load_model(
    model_dir: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    backend: Backend | None = None,
    parallel: ParallelConfig | None = None,
) -> list[EndPromptGPTModel]:
    """Loads this rank's model chunks in evaluation mode, with the RoPE scaling of the checkpoint's config.json.

    Megatron's process groups must exist (mcore.runtime.initialize).

    Args:
        model_dir: Hugging Face directory with config.json and safetensors.
        device: device of the weights.
        precision: fp32 | bf16.
        backend: layer implementation; None selects it automatically.
        parallel: parallelism of the model; None keeps it whole on every rank.
    Returns:
        The chunks of this rank: one, unless the pipeline schedule is interleaved.
    Raises:
        CheckpointError: the directory is incomplete or damaged, or its model family is not supported.
    """
    config = read_hf_config(model_dir)
    architecture = architecture_from_hf(config)
    check_hf_weights(model_dir, architecture)  # before a model of the sizes in config.json is built
    chunks = build_model_chunks(
        architecture,
        rope=rope_from_hf(config),
        max_sequence_length=architecture.max_position_embeddings,
        parallel=parallel or ParallelConfig(),
        precision=precision,
        backend=backend or resolve("auto"),
        device=device,
    )
    load_hf_weights(chunks, model_dir, architecture)
    return [chunk.eval() for chunk in chunks]
