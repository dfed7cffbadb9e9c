"""Check that a Hugging Face directory has exactly the tensors of an architecture, and that all weights are finite."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.json_files import shown
from endprompt_megatron.checkpoint.hf.mapping import bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsReader,
    TensorPlan,
    is_ignored,
    row_blocks,
    tensor_bytes,
)
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.planning.architecture import ModelArchitecture

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADAPTER_CONFIG = "adapter_config.json"


def planned_tensors(architecture: ModelArchitecture, dtype: torch.dtype) -> list[TensorPlan]:
    """Return all tensors of the Hugging Face model, in file order."""
    return [
        TensorPlan(name, dtype, shape)
        for binding in bindings(architecture)
        for name, shape in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True)
    ]


def count_weights(architecture: ModelArchitecture) -> int:
    """Return the number of weights in the Hugging Face model."""
    return sum(math.prod(shape) for binding in bindings(architecture) for shape in binding.layout.shapes(architecture))


def check_hf_weights(hf_path: Path, architecture: ModelArchitecture) -> None:
    """Compare names and shapes in the headers of all files with the architecture, without reading weights.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor is missing or unexpected, has another shape, or is not a floating-point
            tensor.
    """
    with SafetensorsReader(hf_path) as reader:
        check_tensors(reader, architecture)


def check_present_weights(hf_path: Path, architecture: ModelArchitecture) -> None:
    """Call check_hf_weights if the directory contains weights. Planning and data preparation need only config.json and the tokenizer.

    Raises:
        CheckpointError: see check_hf_weights.
    """
    if any((Path(hf_path) / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        check_hf_weights(hf_path, architecture)


def check_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> None:
    """Run the checks of check_hf_weights on an open reader."""
    names = reader.names()
    if architecture.num_layers > len(names):  # checked before anything is built for every layer
        raise CheckpointError(
            f"{reader.hf_path}: config.json has num_hidden_layers={architecture.num_layers:,}, but the weights are {len(names):,} tensors, "
            f"fewer than one for each layer: weights and config.json do not match. Copy both from the same model."
        )
    for name in names:
        if reader.dtype(name) not in _WEIGHT_DTYPES and not is_ignored(name):
            known = ", ".join(_name(dtype) for dtype in _WEIGHT_DTYPES)
            raise CheckpointError(
                f"{reader.file_of(name)}: {shown(name)[1:-1]} has dtype {_name(reader.dtype(name))}, but weights must be {known}. "
                f"Quantised models are not supported: use the original weights."
            )
    if (reader.hf_path / _ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{reader.hf_path} has {_ADAPTER_CONFIG}: transformers adds that adapter to the weights, and this package does not. Merge it "
            f"first with peft's merge_and_unload, or remove the file."
        )
    _check_unexpected(reader, architecture)
    for binding in bindings(architecture):
        for name, expected in zip(binding.hugging_face, binding.layout.shapes(architecture), strict=True):
            found = tuple(reader.shape(name))
            if found != expected:
                raise CheckpointError(
                    f"{reader.hf_path}: {name} has shape {list(found)}, but config.json requires {list(expected)}: weights and config.json "
                    f"do not match. Copy both from the same model."
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_finite(block: torch.Tensor) -> bool:
    """Return whether all values are finite. This is much faster than torch.isfinite, because the minimum and maximum of a tensor with NaN
    are NaN."""
    return block.numel() == 0 or bool(torch.isfinite(torch.stack(block.aminmax())).all())


def check_values(hf_path: Path, *, max_bytes: int) -> bool:
    """Read all weights in blocks, and check that they are finite. Weights that are too large to be read twice are not checked.

    Args:
        hf_path: model directory that passed check_hf_weights.
        max_bytes: maximum total size of the files in bytes.
    Returns:
        Whether the weights were read.
    Raises:
        CheckpointError: a tensor contains NaN or infinity, or SafetensorsReader raises an error.
    """
    with SafetensorsReader(hf_path, reuse_memory=True) as reader:
        if sum(path.stat().st_size for path in reader.files()) > max_bytes:
            return False
        for name in reader.names():
            for first, last in row_blocks(reader.shape(name)[0], reader.row_bytes(name)) if not is_ignored(name) else ():
                block = reader.rows(name, first, last)
                if not is_finite(block):
                    raise not_finite(int((~torch.isfinite(block)).sum()), f"{name} in {reader.file_of(name)}, from row {first:,}")
    return True


def not_finite(count: int, where: str) -> CheckpointError:
    """Return the error for weights that are NaN or infinite.

    Args:
        count: number of values that are NaN or infinite.
        where: text that states the tensor and the file.
    """
    return CheckpointError(
        f"the model's weights hold {count} values that are NaN or infinite: {where}. Training would fail later. Download the file again, "
        f"or convert the model again."
    )


def missing_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Return the tensors that the architecture has and the directory lacks."""
    return sorted({name for binding in bindings(architecture) for name in binding.hugging_face} - set(reader.names()))


def unexpected_tensors(reader: SafetensorsReader, architecture: ModelArchitecture) -> list[str]:
    """Return the tensors of the directory that are not part of the architecture. The result contains neither rotary frequencies, which
    config.json determines, nor a tied output layer that equals the embedding.
    """
    used = {name for binding in bindings(architecture) for name in binding.hugging_face}
    found = [name for name in reader.names() if name not in used and not is_ignored(name)]
    if architecture.tied_embeddings and _HEAD in found and _is_the_embedding(reader):
        found.remove(_HEAD)
    return found


def _is_the_embedding(reader: SafetensorsReader) -> bool:
    """Return whether the stored output layer equals the embedding byte by byte. If they differ, transformers uses the stored output
    layer."""
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
            f"{reader.hf_path}: {len(found)} tensors are not part of this model of {architecture.num_layers} layers, e.g. "
            f"{shown(found[0])[1:-1]}. Weights and config.json do not match, or the architecture is another one. Copy both from the same "
            f"model."
        )
