"""Search the parallel layouts of a cluster. The search ranks valid layouts by estimated step time and gives the reason for each rejected
layout. The module also compares EndPrompt's short samples with full-length samples, each in its own fastest layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout import Layout
from endprompt_megatron.planning.memory import MemoryEstimate, TrainedParts, reserve_gib, stage_memory
from endprompt_megatron.planning.throughput import Hardware, StepTime, get_hardware, has_speed, step_time

MICRO_BATCH_SIZES = (1, 2, 4)
# In order of step time, so the first granularity that fits is the fastest.
RECOMPUTE_GRANULARITIES = (None, "selective", "full")
# FP8 products need dimensions that are multiples of these numbers: 16 for tensor cores, and 128 or 32 where one scale covers that many
# elements. FP8 attention needs whole blocks of tokens.
_FP8_MULTIPLES = {"fp8": 16, "fp8_attention": 16, "fp8_blockwise": 128, "mxfp8": 32}
_FP8_ATTENTION_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """The model, batch and cluster to plan for.

    Attributes:
        architecture: sizes of the model.
        num_gpus, gpus_per_node: number of GPUs in the cluster and in one node.
        hardware: kind of GPU, a name in throughput.HARDWARE.
        precision: value of precision.name, not "auto".
        seq_length: number of physical tokens of a sample.
        global_batch_size: number of samples per step.
        backend: te or torch; determines the activations of a layer.
        trained: the trainable parameters; None if every weight is trained.
        whole_samples: whether a rank needs whole samples (S2-attention), which excludes context parallelism.
        bf16_layers: with FP8, number of layers at the start and at the end of the model that stay in bf16. Each group must lie within one
            pipeline stage.
    """

    architecture: ModelArchitecture
    num_gpus: int
    gpus_per_node: int
    hardware: str
    precision: str
    seq_length: int
    global_batch_size: int
    backend: str = "te"
    trained: TrainedParts | None = None
    whole_samples: bool = False
    bf16_layers: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Candidate:
    """A valid layout with its estimates.

    Attributes:
        layout: the layout and its batch.
        memory: memory of the pipeline stage that needs the most.
        reserve_gib: memory to keep free in addition to the tensors.
        time: estimated time of a step.
        tokens_per_second: physical tokens per second and GPU.
    """

    layout: Layout
    memory: MemoryEstimate
    reserve_gib: float
    time: StepTime
    tokens_per_second: float

    def hours(self, tokens: float) -> float:
        """Return the number of hours for training on `tokens` physical tokens."""
        return tokens / (self.tokens_per_second * self.layout.world_size) / 3600


@dataclass(frozen=True)
class Rejection:
    """The layouts rejected for one reason.

    Attributes:
        reason: the rule that they break.
        count: number of layouts (TP, PP, CP, DP).
        example: description of one of these layouts; if memory is the reason, of the layout that comes closest to fitting.
    """

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Ranking:
    """All layouts of a request, ranked or rejected.

    Attributes:
        candidates: all layouts that fit, each with its fastest batch and recomputation; fastest layout first.
        leanest: the layout that needs the least memory, with micro-batches of one sample and full recomputation; None if no layout fits.
        rejections: rejected layouts by reason; the most frequent reason first.
        closest: (missing GiB, layout) of the layout that comes closest to fitting among those that do not fit; None if every valid layout
            fits.
    """

    candidates: tuple[Candidate, ...]
    leanest: Candidate | None
    rejections: tuple[Rejection, ...]
    closest: tuple[float, Layout] | None

    @property
    def num_layouts(self) -> int:
        """Number of layouts, ranked and rejected."""
        return len(self.candidates) + sum(rejection.count for rejection in self.rejections)


@dataclass(frozen=True)
class LengthComparison:
    """EndPrompt and full-length training for one window.

    Attributes:
        target_context_length: L, in positions.
        short_length: number of physical tokens of EndPrompt's samples.
        endprompt: ranking for short samples, with at least one candidate.
        full: ranking for samples of L tokens, possibly without candidates.
        same_layout: estimates for short samples in the fastest layout of the long samples; None if no layout fits the long samples or if
            their fastest layout is not valid for short samples.
    """

    target_context_length: int
    short_length: int
    endprompt: Ranking
    full: Ranking
    same_layout: Candidate | None


def rank_layouts(request: ClusterRequest) -> Ranking:
    """Rank all layouts TP x PP x CP x DP of the GPUs. Each layout is tried with all numbers of model chunks, MICRO_BATCH_SIZES and
    RECOMPUTE_GRANULARITIES, and the fastest combination that fits is kept.

    A layout fits if the memory of its fullest stage plus the reserve is at most the memory of a GPU. Tensor parallelism always comes with
    sequence parallelism, and the optimizer is always distributed. Layouts of equal speed are ranked by memory. The micro-batch size affects
    the estimated speed only through the pipeline bubble.

    Args:
        request: model, batch and cluster.
    Raises:
        ConfigError: the GPU is unknown, the table has no speed for it in this precision, or the cluster has no GPUs.
    """
    hardware = get_hardware(request.hardware)
    if request.num_gpus < 1 or request.gpus_per_node < 1:
        raise ConfigError(
            f"plan.num_gpus={request.num_gpus}, plan.gpus_per_node={request.gpus_per_node}: both must be >= 1. A node usually has 8."
        )
    if not has_speed(hardware, request.precision):
        raise ConfigError(
            f"precision.name={request.precision}: the table has no speed for it on plan.hardware={request.hardware}, so layouts "
            f"cannot be ranked. Set precision=bf16 or another plan.hardware."
        )
    candidates: list[Candidate] = []
    reasons: dict[str, list[str]] = {}
    closest: tuple[float, Layout] | None = None
    leanest: Candidate | None = None
    for layout in _factorizations(request):
        problem = _problem(request, layout)
        if problem is not None:
            reasons.setdefault(problem[0], []).append(problem[1])
            continue
        best, nearest = _best_of(request, layout, hardware)
        if best is not None:
            candidates.append(best)
            lean = _lean(request, layout, hardware)
            leanest = lean if leanest is None or lean.memory.total_gib < leanest.memory.total_gib else leanest
            continue
        if closest is None or nearest[0] < closest[0]:
            closest = nearest
            reasons.setdefault(_NO_FIT, []).insert(0, "")
        else:
            reasons.setdefault(_NO_FIT, []).append("")
    if closest is not None:
        reasons[_NO_FIT][0] = f"closest: {closest[1].describe()}, {_recomputation(closest[1])}, {closest[0]:.1f} GiB too much"
    candidates.sort(key=_rank)
    rejections = sorted((Rejection(reason, len(found), found[0]) for reason, found in reasons.items()), key=lambda one: -one.count)
    return Ranking(tuple(candidates), leanest, tuple(rejections), closest)


def compare_lengths(request: ClusterRequest, lengths: list[int]) -> list[LengthComparison]:
    """Compare EndPrompt's samples of request.seq_length tokens with samples of L tokens, for the same batch size and GPUs.

    Args:
        request: the request with the sample length of EndPrompt.
        lengths: windows L, in positions.
    Raises:
        ConfigError: no layout fits the short samples; see also rank_layouts.
    """
    short = rank_layouts(request)
    if not short.candidates:
        raise ConfigError(
            f"plan.num_gpus={request.num_gpus}: no layout of {request.hardware} holds samples of data.seq_length={request.seq_length} "
            f"tokens ({'; '.join(f'{rejection.reason} ({rejection.example})' for rejection in short.rejections)}). Plan for another number "
            f"of GPUs (plan.num_gpus), or for shorter samples (data.seq_length)."
        )
    found = []
    for length in lengths:
        full = rank_layouts(replace(request, seq_length=length))
        same = None
        if full.candidates and _problem(request, full.candidates[0].layout) is None:
            same = _tried(request, full.candidates[0].layout, get_hardware(request.hardware))
        found.append(LengthComparison(length, request.seq_length, short, full, same))
    return found


_NO_FIT = "does not fit into a GPU, even with full recomputation"


def _recomputation(layout: Layout) -> str:
    return f"{layout.recompute_granularity} recomputation" if layout.recompute_granularity else "no recomputation"


def _factorizations(request: ClusterRequest) -> Iterator[Layout]:
    gpus = request.num_gpus
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // tensor // pipeline):
                yield Layout(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    context_parallel_size=context,
                    data_parallel_size=gpus // tensor // pipeline // context,
                    sequence_parallel=tensor > 1,
                    use_distributed_optimizer=True,
                )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _problem(request: ClusterRequest, layout: Layout) -> tuple[str, str] | None:
    """Return (reason, example) if Megatron-Core cannot or should not run the layout with any micro-batch size, otherwise None."""
    architecture, tensor, context = request.architecture, layout.tensor_model_parallel_size, layout.context_parallel_size
    pipeline = layout.pipeline_model_parallel_size
    if architecture.num_query_groups % tensor or architecture.num_attention_heads % tensor:
        heads = f"{architecture.num_attention_heads} heads and {architecture.num_query_groups} KV heads"
        return f"TP must divide the model's {heads}", f"TP {tensor}"
    if tensor > request.gpus_per_node:
        return f"TP must stay within a node of {request.gpus_per_node} GPUs, because it needs NVLink", f"TP {tensor}"
    if architecture.num_layers % pipeline:
        return f"PP must divide the model's {architecture.num_layers} layers", f"PP {pipeline}"
    if request.whole_samples and context > 1:
        return "S2-attention needs whole samples on a rank", f"CP {context}"
    if (context > 1 and request.seq_length % (2 * context)) or request.seq_length % (tensor * context):
        return f"2 x CP and TP x CP must divide the {request.seq_length:,} tokens of a sample", f"CP {context}"
    if request.global_batch_size % layout.data_parallel_size:
        return f"DP must divide the {request.global_batch_size} samples of a step", f"DP {layout.data_parallel_size}"
    multiple = _FP8_MULTIPLES.get(request.precision)
    if multiple:
        start, end = request.bf16_layers
        if max(start, end) > architecture.num_layers // pipeline:
            return f"the first {start} and the last {end} layers, which stay in bf16, must each lie in one pipeline stage", f"PP {pipeline}"
        tokens = request.seq_length // context // tensor
        widths = (architecture.query_size + architecture.key_value_size, architecture.query_size, architecture.ffn_hidden_size)
        if any(width % (tensor * multiple) for width in widths) or tokens % multiple:
            return f"{request.precision} needs tokens and widths per rank in multiples of {multiple}", f"TP {tensor}, CP {context}"
        if request.precision == "fp8_attention" and request.seq_length % (_FP8_ATTENTION_BLOCK * (2 * context if context > 1 else 1)):
            return f"FP8 attention needs blocks of {_FP8_ATTENTION_BLOCK} tokens, two per CP rank", f"CP {context}"
    return None


def _best_of(request: ClusterRequest, layout: Layout, hardware: Hardware) -> tuple[Candidate | None, tuple[float, Layout]]:
    """Return the fastest variant of a layout that fits, or None, and (excess in GiB, layout) of the variant with the least memory. Variants
    differ in micro-batch size, number of chunks and recomputation."""
    best: Candidate | None = None
    nearest = (float("inf"), layout)
    for variant in _variants(request, layout):
        for recompute in RECOMPUTE_GRANULARITIES:
            if recompute == "selective" and request.precision == "fp8_attention":
                continue  # delayed scaling would record the recomputed attention twice
            candidate = _tried(request, replace(variant, recompute_granularity=recompute), hardware)
            excess = candidate.memory.total_gib + candidate.reserve_gib - hardware.memory_gib
            nearest = min(nearest, (excess, candidate.layout), key=lambda one: one[0])
            if excess > 0:
                continue
            if best is None or _rank(candidate) < _rank(best):
                best = candidate
            break
    return best, nearest


def _rank(candidate: Candidate) -> tuple[float, float]:
    return candidate.time.total, candidate.memory.total_gib


def _lean(request: ClusterRequest, layout: Layout, hardware: Hardware) -> Candidate:
    """Return the variant of a layout that needs the least memory: micro-batches of one sample, one model chunk per stage, full
    recomputation."""
    count = request.global_batch_size // layout.data_parallel_size
    return _tried(request, replace(layout, num_micro_batches=count, recompute_granularity="full"), hardware)


def _variants(request: ClusterRequest, layout: Layout) -> Iterator[Layout]:
    pipeline = layout.pipeline_model_parallel_size
    layers_per_stage = request.architecture.num_layers // pipeline
    for micro_batch in MICRO_BATCH_SIZES:
        samples = micro_batch * layout.data_parallel_size
        if request.global_batch_size % samples:
            continue
        count = request.global_batch_size // samples
        for chunks in _divisors(layers_per_stage) if pipeline > 1 and count % pipeline == 0 else [1]:
            virtual = chunks if chunks > 1 else None
            yield replace(layout, virtual_pipeline_model_parallel_size=virtual, micro_batch_size=micro_batch, num_micro_batches=count)


def _tried(request: ClusterRequest, layout: Layout, hardware: Hardware) -> Candidate:
    stages = stage_memory(
        request.architecture,
        layout,
        seq_length=request.seq_length,
        precision=request.precision,
        backend=request.backend,
        trained=request.trained,
    )
    time = step_time(
        request.architecture,
        layout,
        seq_length=request.seq_length,
        hardware=hardware,
        precision=request.precision,
        gpus_per_node=request.gpus_per_node,
    )
    return Candidate(
        layout,
        max(stages, key=lambda estimate: estimate.total_gib),
        reserve_gib(layout, device_memory_gib=hardware.memory_gib),
        time,
        request.global_batch_size * request.seq_length / time.total / layout.world_size,
    )
