"""How much device memory a training layout needs, by component, for the pipeline stage that needs most. An estimate from tensor
sizes: it says whether a layout is worth starting, not what the allocator will report."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape

GIB = 2**30


@dataclass(frozen=True)
class _Precision:
    """Bytes: of a weight and of an activation element, of a gradient, of optimizer state a parameter, of a logit in the loss."""

    element: int
    gradient: int
    optimizer: int
    logit: int


# Megatron-Core: gradients accumulate in an fp32 buffer; the optimizer holds an fp32 master copy and two fp32 moments. The loss
# makes an fp32 copy of bf16 logits (both live at once); fp32 logits become the softmax in place.
_PRECISIONS = {
    "bf16": _Precision(element=2, gradient=4, optimizer=12, logit=6),
    "fp32": _Precision(element=4, gradient=4, optimizer=8, logit=4),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device of the pipeline stage that needs most, in GiB.

    Attributes:
        weights_gib: parameters in compute precision.
        gradients_gib: the gradient buffer.
        optimizer_gib: master weights and moments.
        activations_gib: what the backward pass reads, of all micro-batches in flight.
        logits_gib: output logits and their fp32 softmax; 0 on a stage without output layer.
        stage: which stage it is: "only", "first" or "last".
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    logits_gib: float
    stage: str

    @property
    def total_gib(self) -> float:
        """Sum of all components."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib + self.logits_gib


@dataclass(frozen=True)
class TrainedParts:
    """What has gradients and optimizer state where not every weight trains.

    Attributes:
        adapter_parameters_per_layer: numbers of the adapters of a layer; they come on top of its weights.
        embedding: whether the embedding trains; a tied output layer trains with it, another one never does.
        norms: whether the norms train.
    """

    adapter_parameters_per_layer: int
    embedding: bool
    norms: bool


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding as Megatron holds it: a multiple of 128 * tensor_model_parallel_size."""
    multiple = 128 * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def estimate_memory(
    shape: ModelShape,
    *,
    seq_length: int,
    micro_batch_size: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int,
    data_parallel_size: int,
    sequence_parallel: bool,
    use_distributed_optimizer: bool,
    precision: str,
    recompute_granularity: str | None,
    num_micro_batches: int,
    virtual_pipeline_model_parallel_size: int | None = None,
    trained: TrainedParts | None = None,
) -> MemoryEstimate:
    """Memory of one device during a training step, on the first or the last pipeline stage, whichever needs more.

    Assumptions, each on the side of Megatron-Core's defaults:
    - AdamW over every weight, or over `trained`, whose adapters are counted whole on every tensor parallel rank. Bytes a parameter:
      bf16 2 (weight) + 4 (fp32 gradient) + 12 (fp32 master, two moments); fp32 4 + 4 + 8. The distributed optimizer splits the last
      part over data *and* context parallel ranks, as Megatron does.
    - Attention keeps query, key, value, output and one fp32 number a head and token (flash kernels, SDPA); no s x s scores.
    - A layer keeps: the inputs and outputs of its two norms, query/key/value, the attention output, the MLP's first output and its
      activated half. SwiGLU and norms are fused (SwiGLU in plain torch keeps one more ffn_hidden_size a token, a norm in plain
      torch an fp32 copy or two), dropout is 0, the rotary embedding keeps nothing.
    - Tensor parallelism splits what lies inside attention and MLP; the rest only with sequence_parallel. Context parallelism
      splits everything by tokens.
    - recompute_granularity "selective" recomputes core attention, which keeps next to nothing here, so that it saves only the fp32
      number a head; "full" keeps each layer's input and, while one layer is recomputed, that layer's activations.
    - 1F1B schedule: the first stage holds pipeline_model_parallel_size micro-batches, the last one; interleaved stages hold the
      usual share more. A layer count that does not divide is rounded up.
    Not counted: the CUDA context, communication buffers, gradients of activations, fragmentation.

    Args:
        shape: of the model.
        seq_length: physical tokens of a sequence, over all context parallel ranks.
        micro_batch_size: sequences a rank holds at once.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size, data_parallel_size: the layout.
        sequence_parallel: whether norms and residuals are split over tensor parallel ranks.
        use_distributed_optimizer: whether optimizer state is split over data and context parallel ranks.
        precision: "bf16" or "fp32".
        recompute_granularity: None, "selective" or "full".
        num_micro_batches: micro-batches a rank accumulates a step.
        virtual_pipeline_model_parallel_size: model chunks a stage of the interleaved schedule; None without it.
        trained: what trains, where that is not every weight.
    Returns:
        The estimate of the stage that needs most.
    Raises:
        ConfigError: precision or recompute_granularity has no such value.
    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4, with
        the terms of RMSNorm, grouped-query attention and SwiGLU; megatron-core 0.16 for the optimizer and the loss.
    """
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision.name={precision}: memory is known for {' and '.join(_PRECISIONS)}. Choose one of them.")
    if recompute_granularity not in (None, "selective", "full"):
        raise ConfigError(f"parallel.recompute_granularity={recompute_granularity}: choose null, selective or full.")
    sizes = _PRECISIONS[precision]
    tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
    tokens = micro_batch_size * seq_length / context_parallel_size
    residual_split = tensor if sequence_parallel else 1
    optimizer_split = data_parallel_size * context_parallel_size if use_distributed_optimizer else 1
    vocab = padded_vocab_size(shape.vocab_size, tensor)
    layers = -(-shape.num_layers // pipeline)

    layer_parameters = shape.matrix_parameters_per_layer / tensor + shape.norm_parameters_per_layer
    embedding_parameters = vocab * shape.hidden_size / tensor
    residual_bytes = tokens * shape.hidden_size * sizes.element / residual_split
    layer_bytes = tokens * _layer_bytes_per_token(
        shape, element=sizes.element, tensor=tensor, residual_split=residual_split, recompute_granularity=recompute_granularity
    )

    def stage(name: str, *, index: int, has_embedding: bool, has_output: bool) -> MemoryEstimate:
        owns_output_matrix = has_output and not (has_embedding and shape.tied_embeddings)
        parameters = layers * layer_parameters + embedding_parameters * (has_embedding + owns_output_matrix)
        parameters += shape.hidden_size * has_output
        trains = parameters
        if trained is not None:
            adapters = layers * trained.adapter_parameters_per_layer
            parameters += adapters
            embeddings = has_embedding or (has_output and shape.tied_embeddings)
            trains = adapters + trained.embedding * embedding_parameters * embeddings
            trains += trained.norms * (layers * shape.norm_parameters_per_layer + shape.hidden_size * has_output)
        layers_in_flight = layers * _micro_batches_in_flight(
            index, pipeline, num_micro_batches, virtual_pipeline_model_parallel_size or 1
        )
        if recompute_granularity == "full":
            activations = layers_in_flight * residual_bytes + layer_bytes
        else:
            activations = layers_in_flight * layer_bytes
        activations += 2 * residual_bytes * has_output  # the final norm's input and output
        return MemoryEstimate(
            weights_gib=parameters * sizes.element / GIB,
            gradients_gib=trains * sizes.gradient / GIB,
            optimizer_gib=trains * sizes.optimizer / optimizer_split / GIB,
            activations_gib=activations / GIB,
            logits_gib=has_output * tokens * vocab / tensor * sizes.logit / GIB,
            stage=name,
        )

    if pipeline == 1:
        return stage("only", index=0, has_embedding=True, has_output=True)
    first = stage("first", index=0, has_embedding=True, has_output=False)
    last = stage("last", index=pipeline - 1, has_embedding=False, has_output=True)
    return max(first, last, key=lambda estimate: estimate.total_gib)


def _layer_bytes_per_token(
    shape: ModelShape, *, element: int, tensor: int, residual_split: int, recompute_granularity: str | None
) -> float:
    around = 4 * shape.hidden_size / residual_split  # input and output of both norms
    attention = (2 * shape.query_size + shape.key_value_size) / tensor  # query, key, value; the output
    mlp = (3 if shape.gated else 2) * shape.ffn_hidden_size / tensor  # first product (gate and up), activated product
    row_statistics = 0 if recompute_granularity == "selective" else 4 * shape.num_attention_heads / tensor
    return element * (around + attention + mlp) + row_statistics


def _micro_batches_in_flight(stage_index: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> float:
    """Micro-batches whose activations a stage holds at its fullest, counted in whole stages (chunks of a stage are fractions)."""
    if num_chunks == 1:
        return min(num_stages - stage_index, num_micro_batches)
    chunks = 2 * (num_stages - 1 - stage_index) + (num_chunks - 1) * num_stages + 1
    return min(chunks, num_micro_batches * num_chunks) / num_chunks
