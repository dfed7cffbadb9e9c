"""Which tensors a Hugging Face directory has to hold, and whether it does."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.mapping import bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader, TensorPlan, row_blocks, tensor_bytes
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.planning.architecture import ModelArchitecture

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
    _refuse_leftovers(reader, architecture)
    for binding in every:
        for name, expected in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True):
            found = tuple(reader.shape(name))
            if found != expected:
                raise CheckpointError(
                    f"{reader.hf_path}: {name} has shape {list(found)}, config.json makes it {list(expected)}: weights and config.json do "
                    f"not belong together."
                )


def missing(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Tensors that the architecture has and the directory lacks."""
    return sorted({name for binding in bindings(architecture) for name in binding.hugging_face} - set(reader.names()))


def leftovers(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Tensors without a place in the architecture. Frequencies are none: config.json says them. Nor is an output layer that repeats the
    embedding it is tied to."""
    used = {name for binding in bindings(architecture) for name in binding.hugging_face}
    found = [name for name in reader.names() if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if architecture.tied_embeddings and _HEAD in found and _is_the_embedding(reader):
        found.remove(_HEAD)
    return found


def _is_the_embedding(reader: SafetensorsReader) -> bool:
    """Whether the stored output layer is the embedding, byte by byte: transformers takes it as it stands if it is not."""
    if reader.shape(_HEAD) != reader.shape(_EMBEDDING) or reader.dtype(_HEAD) != reader.dtype(_EMBEDDING):
        return False
    blocks = row_blocks(reader.shape(_HEAD)[0], reader.row_bytes(_HEAD))
    return all(bytes(tensor_bytes(reader.rows(_HEAD, *b))) == bytes(tensor_bytes(reader.rows(_EMBEDDING, *b))) for b in blocks)


def _refuse_leftovers(reader: SafetensorsReader, architecture: ModelArchitecture) -> None:
    found = leftovers(reader, architecture)
    if found == [_HEAD]:
        raise CheckpointError(
            f"{reader.hf_path}: config.json ties the output layer to the embedding, and the {_HEAD} stored beside it is another: which "
            f"one is meant? Set tie_word_embeddings to false in a copy of config.json, or remove the tensor."
        )
    if found:
        raise CheckpointError(
            f"{reader.hf_path}: {len(found)} tensors have no place in this model of {architecture.num_layers} layers, "
            f"e.g. {found[0]}. Weights and config.json do not belong together, or the architecture is another."
        )
