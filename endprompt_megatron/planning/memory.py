"""How much device memory a training layout needs, by component, for every pipeline stage. An estimate from tensor sizes; what a process
holds besides tensors (CUDA context, communication buffers, fragmentation) is a stated reserve."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.activations import POSITION, ElementBytes, SavedTensor, kept_by_layer, layer_tensors
from endprompt_megatron.planning.flops import ModelShape
from endprompt_megatron.planning.layout import Layout, StageParameters, padded_vocab_size, stage_parameters

GIB = 2**30


@dataclass(frozen=True)
class _Precision:
    """Bytes of what a layout holds.

    Attributes:
        element: of activations.
        weight: of a parameter.
        optimizer: of master weight and moments, a parameter.
        fp8_weight: of the FP8 copies of a matrix's parameter; 0 without FP8.
        bf16_ends: whether the first and the last layer of the model stay in bf16.
    """

    element: ElementBytes
    weight: int
    optimizer: int
    fp8_weight: float = 0
    bf16_ends: bool = False


_GRADIENT_BYTES = 4  # Megatron accumulates in float32
_LOSS_SLICE = 4 * 2**20  # logits that model/cross_entropy.py turns to float32 at once
_BF16 = ElementBytes(2, 2, 2)
# Transformer Engine keeps bf16 parameters and, for the matrices, their FP8 values cached between micro-batches: once as they are and once
# transposed, because Hopper's FP8 products read one of both orders (Blackwell's tensor-wise products need no transposed copy, the
# others do). Blockwise scales are one float32 for 128 numbers, MXFP8's one byte for 32.
_PRECISIONS = {
    "fp32": _Precision(ElementBytes(4, 4, 4), weight=4, optimizer=8),
    "bf16": _Precision(_BF16, weight=2, optimizer=12),
    "fp8": _Precision(ElementBytes(2, 2, 1), weight=2, optimizer=12, fp8_weight=2, bf16_ends=True),
    "fp8_attention": _Precision(ElementBytes(2, 1, 1), weight=2, optimizer=12, fp8_weight=2),
    "fp8_blockwise": _Precision(ElementBytes(2, 2, 1 + 4 / 128), weight=2, optimizer=12, fp8_weight=2),
    "mxfp8": _Precision(ElementBytes(2, 2, 1 + 1 / 32), weight=2, optimizer=12, fp8_weight=2 * (1 + 1 / 32)),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one device of one pipeline stage, in GiB.

    Attributes:
        weights_gib: parameters in compute precision, FP8 copies included.
        gradients_gib: the gradient buffer.
        optimizer_gib: master weights and moments.
        activations_gib: what waits for the backward pass, of all micro-batches in flight.
        logits_gib: output logits and what the loss makes of them; 0 on a stage without output layer.
        working_gib: while one layer goes backward: what full recomputation makes anew, and gradients of activations.
        stage: which stage it is: "only", "first", "last" or a number from 1.
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    logits_gib: float
    working_gib: float
    stage: str

    @property
    def states_gib(self) -> float:
        """What is there between steps: weights, gradients, optimizer."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib

    @property
    def total_gib(self) -> float:
        """The fullest moment: logits are gone before the first layer goes backward, so that only the larger of both counts."""
        return self.states_gib + self.activations_gib + max(self.logits_gib, self.working_gib)


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


def reserve_gib(layout: Layout, *, device_memory_gib: float) -> float:
    """What to keep free beside the tensors. An assumption, not a measurement: 1 GiB of CUDA context, kernels and cuBLAS workspaces,
    0.5 GiB of NCCL buffers for each kind of group with more than one rank, and 3 % of the device for fragmentation.

    Args:
        layout: decides which groups communicate.
        device_memory_gib: of one GPU.
    """
    groups = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size,
    )
    return 1.0 + 0.5 * sum(size > 1 for size in groups) + 0.03 * device_memory_gib


def stage_memory(
    shape: ModelShape,
    layout: Layout,
    *,
    seq_length: int,
    precision: str,
    backend: str = "te",
    trained: TrainedParts | None = None,
) -> tuple[MemoryEstimate, ...]:
    """Memory of one device of every pipeline stage during a training step.

    Assumptions, each on the side of Megatron-Core's defaults:
    - AdamW over every weight, or over `trained`, whose adapters are counted whole on every tensor parallel rank. Bytes a parameter:
      2 (weight) + 4 (float32 gradient) + 12 (float32 master, two moments), in fp32 4 + 4 + 8. The distributed optimizer splits the last
      part over data *and* context parallel ranks, as Megatron does; the padding of its buffers is left out.
    - FP8 keeps bf16 parameters and caches 2 more bytes of every layer matrix (see the table above); linear layers keep their inputs in
      FP8, everything else stays bf16. The output layer is never FP8.
    - What a layer keeps: activations.py. Dropout is 0.
    - Tensor parallelism splits what lies inside attention and MLP; the rest only with sequence_parallel. Context parallelism splits
      everything by tokens.
    - In a pipeline a stage keeps one residual more of every pass in flight: the output that it sent on.
    - Logits, with the vocabulary whole on a rank: one tensor, which becomes its own gradient, and a float32 slice. Split by tensor
      parallelism: Megatron's loss makes a float32 copy of bf16 ones, Transformer Engine's (2.20) keeps a copy as they are; the rank
      with padding rows masks them in another.
    - While a layer goes backward: with full recomputation all that the layer keeps; gradients of twice ffn_hidden_size and of two
      residuals more than it frees meanwhile, and under sequence_parallel one gathered residual.

    Args:
        shape: of the model.
        layout: how it is cut.
        seq_length: physical tokens of a sequence, over all context parallel ranks.
        precision: fp32, bf16, fp8 (with the first and the last layer in bf16), fp8_attention, fp8_blockwise or mxfp8.
        backend: "te" or "torch".
        trained: what trains, where that is not every weight.
    Returns:
        An estimate a stage, the first stage first.
    Raises:
        ConfigError: precision, recompute_granularity or backend has no such value; the layers do not divide.
    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4, with
        the terms of RMSNorm, grouped-query attention and SwiGLU; megatron-core 0.16 for schedules, optimizer and loss.
    """
    sizes = _sizes_of(precision)
    layer = _layer_bytes(shape, layout, seq_length, sizes.element, backend)
    stages = range(layout.pipeline_model_parallel_size)
    return tuple(_one_stage(shape, layout, stage, seq_length, sizes, layer, backend, trained) for stage in stages)


def _sizes_of(precision: str) -> _Precision:
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision.name={precision}: memory is known for {', '.join(_PRECISIONS)}. Choose one of them.")
    return _PRECISIONS[precision]


def _layer_bytes(shape: ModelShape, layout: Layout, seq_length: int, element: ElementBytes, backend: str) -> tuple[float, float]:
    """Of one layer and micro-batch: what waits for the backward pass, and what full recomputation makes anew in it."""
    context, granularity = layout.context_parallel_size, layout.recompute_granularity
    kept = kept_by_layer(shape, element, backend, granularity, context_parallel_size=context)
    anew = layer_tensors(shape, element, backend, context_parallel_size=context)[1:] if granularity == "full" else ()
    of_kept, of_anew = (sum(saved.bytes_on_rank(layout, seq_length=seq_length) for saved in tensors) for tensors in (kept, anew))
    return of_kept, of_anew


def _one_stage(
    shape: ModelShape,
    layout: Layout,
    stage: int,
    seq_length: int,
    sizes: _Precision,
    layer: tuple[float, float],
    backend: str,
    trained: TrainedParts | None,
) -> MemoryEstimate:
    tensor, last = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size - 1
    has_output = stage == last
    parameters = stage_parameters(shape, layout, stage)
    layers_per_chunk = layout.layers_per_chunk(shape.num_layers)
    layers = layers_per_chunk * layout.num_chunks
    adapters = trained.adapter_parameters_per_layer * layers if trained else 0
    trains = _trained_parameters(shape, parameters, trained, layers, has_output, tensor) + adapters
    fp8_matrices = parameters.matrices - sizes.bf16_ends * ((stage == 0) + has_output) * parameters.one_layer_matrices
    weights = (parameters.total + adapters) * sizes.weight + max(0, fp8_matrices) * sizes.fp8_weight
    optimizer_split = layout.data_parallel_size * layout.context_parallel_size if layout.use_distributed_optimizer else 1

    kept, recomputed = layer
    tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
    residual = tokens * shape.hidden_size * sizes.element.activation / layout.residual_split
    frequencies = SavedTensor("rotary angles", 4 * shape.head_dim, POSITION).bytes_on_rank(layout, seq_length=seq_length)
    a_chunk = layers_per_chunk * kept + frequencies + residual * (last > 0)
    final_norm = (2 * residual + tokens * 4 / layout.residual_split) * has_output
    gathered = shape.hidden_size if layout.sequence_parallel else 0
    gradients = tokens * sizes.element.activation * (2 * shape.ffn_hidden_size / tensor + gathered) + 2 * residual
    return MemoryEstimate(
        weights_gib=weights / GIB,
        gradients_gib=trains * _GRADIENT_BYTES / GIB,
        optimizer_gib=trains * sizes.optimizer / optimizer_split / GIB,
        activations_gib=(layout.chunks_in_flight(stage) * a_chunk + final_norm) / GIB,
        logits_gib=has_output * _logit_bytes(shape, tensor, tokens, sizes.element.activation, backend) / GIB,
        working_gib=(recomputed + gradients) / GIB,
        stage="only" if last == 0 else "first" if stage == 0 else "last" if has_output else str(stage + 1),
    )


def _trained_parameters(
    shape: ModelShape, parameters: StageParameters, trained: TrainedParts | None, layers: int, has_output: bool, tensor: int
) -> float:
    """Those with gradients, adapters apart."""
    if trained is None:
        return parameters.total
    table = padded_vocab_size(shape.vocab_size, tensor) * shape.hidden_size / tensor
    embeddings = bool(parameters.embedding) or (has_output and shape.tied_embeddings)
    norms = layers * shape.norm_parameters_per_layer + parameters.final_norm
    return trained.embedding * embeddings * table + trained.norms * norms


def _logit_bytes(shape: ModelShape, tensor: int, tokens: float, element: float, backend: str) -> float:
    """Bytes of the rank's logits, and of what is made of them, at the loss's fullest moment."""
    padded = padded_vocab_size(shape.vocab_size, tensor)
    logits = tokens * padded / tensor
    if tensor == 1:
        return logits * element + min(logits, _LOSS_SLICE) * 4
    masked = element + 1 if padded > shape.vocab_size else 0
    copy = element if backend == "te" else 4 if element < 4 else 0
    return logits * (element + masked + copy)


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
    backend: str = "te",
) -> MemoryEstimate:
    """Memory of one device of the pipeline stage that needs most; arguments as Layout and stage_memory have them.

    Raises:
        ConfigError: as stage_memory.
    """
    layout = Layout(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        data_parallel_size=data_parallel_size,
        sequence_parallel=sequence_parallel,
        use_distributed_optimizer=use_distributed_optimizer,
        recompute_granularity=recompute_granularity,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
    )
    stages = stage_memory(shape, layout, seq_length=seq_length, precision=precision, backend=backend, trained=trained)
    return max(stages, key=lambda estimate: estimate.total_gib)
