"""Every pipeline stage of the real model, built on `meta` for a layout of any size: exact parameters of every rank before there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import param_is_not_shared

from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig
from endprompt_megatron.mcore.fake import fake_job, on_meta
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class StageParameter:
    """A parameter of one rank.

    Attributes:
        name: in its model chunk.
        shape: of this rank's share.
        dtype: as torch names it, e.g. "bfloat16".
        chunk: which chunk of its stage; 0 where the schedule is not interleaved.
        is_split: whether every tensor parallel rank holds another share.
        is_repeated: whether another stage holds it too and counts it (the output layer of tied embeddings).
        trains: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: int
    is_split: bool
    is_repeated: bool
    trains: bool

    @property
    def size(self) -> int:
        """Numbers in this rank's share."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stage:
    """What each tensor parallel rank of a pipeline stage holds.

    Attributes:
        index: of the stage, from 0.
        layers: numbers of its layers in the whole model, from 0.
        parameters: in the model's order.
    """

    index: int
    layers: tuple[int, ...]
    parameters: tuple[StageParameter, ...]

    @property
    def num_parameters(self) -> int:
        """Numbers that one rank holds."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def num_trained(self) -> int:
        """Numbers of one rank that have gradients and optimizer state."""
        return sum(parameter.size for parameter in self.parameters if parameter.trains)


@dataclass(frozen=True)
class ModelStages:
    """The whole model, stage by stage.

    Attributes:
        stages: in the pipeline's order.
        num_parameters: of the model without the rows that pad its vocabulary: what is published.
        num_padding: numbers in those rows.
    """

    stages: tuple[Stage, ...]
    num_parameters: int
    num_padding: int


def build_stages(
    architecture: ModelArchitecture,
    *,
    rope: RopeScaling,
    max_sequence_length: int,
    parallel: ParallelConfig,
    precision: str,
    world_size: int,
    adapter: AdapterConfig | None = None,
    attention_groups: int | None = None,
) -> ModelStages:
    """Build the model as the first tensor parallel rank of each pipeline stage does, with the `torch` backend's layers: other backends name
    some parameters otherwise and have the same numbers. Takes no memory for weights and leaves no process group behind.

    Args:
        architecture, rope, max_sequence_length, parallel, adapter, attention_groups: as build_model_chunks.
        precision: of the run; FP8 keeps its weights in bf16.
        world_size: ranks of the job, a multiple of the model-parallel size.
    """
    stages, total, padding = [], 0, 0
    num_stages = parallel.pipeline_model_parallel_size
    extra_rows = architecture.padded_vocab_size(parallel.tensor_model_parallel_size) - architecture.vocab_size
    for index in range(num_stages):
        with fake_job(parallel, world_size=world_size, rank=index * (world_size // num_stages)), on_meta():
            chunks = build_model_chunks(
                architecture,
                rope=rope,
                max_sequence_length=max_sequence_length,
                parallel=parallel,
                precision="fp32" if precision == "fp32" else "bf16",
                backend=BACKENDS["torch"],
                device=torch.device("meta"),
                adapter=adapter,
                attention_groups=attention_groups,
            )
        parameters = [
            StageParameter(
                name,
                tuple(parameter.shape),
                str(parameter.dtype).removeprefix("torch."),
                number,
                is_split=getattr(parameter, "tensor_model_parallel", False),
                is_repeated=not param_is_not_shared(parameter),
                trains=parameter.requires_grad,
            )
            for number, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        ]
        layers = tuple(layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers)
        stages.append(Stage(index, layers, tuple(parameters)))
        for parameter in parameters:
            if not parameter.is_repeated:
                total += parameter.size * (parallel.tensor_model_parallel_size if parameter.is_split else 1)
                padding += extra_rows * architecture.hidden_size * (parameter.name in _VOCABULARY)
    return ModelStages(tuple(stages), total - padding, padding)
