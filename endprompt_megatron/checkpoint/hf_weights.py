"""Which tensors a Hugging Face directory has to hold, and whether it does."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf_mapping import Binding, bindings
from endprompt_megatron.checkpoint.safetensors_io import SafetensorsReader, TensorPlan
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.model.architecture import ModelArchitecture


def planned_tensors(architecture: ModelArchitecture, dtype: torch.dtype) -> list[TensorPlan]:
    """Every tensor of the Hugging Face model, in the order of its files."""
    return [
        TensorPlan(name, dtype, shape)
        for binding in bindings(architecture)
        for name, shape in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True)
    ]


def count_weights(architecture: ModelArchitecture) -> int:
    """Numbers in the Hugging Face model."""
    return sum(math.prod(shape) for binding in bindings(architecture) for shape in binding.layout.shapes(architecture))


def check_hf_weights(hf_path: Path, architecture: ModelArchitecture) -> None:
    """Read every file's header and compare names and shapes with the architecture, without reading a weight.

    Raises:
        CheckpointError: a file is missing or cut short, or a tensor is missing, left over or of another shape.
    """
    with SafetensorsReader(hf_path) as reader:
        check_tensors(reader, architecture)


def check_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> None:
    """As check_hf_weights, of an open directory."""
    every = list(bindings(architecture))
    _refuse_leftovers(reader, every, architecture)
    for binding in every:
        for name, expected in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True):
            found = tuple(reader.shape(name))
            if found != expected:
                raise CheckpointError(
                    f"{reader.hf_path}: {name} has shape {list(found)}, config.json makes it {list(expected)}: weights and config.json do "
                    f"not belong together."
                )


def _refuse_leftovers(reader: SafetensorsReader, every: list[Binding], architecture: ModelArchitecture) -> None:
    used = {name for binding in every for name in binding.hugging_face}
    ignorable = {"lm_head.weight"} if architecture.tied_embeddings else set()
    leftovers = [
        name for name in reader.names() if name not in used | ignorable and not name.endswith("rotary_emb.inv_freq")
    ]
    if leftovers:
        raise CheckpointError(
            f"{reader.hf_path}: {len(leftovers)} tensors have no place in this model of {architecture.num_layers} layers, "
            f"e.g. {leftovers[0]}. Weights and config.json do not belong together, or the architecture is another."
        )
