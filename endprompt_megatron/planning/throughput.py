"""Estimate the time of an optimizer step on a known GPU. The estimate adds up matrix products and attention at rates that published runs
reached, elementwise kernels, recomputation, the pipeline bubble, exposed communication and the optimizer. Measured speeds are in
benchmarks/."""

from __future__ import annotations

from dataclasses import dataclass, fields

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.flops import (
    layer_attention_flops_per_token,
    layer_matrix_flops_per_token,
    output_flops_per_token,
)
from endprompt_megatron.planning.layout import Layout, stage_parameters

GPUS_PER_NODE = 8
# Assumed share of the data-sheet bandwidth that large collectives reach on a link, and that the optimizer and elementwise kernels reach on
# device memory.
LINK_SHARE = 0.8
# Assumed latency of a message. Latency dominates if a transfer is split into many small messages.
MESSAGE_SECONDS = 20e-6
BF16_BYTES, FLOAT32_BYTES = 2, 4
# Bytes that AdamW moves per parameter: it reads gradient, master weight and two moments, and writes master weight, moments and bf16 weight.
_OPTIMIZER_BYTES = 4 + 12 + 12 + 2
_CLEAR_AND_NORM_BYTES = 8  # per parameter; the gradient buffer is zeroed once and read once for the gradient norm


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in a node of eight.

    Attributes:
        name: value of launch.gpu and plan.hardware.
        peak_tflops: {number format: dense peak in 10^12 FLOP/s}.
        memory_gib: memory that a program can allocate, as torch reports it. The number is less than the GB on the data sheet.
        memory_gbytes_per_second: bandwidth of the device memory, in 10^9 bytes per second.
        nvlink_gbytes_per_second: bandwidth to the other GPUs of the node in one direction, in 10^9 bytes per second.
        network_gbytes_per_second: bandwidth of the GPU's own network card in one direction, in 10^9 bytes per second.
        matmul_share: {number format: share of the peak that the matrix products of layers reach}.
        output_share: share of the bf16 peak that the output layer and the loss reach (one large product).
        attention_share: {number format: share of the peak that flash attention reaches, forward and backward together}.
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


# Peaks (tensor cores), memory bandwidth and NVLink are from NVIDIA's data sheets. If a sheet gives only the peak with 2:4 sparsity, the
# table contains half of it. fp32 has no entry, because its speed depends on whether TF32 is allowed. The network has one ConnectX card per
# GPU, as in DGX systems (200 Gb/s for A100 and A800, 400 Gb/s for the others).
#
# matmul_share is calibrated so that the estimate reproduces a published speed of Llama-3 8B at 8K tokens on that GPU:
#   H100 fp8: 14,451 tokens/s/GPU (NVIDIA, Megatron-Bridge performance summary, 25.11, DGX-H100, FP8-CS, 8 GPUs)
#   B200 fp8: 30,624 (the same table, DGX-B200)
#   A100 bf16: 2,973 (torchtitan, docs/performance.md, 64 A100, selective op recomputation)
#   H100 bf16: no such figure was found for Megatron-Core; with 0.46 a whole step reaches 45 % of the peak, within the 41 to 48 % that
#     Megatron-LM's README reports for bf16 on H100. B200 bf16 uses the value of the H100.
# attention_share: on an H100 with causal attention and head size 128, FlashAttention-3 (arXiv 2407.08608) reaches up to 648 TFLOP/s in the
# forward pass and less in the backward pass. The table uses 0.55 of the bf16 peak for both passes together. The value for A100 is from
# FlashAttention-2 (arXiv 2307.08691). The value 0.35 for FP8 and all values for B200 are assumptions, and so is output_share.
# tests/unit/planning/test_throughput.py compares the estimate with published speeds that were not used for calibration.
_AMPERE = ({"bf16": 0.50}, 0.65, {"bf16": 0.60})
_HOPPER = ({"bf16": 0.46, "fp8": 0.59}, 0.60, {"bf16": 0.55, "fp8": 0.35})
_BLACKWELL = ({"bf16": 0.46, "fp8": 0.51}, 0.60, {"bf16": 0.55, "fp8": 0.35})
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("A100-80GB", {"bf16": 312.0}, 79.2, 2039, 300, 25, *_AMPERE),
        # The A800 is an A100 whose NVLink is limited to 400 GB/s in both directions together.
        Hardware("A800-80GB", {"bf16": 312.0}, 79.2, 2039, 200, 25, *_AMPERE),
        # SXM5. The data sheet gives 1,979 (BF16) and 3,958 (FP8) with sparsity.
        Hardware("H100-80GB", {"bf16": 989.5, "fp8": 1979.0}, 79.1, 3350, 450, 50, *_HOPPER),
        # The H200 has the compute of the H100 and 141 GB.
        Hardware("H200", {"bf16": 989.5, "fp8": 1979.0}, 139.7, 4800, 450, 50, *_HOPPER),
        # HGX, per GPU at 1,000 W. The data sheet gives 4,500 (BF16) and 9,000 (FP8) with sparsity. A GB200 is about 11 % faster.
        Hardware("B200", {"bf16": 2250.0, "fp8": 4500.0}, 178.3, 7700, 900, 50, *_BLACKWELL),
    )
}

# {precision: (number format of matrix products, number format of attention, slowdown of matrix products, number of layers at each end of
# the model that stay in bf16)}. MXFP8 is calibrated on 29,521 tokens/s (Llama-3 8B, DGX-B200, NVIDIA's table cited above). Blockwise
# scaling is assumed to have the same slowdown.
_KINDS = {
    "bf16": ("bf16", "bf16", 1.0, 0),
    "fp8": ("fp8", "bf16", 1.0, 1),
    "fp8_attention": ("fp8", "fp8", 1.0, 0),
    "fp8_blockwise": ("fp8", "bf16", 1.13, 0),
    "mxfp8": ("fp8", "bf16", 1.13, 0),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by component.

    Attributes:
        matmul: matrix products of the slowest pipeline stage.
        attention: attention of a pipeline stage.
        elementwise: norms, rotary embedding, residuals, SwiGLU and FP8 conversions, limited by memory bandwidth.
        recompute: work repeated by full or selective recomputation.
        bubble: idle time while the pipeline fills and drains.
        tensor_parallel: collectives inside layers.
        context_parallel: ring exchange of keys and values that attention does not hide, and the latency of every message.
        pipeline: transfer of activations between stages; with the interleaved schedule, only its latency.
        data_parallel: communication of gradients and weights that the last backward and the first forward pass do not hide.
        optimizer: AdamW and the gradient norm, limited by memory bandwidth.
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
        """Sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


def get_hardware(name: str) -> Hardware:
    """Return the entry of HARDWARE with this name.

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
    """
    if name not in HARDWARE:
        raise ConfigError(f"hardware={name}: not in the table. Choose one of {', '.join(sorted(HARDWARE))}.")
    return HARDWARE[name]


def has_speed(hardware: Hardware, precision: str) -> bool:
    """Return whether the table has a speed for this GPU in this precision. MXFP8 has a speed only on Blackwell."""
    if precision == "mxfp8" and hardware.name != "B200":
        return False
    return precision in _KINDS and _KINDS[precision][0] in hardware.peak_tflops


def kinds_of_numbers(precision: str) -> tuple[str, str]:
    """Return (number format of matrix products, number format of attention) as keys of the tables in `Hardware`. `precision` has the same
    values as in step_time."""
    return _KINDS[precision][:2]


def pipeline_bubble_factor(
    pipeline_model_parallel_size: int, num_micro_batches: int, virtual_pipeline_model_parallel_size: int | None = None
) -> float:
    """Return the ratio of the time of a 1F1B step to the time without idle stages: 1 + (PP - 1) / (micro-batches * chunks per stage)."""
    return 1 + (pipeline_model_parallel_size - 1) / (num_micro_batches * (virtual_pipeline_model_parallel_size or 1))


def group_gbytes_per_second(hardware: Hardware, *, stride: int, size: int, gpus_per_node: int = GPUS_PER_NODE) -> float:
    """Return the bandwidth of one GPU in a collective, in 10^9 bytes per second in one direction.

    A group within a node uses NVLink. In a group that spans nodes, rings run through the network cards of all members in a node, so their
    bandwidths add up, to at most the bandwidth of NVLink.

    Args:
        hardware: the kind of GPU.
        stride: distance between neighbouring ranks of the group.
        size: number of ranks in the group.
        gpus_per_node: number of GPUs in one node.
    """
    if stride * size <= gpus_per_node:
        return LINK_SHARE * hardware.nvlink_gbytes_per_second
    members = max(1, gpus_per_node // stride)
    return LINK_SHARE * min(hardware.nvlink_gbytes_per_second, members * hardware.network_gbytes_per_second)


def step_time(
    architecture: ModelArchitecture,
    layout: Layout,
    *,
    seq_length: int,
    hardware: Hardware,
    precision: str,
    gpus_per_node: int = GPUS_PER_NODE,
) -> StepTime:
    """Estimate the time of one optimizer step.

    The estimate assumes that the backward pass takes twice as long as the forward pass. The slowest pipeline stage, which has the output
    layer, determines the time of a micro-batch, and the mean stage determines the bubble. Ranks are ordered TP, CP, DP, PP with TP
    innermost, as in Megatron. Tensor parallelism exposes four collectives per layer in the forward pass, four in full recomputation and two
    in the backward pass; the other collectives of the backward pass overlap with weight gradients. Gradients are reduced in float32 during
    the last backward pass, and weights are gathered in bf16 during the first forward pass (both overlap flags are on). The estimate does
    not include compilation and allocation in the first step, data loading, checkpoints, launch times of small kernels, slow nodes and
    congestion.

    Args:
        architecture: sizes of the model.
        layout: how the model and its batch are split.
        seq_length: number of physical tokens of a sequence.
        hardware: the kind of GPU.
        precision: bf16, fp8, fp8_attention, fp8_blockwise or mxfp8.
        gpus_per_node: number of GPUs in one node.
    Raises:
        ConfigError: the table has no speed for this precision on this GPU, or the number of layers is not a multiple of the number of model
            chunks.
    """
    if not has_speed(hardware, precision):
        known = ", ".join(name for name in _KINDS if has_speed(hardware, name))
        raise ConfigError(f"precision.name={precision}: the table has no speed for it on {hardware.name}. Choose one of {known}.")
    tensor, pipeline, context = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    layers, micro_batches = layout.layers_per_chunk(architecture.num_layers) * layout.num_chunks, layout.num_micro_batches
    tokens = layout.micro_batch_size * seq_length / context
    matmul_kind, attention_kind, slowdown, bf16_ends = _KINDS[precision]

    def rate(kind: str, shares: dict[str, float]) -> float:
        """Return the FLOP/s of one GPU."""
        return hardware.peak_tflops[kind] * 1e12 * shares[kind]

    # Forward pass of one micro-batch on one rank: `products` in FLOPs, the times in seconds. All but `output` are per layer.
    products = tokens * layer_matrix_flops_per_token(architecture) / tensor
    in_bf16 = products / rate("bf16", hardware.matmul_share)
    in_kind = products * slowdown / rate(matmul_kind, hardware.matmul_share)
    mean_layer = in_kind + 2 * bf16_ends / architecture.num_layers * (in_bf16 - in_kind)
    output = tokens * output_flops_per_token(architecture) / tensor / (hardware.peak_tflops["bf16"] * 1e12 * hardware.output_share)
    attention = tokens * layer_attention_flops_per_token(architecture, seq_length) / tensor / rate(attention_kind, hardware.attention_share)
    between = (
        tokens * _elementwise_bytes_per_token(architecture, layout, matmul_kind) / (LINK_SHARE * hardware.memory_gbytes_per_second * 1e9)
    )
    again = {"full": mean_layer + attention + between, "selective": attention}.get(layout.recompute_granularity or "", 0.0)

    forward = layers * (mean_layer + attention + between)
    backward = 2 * forward + layers * again
    bubble_passes = pipeline_bubble_factor(pipeline, micro_batches, layout.virtual_pipeline_model_parallel_size) - 1
    bubble = micro_batches * bubble_passes * (forward + backward + 3 * output / pipeline)

    residual_bytes = tokens * architecture.hidden_size * BF16_BYTES
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
        context_parallel=micro_batches * layers * _ring_seconds(architecture, layout, tokens, attention, hardware, gpus_per_node),
        pipeline=micro_batches * _between_stages_seconds(layout, residual_bytes, hardware, gpus_per_node),
        data_parallel=_data_parallel_seconds(architecture, layout, forward, backward, hardware, gpus_per_node),
        optimizer=_optimizer_seconds(architecture, layout, hardware),
    )


def _elementwise_bytes_per_token(architecture: ModelArchitecture, layout: Layout, matmul_kind: str) -> float:
    """Return the bytes that the elementwise kernels of one layer read and write per token in the forward pass, with tensors in bf16. Each
    of the two norms, together with its residual sum, reads or writes a tensor as large as the residual 5 times. The rotary embedding reads
    and writes query and key once each, and SwiGLU reads two tensors of width ffn_hidden_size and writes one. FP8 reads every input of a
    product twice and writes it in two layouts, as with current scaling."""
    hidden, ffn = architecture.hidden_size / layout.residual_split, architecture.ffn_hidden_size / layout.tensor_model_parallel_size
    query = architecture.query_size / layout.tensor_model_parallel_size
    key = architecture.key_value_size / 2 / layout.tensor_model_parallel_size
    moved = BF16_BYTES * (2 * 5 * hidden + 2 * (query + key) + 3 * ffn)
    if matmul_kind == "fp8":
        moved += (2 * BF16_BYTES + 2) * (2 * hidden + query + ffn)
    return moved


def _ring_seconds(
    architecture: ModelArchitecture, layout: Layout, tokens: float, attention: float, hardware: Hardware, gpus_per_node: int
) -> float:
    """Return the exposed time of the ring exchange for one layer and micro-batch. The backward pass sends keys, values and their
    gradients."""
    context, tensor = layout.context_parallel_size, layout.tensor_model_parallel_size
    if context == 1:
        return 0.0
    speed = group_gbytes_per_second(hardware, stride=tensor, size=context, gpus_per_node=gpus_per_node) * 1e9
    around = (context - 1) * tokens * architecture.key_value_size * BF16_BYTES / tensor / speed
    messages = 3 * (context - 1) * MESSAGE_SECONDS
    return max(0.0, around - attention) + max(0.0, 2 * around - 2 * attention) + messages


def _between_stages_seconds(layout: Layout, residual_bytes: float, hardware: Hardware, gpus_per_node: int) -> float:
    """Return the transfer time between two stages for one micro-batch, which sends an activation forward and its gradient back. The
    interleaved schedule hides both transfers but sends more messages."""
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
    architecture: ModelArchitecture, layout: Layout, forward: float, backward: float, hardware: Hardware, gpus_per_node: int
) -> float:
    ranks = layout.data_parallel_size * layout.context_parallel_size
    if ranks == 1:
        return 0.0
    stride = layout.tensor_model_parallel_size
    speed = group_gbytes_per_second(hardware, stride=stride, size=ranks, gpus_per_node=gpus_per_node) * 1e9
    passed_on = stage_parameters(architecture, layout, 0).total * (ranks - 1) / ranks / speed
    gradients = passed_on * FLOAT32_BYTES * (1 if layout.use_distributed_optimizer else 2)
    weights = passed_on * BF16_BYTES * layout.use_distributed_optimizer
    return max(0.0, gradients - backward) + max(0.0, weights - forward)


def _optimizer_seconds(architecture: ModelArchitecture, layout: Layout, hardware: Hardware) -> float:
    parameters = stage_parameters(architecture, layout, 0).total
    ranks = layout.data_parallel_size * layout.context_parallel_size if layout.use_distributed_optimizer else 1
    moved = parameters / ranks * _OPTIMIZER_BYTES + parameters * _CLEAR_AND_NORM_BYTES
    return moved / (LINK_SHARE * hardware.memory_gbytes_per_second * 1e9)
