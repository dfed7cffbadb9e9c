"""How a model and its batch are cut over GPUs, and which cuts Megatron-Core can run: plain arithmetic, shared by memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One parallel layout with its batch; names as in conf/parallel and conf/trainer.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size, data_parallel_size: their product is the number
            of GPUs.
        virtual_pipeline_model_parallel_size: model chunks a stage of the interleaved schedule; None without it.
        sequence_parallel: whether norms and residuals are split over tensor parallel ranks.
        use_distributed_optimizer: whether optimizer state is split over data and context parallel ranks.
        recompute_granularity: None, "selective" or "full".
        micro_batch_size: sequences a rank holds at once.
        num_micro_batches: micro-batches a rank accumulates a step.
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
        """GPUs."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size * self.data_parallel_size

    @property
    def num_chunks(self) -> int:
        """Model chunks a stage."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def global_batch_size(self) -> int:
        """Sequences a step."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel_size

    @property
    def residual_split(self) -> int:
        """Over how many ranks the tokens of norms and residuals are split, besides context parallelism."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    def layers_per_chunk(self, num_layers: int) -> int:
        """Layers of one model chunk.

        Raises:
            ConfigError: the layers do not divide: Megatron-Core refuses that without a split given by hand, and so does this project.
        """
        chunks = self.pipeline_model_parallel_size * self.num_chunks
        if num_layers % chunks:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size} x virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size}: must divide the model's {num_layers} layers. Choose sizes that do."
            )
        return num_layers // chunks

    def chunks_in_flight(self, stage: int) -> int:
        """Forward passes of model chunks whose activations a stage holds at its fullest.

        Args:
            stage: from 0.
        Source: megatron-core 0.16, pipeline_parallel/schedules.py, get_pp_rank_microbatches: warm-up passes, and one more.
        """
        behind = self.pipeline_model_parallel_size - 1 - stage
        if self.pipeline_model_parallel_size == 1:
            return 1
        if self.virtual_pipeline_model_parallel_size is None:  # 1 is the interleaved schedule too
            return min(behind + 1, self.num_micro_batches)
        warm_up = 2 * behind + (self.num_chunks - 1) * self.pipeline_model_parallel_size
        return min(warm_up + 1, self.num_micro_batches * self.num_chunks)

    def describe(self) -> str:
        """The layout in short, as tables show it."""
        sizes = f"TP {self.tensor_model_parallel_size}, PP {self.pipeline_model_parallel_size}"
        if self.virtual_pipeline_model_parallel_size:
            sizes += f" (VPP {self.virtual_pipeline_model_parallel_size})"
        return f"{sizes}, CP {self.context_parallel_size}, DP {self.data_parallel_size}"


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding as Megatron holds it: a multiple of 128 * tensor_model_parallel_size."""
    multiple = 128 * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of one pipeline stage, vocabulary padding included.

    Attributes:
        matrices: of its layers' matrices, the ones that FP8 covers.
        one_layer_matrices: of one layer alone.
        vectors: norms and biases of its layers.
        embedding: the embedding's share.
        output: the output layer's share; 0 where it is the embedding of the same stage.
        final_norm: of the norm before the output layer.
    """

    matrices: int
    one_layer_matrices: int
    vectors: int
    embedding: int
    output: int
    final_norm: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.vectors + self.embedding + self.output + self.final_norm


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> StageParameters:
    """What one rank of a stage holds: matrices and query/key/value biases split by tensor parallelism, norms whole, the embedding on
    the first stage, the output layer on the last. A tied output layer is a second copy there, or the same one where both are one stage.

    Args:
        shape: of the model.
        layout: how it is cut.
        stage: from 0.
    Raises:
        ConfigError: the layers do not divide.
    """
    tensor, last = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size - 1
    layers = layout.layers_per_chunk(shape.num_layers) * layout.num_chunks
    table = padded_vocab_size(shape.vocab_size, tensor) * shape.hidden_size // tensor
    has_output = stage == last
    return StageParameters(
        matrices=layers * shape.matrix_parameters_per_layer // tensor,
        one_layer_matrices=shape.matrix_parameters_per_layer // tensor,
        vectors=layers * (shape.norm_parameters_per_layer + shape.bias_parameters_per_layer // tensor),
        embedding=table * (stage == 0),
        output=table * (has_output and not (stage == 0 and shape.tied_embeddings)),
        final_norm=shape.hidden_size * has_output,
    )
