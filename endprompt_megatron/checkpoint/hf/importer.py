"""Load a Hugging Face model directory directly into Megatron model chunks. Each rank reads only its own slices, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from endprompt_megatron.checkpoint.hf.mapping import Binding, bindings, unfused_name
from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader
from endprompt_megatron.checkpoint.hf.weights import check_tensors, is_finite, not_finite
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import track
from endprompt_megatron.model.adapters import is_adapter
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.lora import adapted_layers
from endprompt_megatron.planning.architecture import ModelArchitecture


def load_hf_weights(chunks: list[EndPromptGPTModel], hf_path: Path, architecture: ModelArchitecture) -> None:
    """Load all parameters of the chunks, except adapters, from a Hugging Face directory.

    Args:
        chunks: this rank's model chunks, without Megatron's wrappers. Parameters keep their dtype.
        hf_path: model directory.
        architecture: architecture of the whole model.
    Raises:
        CheckpointError: a tensor is missing or unexpected, has another shape, or contains NaN or infinity.
    """
    parameters = _parameters_by_whole_model_name(chunks)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    every = list(bindings(architecture))
    with SafetensorsReader(hf_path) as reader:
        check_tensors(reader, architecture)
        for binding in track(every, "loading weights"):
            # with tied embeddings, the output layer of the last pipeline stage is a second copy of the embedding
            names = [binding.megatron]
            if architecture.tied_embeddings and binding.megatron == "embedding.word_embeddings.weight":
                names.append("output_layer.weight")
            for name in names:
                for parameter in parameters.pop(name, []):
                    _fill(parameter, binding, reader, architecture, rank, size)
    if parameters:
        raise AssertionError(f"parameters without a rule in checkpoint/hf/mapping.py: {sorted(parameters)}")


def _fill(
    parameter: torch.Tensor, binding: Binding, reader: SafetensorsReader, architecture: ModelArchitecture, rank: int, size: int
) -> None:
    value = binding.layout.read(architecture, binding.hugging_face, reader.rows, reader.columns, rank, size)
    if value.shape != parameter.shape:
        raise AssertionError(f"{binding.megatron}: read {tuple(value.shape)}, the model has {tuple(parameter.shape)}")
    places = "; ".join(f"{name} in {reader.file_of(name)}" for name in binding.hugging_face)
    if not is_finite(value):
        raise not_finite(int((~torch.isfinite(value)).sum()), places)
    with torch.no_grad():
        parameter.copy_(value)
    # the result is checked only if the conversion can overflow
    if torch.finfo(parameter.dtype).max < torch.finfo(value.dtype).max and not is_finite(parameter.detach()):
        raise CheckpointError(
            f"the base model's weights hold {float(value.abs().max()):g}, more than {parameter.dtype} can represent: {places}. Set "
            f"precision=fp32, or use another copy of the weights."
        )


def _parameters_by_whole_model_name(chunks: list[EndPromptGPTModel]) -> dict[str, list[torch.nn.Parameter]]:
    """Return {name in the whole model: parameters}. Layers are numbered across pipeline stages."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in named_parameters_of_whole_model(chunk):
            if not is_adapter(name):
                found.setdefault(name, []).append(parameter)
    return found


def named_parameters_of_whole_model(chunk: EndPromptGPTModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return all (name, parameter) of a chunk of any backend, with the layer numbers of the whole model and the names in
    checkpoint/hf/mapping.py."""
    return [(_name_in_whole_model(chunk, name), parameter) for name, parameter in chunk.named_parameters()]


def merged_weights_of_whole_model(chunk: EndPromptGPTModel) -> dict[str, Callable[[], torch.Tensor]]:
    """Return {name: function that returns this rank's weight} of a chunk, with adapters merged as in the Hugging Face model. The function
    merges when it is called, and does not change the chunk."""
    weights = {name: parameter.detach for name, parameter in named_parameters_of_whole_model(chunk) if not is_adapter(name)}
    merged = {_name_in_whole_model(chunk, f"{name}.weight"): layer.merged_weight for name, layer in adapted_layers(chunk).items()}
    return weights | merged


def adapters_of_whole_model(chunk: EndPromptGPTModel) -> dict[str, Callable[[], torch.Tensor]]:
    """Return {name: function that returns this rank's shard} for the adapters of a chunk."""
    return {name: parameter.detach for name, parameter in named_parameters_of_whole_model(chunk) if is_adapter(name)}


def _name_in_whole_model(chunk: EndPromptGPTModel, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage))
    return unfused_name(".".join(parts))
