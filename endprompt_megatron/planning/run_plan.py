"""The plan of a run, which `dry_run=true` prints before anything is launched. Numbers that rest on assumptions are marked."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.flops import count_parameters, training_flops_per_token
from endprompt_megatron.planning.layout import Layout
from endprompt_megatron.planning.memory import MemoryEstimate, TrainedParts, reserve_gib, stage_memory
from endprompt_megatron.planning.throughput import GPUS_PER_NODE, StepTime, get_hardware, has_speed, step_time


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The inputs of a plan.

    Attributes:
        experiment: name of the run.
        architecture: sizes of the model.
        world_size: number of ranks.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: sizes of the layout. Data parallelism uses the
            remaining ranks.
        virtual_pipeline_model_parallel_size: number of model chunks per stage of the interleaved schedule; None without interleaving.
        sequence_parallel, use_distributed_optimizer, recompute_granularity: as in conf/parallel.
        precision: fp32, bf16, fp8, fp8_attention, fp8_blockwise or mxfp8.
        backend: te or torch; determines the activations of a layer.
        micro_batch_size, global_batch_size: batch sizes in sequences.
        max_steps: number of optimizer steps.
        seq_length: S, number of physical tokens of a sample.
        num_prompt_tokens: b, number of tokens of the end prompt in a sample; 0 for schemes without an end prompt, None if the tokenizer is
            not available.
        target_context_length: L, number of positions of the extended window.
        original_context_length: native window, in positions.
        position_scheme: name of the position scheme.
        rope_type, rope_factor: type and factor of the RoPE scaling.
        hardware: kind of GPU, a name in throughput.HARDWARE; None for a CPU or an unknown GPU, for which no time is estimated.
        device_memory_gib: memory of one rank; None uses the memory of `hardware`. If both are None, the memory estimate is not compared
            with the memory of a device.
        gpus_per_node: number of ranks that share NVLink.
        trained: the trainable parameters; None if every weight is trained. FLOPs and time always assume that every weight is trained.
    """

    experiment: str
    architecture: ModelArchitecture
    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute_granularity: str | None = None
    precision: str = "bf16"
    backend: str = "te"
    micro_batch_size: int
    global_batch_size: int
    max_steps: int
    seq_length: int
    num_prompt_tokens: int | None
    target_context_length: int
    original_context_length: int
    position_scheme: str = "endprompt"
    rope_type: str = "pi"
    rope_factor: float = 1.0
    hardware: str | None = None
    device_memory_gib: float | None = None
    gpus_per_node: int = GPUS_PER_NODE
    trained: TrainedParts | None = None

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that process one sample together, TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Number of data parallel ranks."""
        return self.world_size // self.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches that a rank accumulates per step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Number of physical tokens in one optimizer step over all ranks."""
        return self.seq_length * self.global_batch_size

    @property
    def layout(self) -> Layout:
        """The layout with its batch."""
        return Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            data_parallel_size=self.data_parallel_size,
            sequence_parallel=self.sequence_parallel,
            use_distributed_optimizer=self.use_distributed_optimizer,
            recompute_granularity=self.recompute_granularity,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
        )


def describe_plan(request: PlanRequest) -> list[str]:
    """Return the plan as a list of lines.

    Args:
        request: the inputs of the plan.
    Returns:
        Lines without line breaks.
    Raises:
        ConfigError: the layout does not divide the world size or the global batch, or the hardware is unknown; see also stage_memory.
    """
    if request.world_size % request.model_parallel_size:
        raise ConfigError(
            f"world size {request.world_size}: must be a multiple of TP x PP x CP = {request.model_parallel_size}. "
            f"Start that many processes, or set smaller sizes."
        )
    sequences = request.micro_batch_size * request.data_parallel_size
    if request.global_batch_size < 1 or request.global_batch_size % sequences:
        raise ConfigError(
            f"trainer.global_batch_size={request.global_batch_size}: must be a positive multiple of micro_batch_size x "
            f"data-parallel size = {sequences}."
        )
    short, full = plan_memory(request), plan_memory(request, seq_length=request.target_context_length)
    return [
        f"Plan of {request.experiment}",
        *_layout_lines(request),
        *_position_lines(request),
        *_model_lines(request),
        *_memory_lines(request, short),
        *_time_lines(request),
        *_comparison_lines(request, fullest(short), fullest(full)),
    ]


def plan_memory(request: PlanRequest, *, seq_length: int | None = None) -> tuple[MemoryEstimate, ...]:
    """Estimate the memory of one rank of every pipeline stage, in order.

    Args:
        request: the inputs of the plan.
        seq_length: number of tokens of a sample; None uses the sample length of the request.
    """
    return stage_memory(
        request.architecture,
        request.layout,
        seq_length=seq_length or request.seq_length,
        precision=request.precision,
        backend=request.backend,
        trained=request.trained,
    )


def fullest(stages: tuple[MemoryEstimate, ...]) -> MemoryEstimate:
    """Return the estimate of the pipeline stage that needs the most memory."""
    return max(stages, key=lambda estimate: estimate.total_gib)


def _layout_lines(request: PlanRequest) -> list[str]:
    chunks = request.virtual_pipeline_model_parallel_size
    extras = [
        f"interleaved over {chunks} chunks per stage" if chunks else "",
        "sequence parallel" if request.sequence_parallel else "",
        "distributed optimizer" if request.use_distributed_optimizer else "",
        f"{request.recompute_granularity} recomputation" if request.recompute_granularity else "no recomputation",
        request.precision,
    ]
    return [
        f"  layout       {request.world_size} rank{_s(request.world_size)} = TP {request.tensor_model_parallel_size} x PP "
        f"{request.pipeline_model_parallel_size} x CP {request.context_parallel_size} x DP {request.data_parallel_size}; "
        + ", ".join(extra for extra in extras if extra),
        f"  batch        {request.micro_batch_size} sequence{_s(request.micro_batch_size)} x {request.num_micro_batches} "
        f"micro-batch{'' if request.num_micro_batches == 1 else 'es'} x DP {request.data_parallel_size} = "
        f"{request.global_batch_size} sequences per step",
        f"  tokens       {request.global_batch_size} x {request.seq_length:,} = {request.tokens_per_step:,} per step; "
        f"x {request.max_steps:,} step{_s(request.max_steps)} = {request.tokens_per_step * request.max_steps:,} in total",
    ]


def _position_lines(request: PlanRequest) -> list[str]:
    physical, target, prompt = request.seq_length, request.target_context_length, request.num_prompt_tokens
    if request.position_scheme == "contiguous":
        where = f"contiguous: 0..{physical - 1:,}"
    elif request.position_scheme != "endprompt":
        where = f"{request.position_scheme}: {physical:,} tokens at positions drawn for each sample within 0..{target - 1:,}"
    elif prompt is None:
        where = f"endprompt: context from 0, end prompt up to {target - 1:,}; its length b needs the tokenizer"
    else:
        where = f"endprompt: context 0..{physical - prompt - 1:,}, end prompt {target - prompt:,}..{target - 1:,} (b = {prompt})"
    return [
        f"  positions    {where}",
        f"  window       {request.original_context_length:,} -> {target:,} positions; RoPE {request.rope_type}, "
        f"factor {request.rope_factor:g}; samples of {physical:,} physical tokens",
    ]


def _model_lines(request: PlanRequest) -> list[str]:
    flops = training_flops_per_token(request.architecture, request.seq_length)
    return [
        f"  model        {count_parameters(request.architecture):,} parameters",
        f"  compute      {_flops(flops)} per token, {_flops(flops * request.tokens_per_step)} per step, "
        f"{_flops(flops * request.tokens_per_step * request.max_steps)} in total",
    ]


def _memory_lines(request: PlanRequest, stages: tuple[MemoryEstimate, ...]) -> list[str]:
    most = fullest(stages)
    where = "" if most.stage == "only" else f", {most.stage} pipeline stage" if most.stage in ("first", "last") else f", stage {most.stage}"
    others = []
    if len(stages) > 1:
        totals = ", ".join(f"{estimate.total_gib:.1f}" for estimate in stages)
        others = [f"               by pipeline stage, first to last: {totals} GiB"]
    return [
        f"  memory       about {most.total_gib:.1f} GiB per rank{where}: weights {most.weights_gib:.1f}, gradients "
        f"{most.gradients_gib:.1f}, "
        f"optimizer {most.optimizer_gib:.1f}, activations {most.activations_gib:.1f}, and the larger of logits {most.logits_gib:.1f} "
        f"and the backward pass of one layer {most.working_gib:.1f}",
        *others,
        f"               {_fit(request, most)}",
    ]


def _available_gib(request: PlanRequest) -> float | None:
    if request.device_memory_gib is not None:
        return request.device_memory_gib
    return get_hardware(request.hardware).memory_gib if request.hardware else None


def _fit(request: PlanRequest, estimate: MemoryEstimate) -> str:
    available = _available_gib(request)
    if available is None:
        return "The device memory is unknown, so the estimate is not compared with it."
    owner = f"the {available:.1f} GiB of {f'one {request.hardware}' if request.hardware else 'one rank'}"
    if estimate.total_gib > available:
        return (
            f"This does NOT fit into {owner}: {estimate.total_gib - available:.1f} GiB too much. Raise TP, PP or CP, set "
            f"recompute_granularity=full, or turn the distributed optimizer on."
        )
    reserve = reserve_gib(request.layout, device_memory_gib=available)
    headroom = available - estimate.total_gib
    if headroom < reserve:
        return (
            f"This is tight in {owner}: {headroom:.1f} GiB remain, and CUDA context, communication buffers and fragmentation may take "
            f"{reserve:.1f} (an assumption)."
        )
    return (
        f"This fits into {owner}: {headroom:.1f} GiB remain, of which CUDA context, communication buffers and fragmentation may take "
        f"{reserve:.1f} (an assumption)."
    )


def _time_lines(request: PlanRequest) -> list[str]:
    if request.hardware is None:
        return ["  time         not estimated: no known GPU is configured"]
    hardware = get_hardware(request.hardware)
    if not has_speed(hardware, request.precision):
        return [f"  time         not estimated: the table has no {request.precision} peak for {hardware.name}"]
    time = step_time(
        request.architecture,
        request.layout,
        seq_length=request.seq_length,
        hardware=hardware,
        precision=request.precision,
        gpus_per_node=request.gpus_per_node,
    )
    tokens_per_second = request.tokens_per_step / time.total / request.world_size
    tflops = tokens_per_second * training_flops_per_token(request.architecture, request.seq_length) / 1e12
    return [
        f"  time         {_duration(time.total)} per step, {_duration(time.total * request.max_steps)} in total on {hardware.name}: "
        f"{tokens_per_second:,.0f} tokens/s and {tflops:,.0f} TFLOP/s per GPU, predicted from rates that published runs reached",
        f"               {shares_of_step(time)}",
    ]


def shares_of_step(time: StepTime) -> str:
    """Return the shares of the step time as text, largest first. Shares below half a percent are left out."""
    shares = sorted(((getattr(time, name) / time.total, words) for name, words in _PARTS.items()), reverse=True)
    return ", ".join(f"{words} {share:.0%}" for share, words in shares if share >= 0.005)


_PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, SwiGLU and other elementwise kernels",
    "recompute": "recomputation",
    "bubble": "pipeline bubble",
    "tensor_parallel": "tensor parallel collectives",
    "context_parallel": "context parallel ring exchange",
    "pipeline": "pipeline sends",
    "data_parallel": "data parallel gradients and weights",
    "optimizer": "optimizer",
}


def _comparison_lines(request: PlanRequest, short: MemoryEstimate, full: MemoryEstimate) -> list[str]:
    short_flops = training_flops_per_token(request.architecture, request.seq_length)
    full_flops = training_flops_per_token(request.architecture, request.target_context_length)
    available = _available_gib(request)
    fits = "" if available is None else (", which fits" if full.total_gib <= available else ", which does not fit")
    return [
        f"  compared to  training on all {request.target_context_length:,} tokens with this layout: {_flops(full_flops)} per token "
        f"({full_flops / short_flops:.2f}x) and about {full.total_gib:.1f} GiB per rank against {short.total_gib:.1f}{fits}; "
        f"recipes/plan.py compares the best layouts of both"
    ]


def _flops(flops: float) -> str:
    for unit, name in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}" if flops < 1000 * unit else f"{flops / unit:,.0f} {name}"
    return f"{flops / 1e9:.3g} GFLOP"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
