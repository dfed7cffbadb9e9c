"""Build every pipeline stage of a model on the `meta` device, for a layout of any size. The result lists the exact parameters of every rank
without starting the ranks."""

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
class PipelineStageParameter:
    """One parameter of one rank.

    Attributes:
        name: name in the model chunk.
        shape: shape of this rank's shard.
        dtype: torch's name of the dtype, e.g. "bfloat16".
        chunk: index of the model chunk on its pipeline stage; 0 unless the schedule is interleaved.
        is_split: whether the parameter is split over the tensor-parallel ranks.
        is_repeated: whether the parameter is a copy of a parameter of another pipeline stage (the output layer of tied embeddings). Copies
            are not counted again.
        trains: whether the parameter requires a gradient.
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
        """Number of elements of this rank's shard."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PipelineStage:
    """The parameters that each tensor-parallel rank of a pipeline stage holds.

    Attributes:
        index: index of the pipeline stage, from 0.
        layers: indices of the layers of this stage in the whole model, from 0.
        parameters: parameters in the order of the model.
    """

    index: int
    layers: tuple[int, ...]
    parameters: tuple[PipelineStageParameter, ...]

    @property
    def num_parameters(self) -> int:
        """Parameter count of one rank."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def num_trained(self) -> int:
        """Count of one rank's parameters that have gradients and optimizer state."""
        return sum(parameter.size for parameter in self.parameters if parameter.trains)


@dataclass(frozen=True)
class PipelineStages:
    """All pipeline stages of a model.

    Attributes:
        stages: stages in pipeline order.
        num_parameters: parameter count of the model without vocabulary padding. Published parameter counts also exclude padding.
        num_padding: parameter count of the vocabulary padding.
    """

    stages: tuple[PipelineStage, ...]
    num_parameters: int
    num_padding: int


def build_pipeline_stages(
    architecture: ModelArchitecture,
    *,
    rope: RopeScaling,
    max_sequence_length: int,
    parallel: ParallelConfig,
    precision: str,
    world_size: int,
    adapter: AdapterConfig | None = None,
    attention_groups: int | None = None,
) -> PipelineStages:
    """Build the model of the first tensor-parallel rank of each pipeline stage, with the layers of the `torch` backend. Some parameters
    have other names in other backends, but the same sizes. This function allocates no memory for weights and destroys its process groups.

    Args:
        architecture, rope, max_sequence_length, parallel, adapter, attention_groups: same as for build_model_chunks.
        precision: precision of the run. FP8 precisions keep weights in bf16.
        world_size: number of ranks of the job, a multiple of the model-parallel size.
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
            PipelineStageParameter(
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
        stages.append(PipelineStage(index, layers, tuple(parameters)))
        for parameter in parameters:
            if not parameter.is_repeated:
                total += parameter.size * (parallel.tensor_model_parallel_size if parameter.is_split else 1)
                padding += extra_rows * architecture.hidden_size * (parameter.name in _VOCABULARY)
    return PipelineStages(tuple(stages), total - padding, padding)
