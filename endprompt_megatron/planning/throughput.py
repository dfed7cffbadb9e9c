"""How long a step should take on a known GPU: matrix products and attention at rates that published runs reached, recomputation, the
pipeline bubble, communication that nothing hides. An estimate; measured speeds live in benchmarks/."""

from __future__ import annotations

from dataclasses import dataclass, fields

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import (
    ModelShape,
    layer_attention_flops_per_token,
    layer_matrix_flops_per_token,
    output_flops_per_token,
)
from endprompt_megatron.planning.layout import Layout, stage_parameters

GPUS_PER_NODE = 8
# Share of a link's data-sheet bandwidth that large collectives reach, and of the memory's that the optimizer reaches: an assumption.
LINK_SHARE = 0.8
# From the start of a message to that of the work that waits for it, an assumption: what makes many small pieces slow.
MESSAGE_SECONDS = 20e-6
BF16_BYTES, FLOAT32_BYTES = 2, 4
# Bytes that AdamW moves a parameter: gradient, master and two moments read, the latter three and the bf16 weight written.
_OPTIMIZER_BYTES = 4 + 12 + 12 + 2
_CLEAR_AND_NORM_BYTES = 8  # the gradient buffer is zeroed once and read once for its norm


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in a node of eight.

    Attributes:
        name: as used on the command line.
        peak_tflops: kind of number -> dense peak, 10^12 FLOP/s.
        memory_gib: memory that a program can allocate, as torch reports it (less than the round number in the name).
        memory_gbytes_per_second: of the device memory, 10^9.
        nvlink_gbytes_per_second: to the other GPUs of the node, one direction, 10^9.
        network_gbytes_per_second: of a GPU's own network card, one direction, 10^9.
        matmul_share: kind of number -> share of the peak that matrix products of layers reach.
        output_share: share of the bf16 peak that the output layer with the loss reaches: one large product.
        attention_share: kind of number -> share of the peak that flash attention reaches, forward and backward together.
    """

    name: str
    peak_tflops: dict[str, float]
    memory_gib: float
    memory_gbytes_per_second: float
    nvlink_gbytes_per_second: float
    network_gbytes_per_second: float
    matmul_share: dict[str, float]
    output_share: float
    attention_share: dict[str, float]


# Peaks, memory and NVLink: NVIDIA's data sheets, tensor cores; where a sheet prints the 2:4-sparse figure, half of it. fp32 is left out:
# what it reaches depends on whether TF32 is allowed. Network: one ConnectX card a GPU as in DGX systems (A100: 200 Gb/s, others 400).
#
# matmul_share is calibrated, so that the whole model reproduces a published speed of Llama-3 8B at 8K tokens on that GPU:
#   H100 fp8: 14,451 tokens/s/GPU (NVIDIA, Megatron-Bridge performance summary, 25.11, DGX-H100, FP8-CS, 8 GPUs)
#   B200 fp8: 30,624 (the same table, DGX-B200)
#   A100 bf16: 2,973 (torchtitan, docs/performance.md, 64 A100, selective op recomputation)
#   H100 bf16: no such figure was found for Megatron-Core; 0.46 makes a whole step reach 45 % of the peak, within the 41 to 48 % that
#     Megatron-LM's README reports for bf16 on H100; B200 bf16 is taken as the H100's.
# attention_share: FlashAttention-3 (arXiv 2407.08608) reaches up to 648 TFLOP/s forward and less backward at head size 128, causal, on an
# H100; 0.55 of the bf16 peak stands for both; FP8's 0.35 and all of B200's are assumptions. A100: FlashAttention-2 (arXiv 2307.08691).
# output_share is an assumption. tests/unit/planning/test_throughput.py compares with what was published and not calibrated on.
_AMPERE = ({"bf16": 0.50}, 0.65, {"bf16": 0.60})
_HOPPER = ({"bf16": 0.46, "fp8": 0.59}, 0.60, {"bf16": 0.55, "fp8": 0.35})
_BLACKWELL = ({"bf16": 0.46, "fp8": 0.51}, 0.60, {"bf16": 0.55, "fp8": 0.35})
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("A100-80GB", {"bf16": 312.0}, 79.2, 2039, 300, 25, *_AMPERE),
        Hardware("A800-80GB", {"bf16": 312.0}, 79.2, 2039, 200, 25, *_AMPERE),  # the A100 with NVLink cut to 400 GB/s both ways
        Hardware("H100-80GB", {"bf16": 989.5, "fp8": 1979.0}, 79.1, 3350, 450, 50, *_HOPPER),  # SXM5: 1,979 and 3,958 sparse
        Hardware("H200", {"bf16": 989.5, "fp8": 1979.0}, 139.7, 4800, 450, 50, *_HOPPER),  # the H100's compute with 141 GB
        # HGX, per GPU at 1,000 W: BF16 4,500 and FP8 9,000 sparse. A GB200 is about 11 % faster.
        Hardware("B200", {"bf16": 2250.0, "fp8": 4500.0}, 178.3, 7700, 900, 50, *_BLACKWELL),
    )
}

# precision -> kind of number of matrix products, of attention, slowdown of the products, layers at each end that stay bf16.
# MXFP8 is calibrated on 29,521 tokens/s (Llama-3 8B, DGX-B200, the same table); blockwise scaling is taken to be as slow.
_KINDS = {
    "bf16": ("bf16", "bf16", 1.0, 0),
    "fp8": ("fp8", "bf16", 1.0, 1),
    "fp8_attention": ("fp8", "fp8", 1.0, 0),
    "fp8_blockwise": ("fp8", "bf16", 1.13, 0),
    "mxfp8": ("fp8", "bf16", 1.13, 0),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go into.

    Attributes:
        matmul: matrix products of the slowest stage.
        attention: attention of a stage.
        elementwise: norms, rotary embedding, residuals, SwiGLU and FP8 conversions, at the speed of the memory.
        recompute: what full or selective recomputation does again.
        bubble: idle while the pipeline fills and drains.
        tensor_parallel: collectives inside layers.
        context_parallel: keys and values round the ring, where attention does not hide them, and every start of a message.
        pipeline: activations between stages; in the interleaved schedule only their starts.
        data_parallel: gradients and weights, beyond what the last backward and the first forward pass hide.
        optimizer: AdamW and the gradient norm, at the speed of the memory.
    """

    matmul: float
    attention: float
    elementwise: float
    recompute: float
    bubble: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def get_hardware(name: str) -> Hardware:
    """The GPU called `name`.

    Raises:
        ConfigError: not in the table; the message lists those that are.
    """
    if name not in HARDWARE:
        raise ConfigError(f"hardware={name}: not in the table. Choose one of {', '.join(sorted(HARDWARE))}.")
    return HARDWARE[name]


def has_speed(hardware: Hardware, precision: str) -> bool:
    """Whether the table knows how fast this GPU is in this precision (MXFP8: Blackwell alone)."""
    if precision == "mxfp8" and hardware.name != "B200":
        return False
    return precision in _KINDS and _KINDS[precision][0] in hardware.peak_tflops


def kinds_of_numbers(precision: str) -> tuple[str, str]:
    """What matrix products and what attention are computed in, as the tables of `Hardware` name it; precision as step_time."""
    return _KINDS[precision][:2]


def pipeline_bubble_factor(
    pipeline_model_parallel_size: int, num_micro_batches: int, virtual_pipeline_model_parallel_size: int | None = None
) -> float:
    """Length of a 1F1B step over that of a step without idle stages: 1 + (PP - 1) / (micro-batches * chunks a stage)."""
    return 1 + (pipeline_model_parallel_size - 1) / (num_micro_batches * (virtual_pipeline_model_parallel_size or 1))


def group_gbytes_per_second(hardware: Hardware, *, stride: int, size: int, gpus_per_node: int = GPUS_PER_NODE) -> float:
    """Bandwidth of one GPU in a collective, 10^9 bytes a second in one direction.

    A group within a node has NVLink. One that spans nodes has the network cards of its members in a node together, because rings go
    through all of them, but never more than NVLink.

    Args:
        hardware: of each GPU.
        stride: distance of neighbouring ranks of the group.
        size: ranks of the group.
        gpus_per_node: of the cluster.
    """
    if stride * size <= gpus_per_node:
        return LINK_SHARE * hardware.nvlink_gbytes_per_second
    members = max(1, gpus_per_node // stride)
    return LINK_SHARE * min(hardware.nvlink_gbytes_per_second, members * hardware.network_gbytes_per_second)


def step_time(
    shape: ModelShape,
    layout: Layout,
    *,
    seq_length: int,
    hardware: Hardware,
    precision: str,
    gpus_per_node: int = GPUS_PER_NODE,
) -> StepTime:
    """Time of one optimizer step.

    Assumptions: backward costs twice forward; the slowest stage (the one with the output layer) sets the pace and the mean stage the
    bubble; ranks are ordered TP, CP, DP, PP from the inside, as Megatron orders them. Tensor parallelism exposes four collectives a layer
    forward, as many in full recomputation, and two backward, where the others run beside gradients of weights. Gradients travel in
    float32 during the last backward pass, weights in bf16 during the first forward pass (both overlap flags on). Excluded: the first step's
    compilation and allocation, data loading, checkpoints, the starts of small kernels, slow nodes and congestion.

    Args:
        shape: of the model.
        layout: how it and its batch are cut.
        seq_length: physical tokens of a sequence.
        hardware: of each GPU.
        precision: bf16, fp8, fp8_attention, fp8_blockwise or mxfp8.
        gpus_per_node: of the cluster.
    Raises:
        ConfigError: the table has no speed for this precision on this GPU, or the layers do not divide.
    """
    if not has_speed(hardware, precision):
        known = ", ".join(name for name in _KINDS if has_speed(hardware, name))
        raise ConfigError(f"precision.name={precision}: no speed is known for it on {hardware.name}. Choose one of {known}.")
    tensor, pipeline, context = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    layers, micro_batches = layout.layers_per_chunk(shape.num_layers) * layout.num_chunks, layout.num_micro_batches
    tokens = layout.micro_batch_size * seq_length / context
    matmul_kind, attention_kind, slowdown, bf16_ends = _KINDS[precision]

    def rate(kind: str, shares: dict[str, float]) -> float:
        """FLOP/s of one GPU."""
        return hardware.peak_tflops[kind] * 1e12 * shares[kind]

    # forward passes of one micro-batch on one rank
    products = tokens * layer_matrix_flops_per_token(shape) / tensor
    in_bf16 = products / rate("bf16", hardware.matmul_share)
    in_kind = products * slowdown / rate(matmul_kind, hardware.matmul_share)
    mean_layer = in_kind + 2 * bf16_ends / shape.num_layers * (in_bf16 - in_kind)
    output = tokens * output_flops_per_token(shape) / tensor / (hardware.peak_tflops["bf16"] * 1e12 * hardware.output_share)
    attention = tokens * layer_attention_flops_per_token(shape, seq_length) / tensor / rate(attention_kind, hardware.attention_share)
    between = tokens * _elementwise_bytes_per_token(shape, layout, matmul_kind) / (LINK_SHARE * hardware.memory_gbytes_per_second * 1e9)
    again = {"full": mean_layer + attention + between, "selective": attention}.get(layout.recompute_granularity or "", 0.0)

    forward = layers * (mean_layer + attention + between)
    backward = 2 * forward + layers * again
    bubble_passes = pipeline_bubble_factor(pipeline, micro_batches, layout.virtual_pipeline_model_parallel_size) - 1
    bubble = micro_batches * bubble_passes * (forward + backward + 3 * output / pipeline)

    residual_bytes = tokens * shape.hidden_size * BF16_BYTES
    tensor_seconds = 0.0
    if tensor > 1:
        collectives = 6 + 4 * (layout.recompute_granularity == "full")
        speed = group_gbytes_per_second(hardware, stride=1, size=tensor, gpus_per_node=gpus_per_node) * 1e9
        tensor_seconds = layers * collectives * (residual_bytes * (tensor - 1) / tensor / speed + MESSAGE_SECONDS)
    return StepTime(
        matmul=micro_batches * 3 * (layers * mean_layer + output),
        attention=micro_batches * 3 * layers * attention,
        elementwise=micro_batches * 3 * layers * between,
        recompute=micro_batches * layers * again,
        bubble=bubble,
        tensor_parallel=micro_batches * (1 + bubble_passes) * tensor_seconds,
        context_parallel=micro_batches * layers * _ring_seconds(shape, layout, tokens, attention, hardware, gpus_per_node),
        pipeline=micro_batches * _between_stages_seconds(layout, residual_bytes, hardware, gpus_per_node),
        data_parallel=_data_parallel_seconds(shape, layout, forward, backward, hardware, gpus_per_node),
        optimizer=_optimizer_seconds(shape, layout, hardware),
    )


def _elementwise_bytes_per_token(shape: ModelShape, layout: Layout, matmul_kind: str) -> float:
    """What one layer's kernels between the products read and write for a token, forward: two norms and two residual sums (5 passes over
    the residual each), the rotary embedding (2 over query and key), SwiGLU (3 over ffn_hidden_size), in bf16. FP8 with current scales reads
    every input of a product twice and writes two orders of it."""
    hidden, ffn = shape.hidden_size / layout.residual_split, shape.ffn_hidden_size / layout.tensor_model_parallel_size
    query = shape.query_size / layout.tensor_model_parallel_size
    key = shape.key_value_size / 2 / layout.tensor_model_parallel_size
    moved = BF16_BYTES * (2 * 5 * hidden + 2 * (query + key) + 3 * ffn)
    if matmul_kind == "fp8":
        moved += (2 * BF16_BYTES + 2) * (2 * hidden + query + ffn)
    return moved


def _ring_seconds(shape: ModelShape, layout: Layout, tokens: float, attention: float, hardware: Hardware, gpus_per_node: int) -> float:
    """Of one layer and micro-batch: what attention does not hide. Backward moves keys and values and their gradients."""
    context, tensor = layout.context_parallel_size, layout.tensor_model_parallel_size
    if context == 1:
        return 0.0
    speed = group_gbytes_per_second(hardware, stride=tensor, size=context, gpus_per_node=gpus_per_node) * 1e9
    around = (context - 1) * tokens * shape.key_value_size * BF16_BYTES / tensor / speed
    messages = 3 * (context - 1) * MESSAGE_SECONDS
    return max(0.0, around - attention) + max(0.0, 2 * around - 2 * attention) + messages


def _between_stages_seconds(layout: Layout, residual_bytes: float, hardware: Hardware, gpus_per_node: int) -> float:
    """Of one micro-batch: an activation one way, its gradient the other; the interleaved schedule sends both beside its work, but more
    often."""
    if layout.pipeline_model_parallel_size == 1:
        return 0.0
    messages = 2 * layout.num_chunks * MESSAGE_SECONDS
    if layout.num_chunks > 1:
        return messages
    stride = layout.world_size // layout.pipeline_model_parallel_size
    same_node = stride * 2 <= gpus_per_node
    speed = LINK_SHARE * (hardware.nvlink_gbytes_per_second if same_node else hardware.network_gbytes_per_second) * 1e9
    return 2 * residual_bytes / layout.residual_split / speed + messages


def _data_parallel_seconds(
    shape: ModelShape, layout: Layout, forward: float, backward: float, hardware: Hardware, gpus_per_node: int
) -> float:
    ranks = layout.data_parallel_size * layout.context_parallel_size
    if ranks == 1:
        return 0.0
    stride = layout.tensor_model_parallel_size
    speed = group_gbytes_per_second(hardware, stride=stride, size=ranks, gpus_per_node=gpus_per_node) * 1e9
    passed_on = stage_parameters(shape, layout, 0).total * (ranks - 1) / ranks / speed
    gradients = passed_on * FLOAT32_BYTES * (1 if layout.use_distributed_optimizer else 2)
    weights = passed_on * BF16_BYTES * layout.use_distributed_optimizer
    return max(0.0, gradients - backward) + max(0.0, weights - forward)


def _optimizer_seconds(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    parameters = stage_parameters(shape, layout, 0).total
    ranks = layout.data_parallel_size * layout.context_parallel_size if layout.use_distributed_optimizer else 1
    moved = parameters / ranks * _OPTIMIZER_BYTES + parameters * _CLEAR_AND_NORM_BYTES
    return moved / (LINK_SHARE * hardware.memory_gbytes_per_second * 1e9)
