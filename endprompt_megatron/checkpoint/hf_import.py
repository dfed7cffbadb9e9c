"""Load a Hugging Face model directory straight into Megatron model chunks: each rank reads only its slices, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from endprompt_megatron.checkpoint.hf_mapping import Binding, bindings
from endprompt_megatron.checkpoint.safetensors_io import SafetensorsReader
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import track
from endprompt_megatron.model.architecture import ModelArchitecture
from endprompt_megatron.model.gpt import EndPromptGPTModel


def check_hf_weights(hf_path: Path, architecture: ModelArchitecture) -> None:
    """Read every file's header and compare names and shapes with the architecture, without reading a weight.

    Raises:
        CheckpointError: a file is missing or cut short, or a tensor is missing, left over or of another shape.
    """
    with SafetensorsReader(hf_path) as reader:
        _check_tensors(reader, list(bindings(architecture)), architecture)


def load_hf_weights(chunks: list[EndPromptGPTModel], hf_path: Path, architecture: ModelArchitecture) -> None:
    """Fill every parameter of the chunks from a Hugging Face directory.

    Args:
        chunks: this rank's model, before Megatron's wrappers; parameters keep their dtype.
        hf_path: model directory.
        architecture: of the whole model.
    Raises:
        CheckpointError: a tensor is missing, has another shape, or is left over.
    """
    parameters = _parameters_by_whole_model_name(chunks)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    every = list(bindings(architecture))
    with SafetensorsReader(hf_path) as reader:
        _check_tensors(reader, every, architecture)
        for binding in track(every, "loading weights"):
            # a tied output layer on the last pipeline stage is a second copy of the embedding
            names = [binding.megatron]
            if architecture.tied_embeddings and binding.megatron == "embedding.word_embeddings.weight":
                names.append("output_layer.weight")
            for name in names:
                for parameter in parameters.pop(name, []):
                    _fill(parameter, binding, reader, architecture, rank, size)
    if parameters:
        raise AssertionError(f"parameters that no rule of hf_mapping fills: {sorted(parameters)}")


def _fill(parameter, binding: Binding, reader: SafetensorsReader, architecture: ModelArchitecture, rank: int, size: int) -> None:
    value = binding.layout.read(architecture, binding.hugging_face, reader.rows, reader.columns, rank, size)
    if value.shape != parameter.shape:
        raise AssertionError(f"{binding.megatron}: read {tuple(value.shape)}, the model has {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(value)


def _parameters_by_whole_model_name(chunks: list[EndPromptGPTModel]) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters under their names in the whole model: layers numbered from the first stage on."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in named_parameters_of_whole_model(chunk):
            found.setdefault(name, []).append(parameter)
    return found


def named_parameters_of_whole_model(chunk: EndPromptGPTModel) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of a chunk, its layers numbered as in the whole model."""
    offset = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
    named = []
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        named.append((".".join(parts), parameter))
    return named


def _check_tensors(reader: SafetensorsReader, every: list[Binding], architecture: ModelArchitecture) -> None:
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
