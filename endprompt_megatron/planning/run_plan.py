"""The plan of a run in plain words: what `dry_run=true` prints before anything is launched. Numbers that are assumptions say so."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape, count_parameters, training_flops_per_token
from endprompt_megatron.planning.layout import Layout
from endprompt_megatron.planning.memory import MemoryEstimate, TrainedParts, reserve_gib, stage_memory
from endprompt_megatron.planning.throughput import GPUS_PER_NODE, StepTime, get_hardware, has_speed, step_time


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Everything a plan is made from.

    Attributes:
        experiment: name of the run.
        shape: of the model.
        world_size: ranks.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: the layout; data parallelism is the rest.
        virtual_pipeline_model_parallel_size: chunks a stage of the interleaved schedule, or None.
        sequence_parallel, use_distributed_optimizer, recompute_granularity: as in conf/parallel.
        precision: fp32, bf16, fp8, fp8_attention, fp8_blockwise or mxfp8.
        backend: te or torch: whose tensors are counted.
        micro_batch_size, global_batch_size: sequences.
        max_steps: optimizer steps.
        seq_length: S, physical tokens of a sample.
        num_prompt_tokens: b, the end prompt among them; 0 for schemes without one, None while the tokenizer is not at hand.
        target_context_length: L, positions.
        original_context_length: native window, positions.
        position_scheme: name of the scheme.
        rope_type, rope_factor: name and factor of the scaling.
        hardware: a name in throughput.HARDWARE, or None (a CPU, an unknown GPU): then no time is estimated.
        device_memory_gib: memory of one rank; None takes the hardware's, and without hardware nothing is compared.
        gpus_per_node: ranks that share NVLink.
        trained: what trains, where that is not every weight; the FLOPs and the time are those of training everything all the same.
    """

    experiment: str
    shape: ModelShape
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
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model."""
        return self.world_size // self.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a rank accumulates a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Physical tokens of one optimizer step over all ranks."""
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
    """The plan, one line a fact.

    Args:
        request: what is planned.
    Returns:
        Lines without line ends, ready to print.
    Raises:
        ConfigError: the layout does not divide the world size or the global batch, or the hardware is not in the table.
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
    """Memory of a rank of every pipeline stage, the first stage first.

    Args:
        request: what is planned.
        seq_length: of samples of another length; None takes the request's.
    """
    return stage_memory(
        request.shape,
        request.layout,
        seq_length=seq_length or request.seq_length,
        precision=request.precision,
        backend=request.backend,
        trained=request.trained,
    )


def fullest(stages: tuple[MemoryEstimate, ...]) -> MemoryEstimate:
    """The stage that needs most."""
    return max(stages, key=lambda estimate: estimate.total_gib)


def _layout_lines(request: PlanRequest) -> list[str]:
    chunks = request.virtual_pipeline_model_parallel_size
    extras = [
        f"interleaved over {chunks} chunks a stage" if chunks else "",
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
        f"{request.global_batch_size} sequences a step",
        f"  tokens       {request.global_batch_size} x {request.seq_length:,} = {request.tokens_per_step:,} a step; "
        f"x {request.max_steps:,} step{_s(request.max_steps)} = {request.tokens_per_step * request.max_steps:,} in all",
    ]


def _position_lines(request: PlanRequest) -> list[str]:
    physical, target, prompt = request.seq_length, request.target_context_length, request.num_prompt_tokens
    if request.position_scheme == "contiguous":
        where = f"contiguous: 0..{physical - 1:,}"
    elif request.position_scheme != "endprompt":
        where = f"{request.position_scheme}: {physical:,} tokens at positions drawn for each sample within 0..{target - 1:,}"
    elif prompt is None:
        where = f"endprompt: context from 0, end prompt up to {target - 1:,}; its length b is known once the tokenizer is there"
    else:
        where = f"endprompt: context 0..{physical - prompt - 1:,}, end prompt {target - prompt:,}..{target - 1:,} (b = {prompt})"
    return [
        f"  positions    {where}",
        f"  window       {request.original_context_length:,} -> {target:,} positions; RoPE {request.rope_type}, "
        f"factor {request.rope_factor:g}; samples of {physical:,} physical tokens",
    ]


def _model_lines(request: PlanRequest) -> list[str]:
    flops = training_flops_per_token(request.shape, request.seq_length)
    return [
        f"  model        {count_parameters(request.shape):,} parameters",
        f"  compute      {_flops(flops)} a token, {_flops(flops * request.tokens_per_step)} a step, "
        f"{_flops(flops * request.tokens_per_step * request.max_steps)} in all",
    ]


def _memory_lines(request: PlanRequest, stages: tuple[MemoryEstimate, ...]) -> list[str]:
    most = fullest(stages)
    where = "" if most.stage == "only" else f", {most.stage} pipeline stage" if most.stage in ("first", "last") else f", stage {most.stage}"
    others = []
    if len(stages) > 1:
        totals = ", ".join(f"{estimate.total_gib:.1f}" for estimate in stages)
        others = [f"               by pipeline stage, first to last: {totals} GiB"]
    return [
        f"  memory       about {most.total_gib:.1f} GiB a rank{where}: weights {most.weights_gib:.1f}, gradients {most.gradients_gib:.1f}, "
        f"optimizer {most.optimizer_gib:.1f}, activations {most.activations_gib:.1f}, and the larger of logits {most.logits_gib:.1f} "
        f"and one layer going backward {most.working_gib:.1f}",
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
        return "No device memory was named, so nothing is compared."
    owner = f"the {available:.1f} GiB of {f'one {request.hardware}' if request.hardware else 'one rank'}"
    if estimate.total_gib > available:
        return (
            f"That does NOT fit into {owner}: {estimate.total_gib - available:.1f} GiB too much. Raise TP, PP or CP, set "
            f"recompute_granularity=full, or turn the distributed optimizer on."
        )
    reserve = reserve_gib(request.layout, device_memory_gib=available)
    headroom = available - estimate.total_gib
    if headroom < reserve:
        return (
            f"That is tight in {owner}: {headroom:.1f} GiB are left, and CUDA context, communication buffers and fragmentation may take "
            f"{reserve:.1f} (an assumption)."
        )
    return (
        f"That fits into {owner}: {headroom:.1f} GiB are left, of which CUDA context, communication buffers and fragmentation may take "
        f"{reserve:.1f} (an assumption)."
    )


def _time_lines(request: PlanRequest) -> list[str]:
    if request.hardware is None:
        return ["  time         no GPU of the table was named, so none is estimated"]
    hardware = get_hardware(request.hardware)
    if not has_speed(hardware, request.precision):
        return [f"  time         the table has no {request.precision} peak for {hardware.name}, so none is estimated"]
    time = step_time(
        request.shape,
        request.layout,
        seq_length=request.seq_length,
        hardware=hardware,
        precision=request.precision,
        gpus_per_node=request.gpus_per_node,
    )
    tokens_per_second = request.tokens_per_step / time.total / request.world_size
    tflops = tokens_per_second * training_flops_per_token(request.shape, request.seq_length) / 1e12
    return [
        f"  time         {_duration(time.total)} a step, {_duration(time.total * request.max_steps)} in all on {hardware.name}: "
        f"{tokens_per_second:,.0f} tokens/s and {tflops:,.0f} TFLOP/s a GPU, predicted from rates that published runs reached",
        f"               {shares_of_step(time)}",
    ]


def shares_of_step(time: StepTime) -> str:
    """What a step goes into, largest first; parts under half a percent are left out."""
    shares = sorted(((getattr(time, name) / time.total, words) for name, words in _PARTS.items()), reverse=True)
    return ", ".join(f"{words} {share:.0%}" for share, words in shares if share >= 0.005)


_PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, SwiGLU and the like",
    "recompute": "recomputation",
    "bubble": "pipeline bubble",
    "tensor_parallel": "tensor parallel collectives",
    "context_parallel": "the ring of context parallelism",
    "pipeline": "pipeline sends",
    "data_parallel": "gradients and weights over data parallel ranks",
    "optimizer": "optimizer",
}


def _comparison_lines(request: PlanRequest, short: MemoryEstimate, full: MemoryEstimate) -> list[str]:
    short_flops = training_flops_per_token(request.shape, request.seq_length)
    full_flops = training_flops_per_token(request.shape, request.target_context_length)
    available = _available_gib(request)
    fits = "" if available is None else (", which fits" if full.total_gib <= available else ", which does not fit")
    return [
        f"  instead of   training at all {request.target_context_length:,} tokens on this layout: {_flops(full_flops)} a token "
        f"({full_flops / short_flops:.2f}x) and about {full.total_gib:.1f} GiB a rank against {short.total_gib:.1f}{fits}; "
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
