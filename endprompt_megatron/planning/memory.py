"""Estimate the device memory of a training layout, by component, for every pipeline stage. The estimate adds up tensor sizes. A separate
reserve covers the other memory of a process: CUDA context, communication buffers and fragmentation."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.activations import POSITION, ElementBytes, SavedTensor, kept_by_layer, layer_tensors
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout import Layout, StageParameters, stage_parameters

GIB = 2**30


@dataclass(frozen=True)
class _Precision:
    """Bytes per element or parameter in one precision.

    Attributes:
        element: bytes per element of activations.
        weight: bytes per parameter.
        optimizer: bytes of master weight and moments, per parameter.
        fp8_weight: bytes of the FP8 copies, per parameter of a layer matrix; 0 without FP8.
        bf16_ends: whether the first and the last layer of the model stay in bf16.
    """

    element: ElementBytes
    weight: int
    optimizer: int
    fp8_weight: float = 0
    bf16_ends: bool = False


_GRADIENT_BYTES = 4  # per parameter; Megatron accumulates gradients in float32
_LOSS_SLICE = 4 * 2**20  # number of logits that model/cross_entropy.py converts to float32 at a time
_BF16 = ElementBytes(2, 2, 2)
# Transformer Engine keeps bf16 parameters. For layer matrices it also caches FP8 values between micro-batches, once in the original layout
# and once transposed, because FP8 products on Hopper need both. (On Blackwell, tensor-wise scaling needs only the original layout, but the
# other recipes need both. This difference is not counted.) Blockwise scaling has one float32 scale per 128 elements of a linear layer's
# input; the scales of weights are not counted. MXFP8 has a scale of one byte per 32 elements of inputs and weights.
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
        weights_gib: parameters in compute precision, including FP8 copies.
        gradients_gib: the gradient buffer.
        optimizer_gib: master weights and moments.
        activations_gib: tensors that all micro-batches in flight keep for the backward pass.
        logits_gib: output logits and the copies that the loss makes; 0 on a stage without the output layer.
        working_gib: temporary tensors during the backward pass of one layer: recomputed activations and gradients of activations.
        stage: name of the pipeline stage: "only", "first", "last" or its number, counted from 1.
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
        """Memory that stays allocated between steps: weights, gradients and optimizer state."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib

    @property
    def total_gib(self) -> float:
        """Peak memory. The logits are freed before the backward pass of any layer, so only the larger of logits and working memory
        counts."""
        return self.states_gib + self.activations_gib + max(self.logits_gib, self.working_gib)


@dataclass(frozen=True)
class TrainedParts:
    """The trainable parameters of a run with adapters. Only these have gradients and optimizer state.

    Attributes:
        adapter_parameters_per_layer: adapter parameters of a layer, in addition to its weights.
        embedding: whether the embedding is trained. A tied output layer is trained with the embedding, an untied output layer never.
        norms: whether the norms are trained.
    """

    adapter_parameters_per_layer: int
    embedding: bool
    norms: bool


def reserve_gib(layout: Layout, *, device_memory_gib: float) -> float:
    """Return the memory to keep free in addition to the tensors, in GiB. The value is an assumption, not a measurement: 1 GiB for CUDA
    context, kernels and cuBLAS workspaces, 0.5 GiB of NCCL buffers for each kind of process group with more than one rank, and 3 % of the
    device for fragmentation.

    Args:
        layout: layout that determines the process groups.
        device_memory_gib: memory of one GPU.
    """
    groups = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size,
    )
    return 1.0 + 0.5 * sum(size > 1 for size in groups) + 0.03 * device_memory_gib


def stage_memory(
    architecture: ModelArchitecture,
    layout: Layout,
    *,
    seq_length: int,
    precision: str,
    backend: str = "te",
    trained: TrainedParts | None = None,
) -> tuple[MemoryEstimate, ...]:
    """Estimate the memory of one device of every pipeline stage during a training step.

    The assumptions follow Megatron-Core's defaults:
    - AdamW trains every weight, or only `trained`. Adapters are counted in full on every tensor parallel rank. A parameter takes 2 bytes
      (weight) + 4 bytes (float32 gradient) + 12 bytes (float32 master weight and two moments), in fp32 4 + 4 + 8 bytes. The distributed
      optimizer splits the master weights and moments over data *and* context parallel ranks, as in Megatron. The padding of its buffers is
      not counted.
    - FP8 keeps bf16 parameters and caches at least 2 more bytes per parameter of every layer matrix that uses FP8 (see _PRECISIONS). Linear
      layers keep their inputs in FP8, fp8_attention also keeps the tensors of attention in FP8, and all other tensors stay in bf16. The
      output layer never uses FP8.
    - activations.py lists the tensors that a layer keeps. Dropout is 0.
    - Tensor parallelism splits the tensors inside attention and MLP. It splits the other tensors only with sequence_parallel. Context
      parallelism splits every tensor by tokens.
    - In a pipeline, a stage keeps one more residual for every forward pass in flight: the output that it has sent to the next stage.
    - Without tensor parallelism, the logits take one tensor, which is overwritten by its gradient, and a float32 slice. Tensor parallelism
      splits the vocabulary. With the backend "torch", Megatron's loss then makes a float32 copy of bf16 logits. With "te", the loss of
      Transformer Engine (2.20) makes a copy in the precision of the logits. The rank whose part of the vocabulary includes padding makes
      one more copy, to mask the padding, with one byte of mask per logit.
    - The backward pass of a layer needs more memory than it frees meanwhile. The difference is a gradient of width 2 * ffn_hidden_size and
      two gradients of residuals. Full recomputation adds all recomputed tensors of the layer, and sequence_parallel adds one gathered
      residual.

    Args:
        architecture: sizes of the model.
        layout: how the model and its batch are split.
        seq_length: number of physical tokens of a sequence, over all context parallel ranks.
        precision: fp32, bf16, fp8 (with the first and the last layer in bf16), fp8_attention, fp8_blockwise or mxfp8.
        backend: "te" or "torch".
        trained: the trainable parameters; None if every weight is trained.
    Returns:
        One estimate per pipeline stage, in order.
    Raises:
        ConfigError: the precision, recompute_granularity or backend is unknown, or the number of layers is not a multiple of the number of
            model chunks.
    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4, with
        the terms of RMSNorm, grouped-query attention and SwiGLU; megatron-core 0.16 for schedules, optimizer and loss.
    """
    sizes = _sizes_of(precision)
    layer = _layer_bytes(architecture, layout, seq_length, sizes.element, backend)
    stages = range(layout.pipeline_model_parallel_size)
    return tuple(_one_stage(architecture, layout, stage, seq_length, sizes, layer, backend, trained) for stage in stages)


def _sizes_of(precision: str) -> _Precision:
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision.name={precision}: no memory estimate for it. Choose one of {', '.join(_PRECISIONS)}.")
    return _PRECISIONS[precision]


def _layer_bytes(
    architecture: ModelArchitecture, layout: Layout, seq_length: int, element: ElementBytes, backend: str
) -> tuple[float, float]:
    """Return the bytes of one layer for one micro-batch as (kept for the backward pass, recomputed in the backward pass)."""
    context, granularity = layout.context_parallel_size, layout.recompute_granularity
    kept = kept_by_layer(architecture, element, backend, granularity, context_parallel_size=context)
    recomputed = layer_tensors(architecture, element, backend, context_parallel_size=context)[1:] if granularity == "full" else ()
    of_kept, of_recomputed = (
        sum(saved.bytes_on_rank(layout, seq_length=seq_length) for saved in tensors) for tensors in (kept, recomputed)
    )
    return of_kept, of_recomputed


def _one_stage(
    architecture: ModelArchitecture,
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
    parameters = stage_parameters(architecture, layout, stage)
    layers_per_chunk = layout.layers_per_chunk(architecture.num_layers)
    layers = layers_per_chunk * layout.num_chunks
    adapters = trained.adapter_parameters_per_layer * layers if trained else 0
    trains = _trained_parameters(architecture, parameters, trained, layers, has_output, tensor) + adapters
    fp8_matrices = parameters.matrices - sizes.bf16_ends * ((stage == 0) + has_output) * parameters.one_layer_matrices
    weights = (parameters.total + adapters) * sizes.weight + max(0, fp8_matrices) * sizes.fp8_weight
    optimizer_split = layout.data_parallel_size * layout.context_parallel_size if layout.use_distributed_optimizer else 1

    kept, recomputed = layer
    tokens = layout.micro_batch_size * seq_length / layout.context_parallel_size
    residual = tokens * architecture.hidden_size * sizes.element.activation / layout.residual_split
    frequencies = SavedTensor("rotary angles", 4 * architecture.head_dim, POSITION).bytes_on_rank(layout, seq_length=seq_length)
    a_chunk = layers_per_chunk * kept + frequencies + residual * (last > 0)
    final_norm = (2 * residual + tokens * 4 / layout.residual_split) * has_output
    gathered = architecture.hidden_size if layout.sequence_parallel else 0
    gradients = tokens * sizes.element.activation * (2 * architecture.ffn_hidden_size / tensor + gathered) + 2 * residual
    return MemoryEstimate(
        weights_gib=weights / GIB,
        gradients_gib=trains * _GRADIENT_BYTES / GIB,
        optimizer_gib=trains * sizes.optimizer / optimizer_split / GIB,
        activations_gib=(layout.chunks_in_flight(stage) * a_chunk + final_norm) / GIB,
        logits_gib=has_output * _logit_bytes(architecture, tensor, tokens, sizes.element.activation, backend) / GIB,
        working_gib=(recomputed + gradients) / GIB,
        stage="only" if last == 0 else "first" if stage == 0 else "last" if has_output else str(stage + 1),
    )


def _trained_parameters(
    architecture: ModelArchitecture, parameters: StageParameters, trained: TrainedParts | None, layers: int, has_output: bool, tensor: int
) -> float:
    """Return the number of parameters with gradients, without adapters."""
    if trained is None:
        return parameters.total
    table = architecture.padded_vocab_size(tensor) * architecture.hidden_size / tensor
    embeddings = bool(parameters.embedding) or (has_output and architecture.tied_embeddings)
    norms = layers * architecture.norm_parameters_per_layer + parameters.final_norm
    return trained.embedding * embeddings * table + trained.norms * norms


def _logit_bytes(architecture: ModelArchitecture, tensor: int, tokens: float, element: float, backend: str) -> float:
    """Return the peak bytes of the logits and of their copies during the loss on one rank."""
    padded = architecture.padded_vocab_size(tensor)
    logits = tokens * padded / tensor
    if tensor == 1:
        return logits * element + min(logits, _LOSS_SLICE) * 4
    masked = element + 1 if padded > architecture.vocab_size else 0
    copy = element if backend == "te" else 4 if element < 4 else 0
    return logits * (element + masked + copy)


def estimate_memory(
    architecture: ModelArchitecture,
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
    """Estimate the memory of one device of the pipeline stage that needs the most. The arguments are those of Layout and stage_memory.

    Raises:
        ConfigError: see stage_memory.
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
    stages = stage_memory(architecture, layout, seq_length=seq_length, precision=precision, backend=backend, trained=trained)
    return max(stages, key=lambda estimate: estimate.total_gib)
