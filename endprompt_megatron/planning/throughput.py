"""How long a step should take on a known GPU: FLOPs over the peak and an utilization that the caller states. The utilization is an
assumption, so the result is one too; measured speeds live in recipes/results/."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape, forward_flops_per_token, training_flops_per_token


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU.

    Attributes:
        name: as used on the command line.
        peak_tflops: precision -> dense peak, 10^12 FLOP/s.
        memory_gib: memory that a program can allocate, as torch reports it (less than the round number in the name).
    """

    name: str
    peak_tflops: dict[str, float]
    memory_gib: float


# Peaks: NVIDIA's data sheets, tensor cores; where a sheet prints the 2:4-sparse figure, half of it. fp32 is left out: what it
# reaches depends on whether TF32 is allowed.
HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        # A100 data sheet, SXM 80 GB: BF16 312; no FP8 unit.
        Hardware("A100-80GB", {"bf16": 312.0}, 79.2),
        # H100 data sheet, SXM5: BF16 1,979 and FP8 3,958 sparse.
        Hardware("H100-80GB", {"bf16": 989.5, "fp8": 1979.0}, 79.1),
        # H200 data sheet, SXM: the H100's compute with 141 GB.
        Hardware("H200", {"bf16": 989.5, "fp8": 1979.0}, 139.7),
        # HGX B200 data sheet, per GPU at 1,000 W: BF16 4,500 and FP8 9,000 sparse. A GB200 is about 11 % faster.
        Hardware("B200", {"bf16": 2250.0, "fp8": 4500.0}, 178.3),
    )
}


def get_hardware(name: str) -> Hardware:
    """The GPU called `name`.

    Raises:
        ConfigError: not in the table; the message lists those that are.
    """
    if name not in HARDWARE:
        raise ConfigError(f"hardware={name}: not in the table. Choose one of {', '.join(sorted(HARDWARE))}.")
    return HARDWARE[name]


def pipeline_bubble_factor(
    pipeline_model_parallel_size: int, num_micro_batches: int, virtual_pipeline_model_parallel_size: int | None = None
) -> float:
    """Length of a 1F1B step over that of a step without idle stages: 1 + (PP - 1) / (micro-batches * chunks a stage)."""
    return 1 + (pipeline_model_parallel_size - 1) / (num_micro_batches * (virtual_pipeline_model_parallel_size or 1))


def estimate_step_seconds(
    shape: ModelShape,
    *,
    seq_length: int,
    global_batch_size: int,
    world_size: int,
    hardware: Hardware,
    precision: str,
    model_flops_utilization: float,
    num_micro_batches: int,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    recompute_granularity: str | None = None,
) -> float:
    """Seconds of one optimizer step, from an assumed utilization.

    Args:
        shape: of the model.
        seq_length: physical tokens of a sequence.
        global_batch_size: sequences a step.
        world_size: GPUs.
        hardware: of each GPU.
        precision: "bf16" or "fp8": which peak counts.
        model_flops_utilization: share of the peak reached while a stage is busy, in (0, 1]. It holds communication and memory
            traffic; the pipeline bubble and recomputation come on top, because the layout decides them.
        num_micro_batches: micro-batches a rank accumulates a step.
        pipeline_model_parallel_size, virtual_pipeline_model_parallel_size: for the bubble.
        recompute_granularity: "full" runs the forward pass twice; anything else is taken as free.
    Returns:
        Seconds a step.
    Raises:
        ConfigError: utilization out of range, or no peak known for this precision.
    """
    if not 0 < model_flops_utilization <= 1:
        raise ConfigError(
            f"model_flops_utilization={model_flops_utilization}: must be above 0 and at most 1. 0.4 is a common value."
        )
    if precision not in hardware.peak_tflops:
        raise ConfigError(
            f"precision.name={precision}: no peak is known for it on {hardware.name}. Choose one of {', '.join(hardware.peak_tflops)}."
        )
    flops_per_token = training_flops_per_token(shape, seq_length)
    if recompute_granularity == "full":
        flops_per_token += forward_flops_per_token(shape, seq_length)
    flops_per_gpu = flops_per_token * seq_length * global_batch_size / world_size
    busy_seconds = flops_per_gpu / (hardware.peak_tflops[precision] * 1e12 * model_flops_utilization)
    return busy_seconds * pipeline_bubble_factor(
        pipeline_model_parallel_size, num_micro_batches, virtual_pipeline_model_parallel_size
    )
