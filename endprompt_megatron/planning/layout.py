"""A parallel layout, which splits the model and the batch over GPUs. The memory and throughput estimates share its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One parallel layout with its batch. The names of the fields are those of conf/parallel and conf/trainer.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size, data_parallel_size: sizes of the four kinds of
            parallelism. Their product is the number of GPUs.
        virtual_pipeline_model_parallel_size: number of model chunks per stage of the interleaved schedule; None without interleaving.
        sequence_parallel: whether norms and residuals are split over tensor parallel ranks.
        use_distributed_optimizer: whether optimizer state is split over data and context parallel ranks.
        recompute_granularity: None, "selective" or "full".
        micro_batch_size: number of sequences per micro-batch.
        num_micro_batches: number of micro-batches that a rank accumulates per step.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute_granularity: str | None = None
    micro_batch_size: int = 1
    num_micro_batches: int = 1

    @property
    def world_size(self) -> int:
        """Number of GPUs."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size * self.data_parallel_size

    @property
    def num_chunks(self) -> int:
        """Number of model chunks per pipeline stage."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def global_batch_size(self) -> int:
        """Number of sequences per step."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel_size

    @property
    def residual_split(self) -> int:
        """Number of tensor parallel ranks that share the tokens of norms and residuals."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def layers_per_chunk(self, num_layers: int) -> int:
        """Return the number of layers of one model chunk.

        Raises:
            ConfigError: the number of layers is not a multiple of the number of chunks. Megatron-Core then needs an explicit split, which
                this project does not support.
        """
        chunks = self.pipeline_model_parallel_size * self.num_chunks
        if num_layers % chunks:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size}: must divide the model's {num_layers} layers. Choose sizes that do."
            )
        return num_layers // chunks

    def chunks_in_flight(self, stage: int) -> int:
        """Return the largest number of forward passes whose activations a pipeline stage keeps at the same time. Each pass takes one
        micro-batch through one model chunk.

        Args:
            stage: index of the pipeline stage, from 0.
        Source: megatron-core 0.16, pipeline_parallel/schedules.py, get_pp_rank_microbatches: the warm-up passes plus one.
        """
        behind = self.pipeline_model_parallel_size - 1 - stage
        if self.pipeline_model_parallel_size == 1:
            return 1
        if self.virtual_pipeline_model_parallel_size is None:  # a value of 1 also selects the interleaved schedule
            return min(behind + 1, self.num_micro_batches)
        warm_up = 2 * behind + (self.num_chunks - 1) * self.pipeline_model_parallel_size
        return min(warm_up + 1, self.num_micro_batches * self.num_chunks)

    def describe(self) -> str:
        """Return the layout as short text for tables."""
        sizes = f"TP {self.tensor_model_parallel_size}, PP {self.pipeline_model_parallel_size}"
        if self.virtual_pipeline_model_parallel_size:
            sizes += f" (VPP {self.virtual_pipeline_model_parallel_size})"
        return f"{sizes}, CP {self.context_parallel_size}, DP {self.data_parallel_size}"


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters of one rank of one pipeline stage, including vocabulary padding.

    Attributes:
        matrices: parameters of the matrices in the layers of the stage, to which FP8 applies.
        one_layer_matrices: parameters of the matrices in one layer.
        vectors: parameters of the norms and biases in the layers of the stage.
        embedding: parameters of this rank's share of the embedding.
        output: parameters of this rank's share of the output layer; 0 if it is tied to an embedding on the same stage.
        final_norm: parameters of the norm before the output layer.
    """

    matrices: int
    one_layer_matrices: int
    vectors: int
    embedding: int
    output: int
    final_norm: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.matrices + self.vectors + self.embedding + self.output + self.final_norm


def stage_parameters(architecture: ModelArchitecture, layout: Layout, stage: int) -> StageParameters:
    """Return the numbers of parameters of one rank of a pipeline stage.

    Tensor parallelism splits matrices and query/key/value biases; norms are replicated. The embedding is on the first stage and the output
    layer on the last. A tied output layer is a second copy of the embedding, unless both are on the same stage.

    Args:
        architecture: sizes of the model.
        layout: how the model is split.
        stage: index of the pipeline stage, from 0.
    Raises:
        ConfigError: the number of layers is not divisible by the number of model chunks.
    """
    tensor, last = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size - 1
    layers = layout.layers_per_chunk(architecture.num_layers) * layout.num_chunks
    table = architecture.padded_vocab_size(tensor) * architecture.hidden_size // tensor
    has_output = stage == last
    return StageParameters(
        matrices=layers * architecture.matrix_parameters_per_layer // tensor,
        one_layer_matrices=architecture.matrix_parameters_per_layer // tensor,
        vectors=layers * (architecture.norm_parameters_per_layer + architecture.bias_parameters_per_layer // tensor),
        embedding=table * (stage == 0),
        output=table * (has_output and not (stage == 0 and architecture.tied_embeddings)),
        final_norm=architecture.hidden_size * has_output,
    )
