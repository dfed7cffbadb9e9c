"""Load a Hugging Face checkpoint into Megatron-Core for inference."""

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
    """Load this rank's model chunks in evaluation mode, with the RoPE scaling of the checkpoint's config.json.

    Megatron's process groups must be initialized first (mcore.runtime.initialize).

    Args:
        model_dir: Hugging Face directory with config.json and safetensors files.
        device: device of the weights.
        precision: precision of the model, fp32 | bf16.
        backend: implementation of the layers; None selects it automatically.
        parallel: parallelism of the model; None puts the whole model on every rank.
    Returns:
        Model chunks of this rank. There is one chunk unless the pipeline schedule is interleaved.
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
