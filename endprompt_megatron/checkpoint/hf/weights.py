"""Check that a Hugging Face directory has exactly the tensors of an architecture."""

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
    """All tensors of the Hugging Face model, in file order."""
    return [
        TensorPlan(name, dtype, shape)
        for binding in bindings(architecture)
        for name, shape in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True)
    ]


def count_weights(architecture: ModelArchitecture) -> int:
    """Number of weights in the Hugging Face model."""
    return sum(math.prod(shape) for binding in bindings(architecture) for shape in binding.layout.shapes(architecture))


def check_hf_weights(hf_path: Path, architecture: ModelArchitecture) -> None:
    """Compare names and shapes in the headers of all files with the architecture, without reading weights.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor is missing, unexpected or of another shape.
    """
    with SafetensorsReader(hf_path) as reader:
        check_tensors(reader, architecture)


def check_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> None:
    """Same as check_hf_weights, for an open reader."""
    every = list(bindings(architecture))
    _check_unexpected(reader, architecture)
    for binding in every:
        for name, expected in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True):
            found = tuple(reader.shape(name))
            if found != expected:
                raise CheckpointError(
                    f"{reader.hf_path}: {name} has shape {list(found)}, but config.json requires {list(expected)}: weights and config.json "
                    f"do not match. Copy both from the same model."
                )


def missing_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Tensors that the architecture has and the directory lacks."""
    return sorted({name for binding in bindings(architecture) for name in binding.hugging_face} - set(reader.names()))


def unexpected_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Tensors of the directory that are not part of the architecture.

    Does not return rotary frequencies, which config.json determines, or a tied output layer that equals the embedding.
    """
    used = {name for binding in bindings(architecture) for name in binding.hugging_face}
    found = [name for name in reader.names() if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if architecture.tied_embeddings and _HEAD in found and _is_the_embedding(reader):
        found.remove(_HEAD)
    return found


def _is_the_embedding(reader: SafetensorsReader) -> bool:
    """Whether the stored output layer equals the embedding byte by byte. If they differ, transformers uses the stored output layer."""
    if reader.shape(_HEAD) != reader.shape(_EMBEDDING) or reader.dtype(_HEAD) != reader.dtype(_EMBEDDING):
        return False
    blocks = row_blocks(reader.shape(_HEAD)[0], reader.row_bytes(_HEAD))
    return all(bytes(tensor_bytes(reader.rows(_HEAD, *b))) == bytes(tensor_bytes(reader.rows(_EMBEDDING, *b))) for b in blocks)


def _check_unexpected(reader: SafetensorsReader, architecture: ModelArchitecture) -> None:
    found = unexpected_tensors(reader, architecture)
    if found == [_HEAD]:
        raise CheckpointError(
            f"{reader.hf_path}: config.json ties the output layer to the embedding, but the stored {_HEAD} differs from it. Set "
            f"tie_word_embeddings to false in a copy of config.json to use the tensor, or remove the tensor."
        )
    if found:
        raise CheckpointError(
            f"{reader.hf_path}: {len(found)} tensors are not part of this model of {architecture.num_layers} layers, "
            f"e.g. {found[0]}. Weights and config.json do not match, or the architecture is another one. Copy both from the same model."
        )
