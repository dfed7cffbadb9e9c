"""Which layouts of a model a cluster can run, ranked by the time that they should take, and why the others cannot; and EndPrompt's short
samples against samples as long as the window, each in the best layout for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape
from endprompt_megatron.planning.layout import Layout
from endprompt_megatron.planning.memory import MemoryEstimate, TrainedParts, reserve_gib, stage_memory
from endprompt_megatron.planning.throughput import GPUS_PER_NODE, Hardware, StepTime, get_hardware, has_speed, step_time

MICRO_BATCH_SIZES = (1, 2, 4)
# Tried in this order: the first that fits is the fastest.
RECOMPUTE_GRANULARITIES = (None, "selective", "full")
# FP8 products take multiples (tensor cores of 16, one scale covers 128 or 32 numbers), FP8 attention blocks of tokens.
_FP8_MULTIPLES = {"fp8": 16, "fp8_attention": 16, "fp8_blockwise": 128, "mxfp8": 32}
_FP8_ATTENTION_BLOCK = 128


@dataclass
class ClusterConfig:
    """The group `plan` of recipes/plan.py.

    Attributes:
        num_gpus: of the cluster; null takes the experiment's (launch.nproc_per_node x launch.num_nodes).
        gpus_per_node: that share NVLink.
        hardware: a name of planning/throughput.py's table; null takes launch.gpu.
        tokens: physical tokens to train on.
        lengths: windows at which EndPrompt is compared with full-length training; those up to the base's own window are left out.
        rows: layouts that the table shows.
        output_dir: where plan.md and plan.png go.
    """

    num_gpus: int | None = None
    gpus_per_node: int = GPUS_PER_NODE
    hardware: str | None = None
    tokens: float = 1e9
    lengths: list[int] = field(default_factory=lambda: [16384, 32768, 65536, 98304, 131072, 262144])
    rows: int = 10
    output_dir: str = "outputs/plan_${name}"


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """What is planned for which cluster.

    Attributes:
        shape: of the model.
        num_gpus, gpus_per_node: of the cluster.
        hardware: of each GPU, a name of the table.
        precision: as precision.name, resolved.
        seq_length: physical tokens of a sample.
        global_batch_size: samples a step.
        backend: te or torch: whose tensors are counted.
        trained: what trains, where that is not every weight.
        whole_samples: whether a rank needs samples whole (S2-attention), so that there is no context parallelism.
        bf16_layers: of an FP8 precision: layers at the start and at the end that stay in bf16, each within one pipeline stage.
    """

    shape: ModelShape
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
    """A layout that runs.

    Attributes:
        layout: with its batch.
        memory: of the stage that needs most.
        reserve_gib: kept free beside the tensors.
        time: of a step.
        tokens_per_second: a GPU.
    """

    layout: Layout
    memory: MemoryEstimate
    reserve_gib: float
    time: StepTime
    tokens_per_second: float

    def hours(self, tokens: float) -> float:
        """For so many physical tokens."""
        return tokens / (self.tokens_per_second * self.layout.world_size) / 3600


@dataclass(frozen=True)
class Rejection:
    """Layouts that fall to one reason.

    Attributes:
        reason: in words.
        count: layouts (TP, PP, CP, DP) that do.
        example: the nearest one, with its figures.
    """

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Ranking:
    """What became of every layout.

    Attributes:
        candidates: the best batch and recomputation of each layout that fits, fastest first.
        leanest: the one that needs least memory, with micro-batches of one sample and full recomputation; None where none fits.
        rejections: most layouts first.
        closest: of those that do not fit: (GiB too much, layout); None where there are none.
    """

    candidates: tuple[Candidate, ...]
    leanest: Candidate | None
    rejections: tuple[Rejection, ...]
    closest: tuple[float, Layout] | None

    @property
    def num_layouts(self) -> int:
        """Layouts that were looked at."""
        return len(self.candidates) + sum(rejection.count for rejection in self.rejections)


@dataclass(frozen=True)
class LengthComparison:
    """EndPrompt and full-length training for one window.

    Attributes:
        target_context_length: L, positions.
        short_length: physical tokens of EndPrompt's samples.
        endprompt: layouts for short samples; there are some.
        full: layouts for samples of L tokens; there may be none.
        same_layout: short samples in the fastest layout of the long ones; None where there is none, or where it does not divide them.
    """

    target_context_length: int
    short_length: int
    endprompt: Ranking
    full: Ranking
    same_layout: Candidate | None


def rank_layouts(request: ClusterRequest) -> Ranking:
    """Every TP x PP x CP x DP of the GPUs, with every chunking, micro-batch size and recomputation that Megatron-Core runs.

    A layout fits where its fullest stage and the reserve for what is no tensor fit into a GPU. Sequence parallelism comes with tensor
    parallelism, and the optimizer is always distributed. Layouts of one speed are ranked by memory; the speed does not depend on the
    size of a micro-batch but for the pipeline bubble.

    Args:
        request: model and cluster.
    Raises:
        ConfigError: the table has no such GPU, or no speed for it in this precision; the cluster has no GPUs.
    """
    hardware = get_hardware(request.hardware)
    if request.num_gpus < 1 or request.gpus_per_node < 1:
        raise ConfigError(
            f"plan.num_gpus={request.num_gpus}, plan.gpus_per_node={request.gpus_per_node}: both must be >= 1. A node has 8 as a rule."
        )
    if not has_speed(hardware, request.precision):
        raise ConfigError(
            f"precision.name={request.precision}: the table has no speed for it on plan.hardware={request.hardware}, so that layouts "
            f"cannot be ranked. Set precision=bf16, or other hardware."
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
    """EndPrompt's samples of request.seq_length tokens against samples of L tokens, as many a step, on the same GPUs.

    Args:
        request: of EndPrompt.
        lengths: L.
    Raises:
        ConfigError: not even the short samples fit, or as rank_layouts.
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


_NO_FIT = "does not fit into a GPU, however it recomputes"


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
    """(reason, example) of why Megatron-Core cannot run a layout, whatever its batch; or why nobody should."""
    shape, tensor, context = request.shape, layout.tensor_model_parallel_size, layout.context_parallel_size
    pipeline = layout.pipeline_model_parallel_size
    if shape.num_query_groups % tensor or shape.num_attention_heads % tensor:
        heads = f"{shape.num_attention_heads} heads and {shape.num_query_groups} KV heads"
        return f"TP has to divide the model's {heads}", f"TP {tensor}"
    if tensor > request.gpus_per_node:
        return f"TP leaves the node of {request.gpus_per_node} GPUs, whose links between layers it needs", f"TP {tensor}"
    if shape.num_layers % pipeline:
        return f"PP has to divide the model's {shape.num_layers} layers", f"PP {pipeline}"
    if request.whole_samples and context > 1:
        return "S2-attention needs whole samples on a rank", f"CP {context}"
    if context > 1 and request.seq_length % (2 * context) or request.seq_length % (tensor * context):
        return f"2 x CP and TP x CP have to divide the {request.seq_length:,} tokens of a sample", f"CP {context}"
    if request.global_batch_size % layout.data_parallel_size:
        return f"DP has to divide the {request.global_batch_size} samples of a step", f"DP {layout.data_parallel_size}"
    multiple = _FP8_MULTIPLES.get(request.precision)
    if multiple:
        start, end = request.bf16_layers
        if max(start, end) > shape.num_layers // pipeline:
            return f"the first {start} and the last {end} layers, which stay in bf16, each need one stage", f"PP {pipeline}"
        tokens = request.seq_length // context // tensor
        widths = (shape.query_size + shape.key_value_size, shape.query_size, shape.ffn_hidden_size)
        if any(width % (tensor * multiple) for width in widths) or tokens % multiple:
            return f"{request.precision} needs tokens and widths of a rank in multiples of {multiple}", f"TP {tensor}, CP {context}"
        if request.precision == "fp8_attention" and request.seq_length % (_FP8_ATTENTION_BLOCK * (2 * context if context > 1 else 1)):
            return f"FP8 attention needs blocks of {_FP8_ATTENTION_BLOCK} tokens, two for each of CP ranks", f"CP {context}"
    return None


def _best_of(request: ClusterRequest, layout: Layout, hardware: Hardware) -> tuple[Candidate | None, tuple[float, Layout]]:
    """The fastest batch, chunking and recomputation of a layout that fits, and the one that fits or comes closest."""
    best: Candidate | None = None
    nearest = (float("inf"), layout)
    for variant in _variants(request, layout):
        for recompute in RECOMPUTE_GRANULARITIES:
            if recompute == "selective" and request.precision == "fp8_attention":
                continue  # delayed scaling would count the repeated attention twice
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
    """The layout with what needs least memory: one sample, one chunk, everything recomputed."""
    count = request.global_batch_size // layout.data_parallel_size
    return _tried(request, replace(layout, num_micro_batches=count, recompute_granularity="full"), hardware)


def _variants(request: ClusterRequest, layout: Layout) -> Iterator[Layout]:
    pipeline = layout.pipeline_model_parallel_size
    layers_per_stage = request.shape.num_layers // pipeline
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
        request.shape,
        layout,
        seq_length=request.seq_length,
        precision=request.precision,
        backend=request.backend,
        trained=request.trained,
    )
    time = step_time(
        request.shape,
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
