"""Format the plan of a cluster as the Markdown page that recipes/plan.py prints and writes."""

from __future__ import annotations

from endprompt_megatron.planning.flops import count_parameters, training_flops_per_token
from endprompt_megatron.planning.layout_search import Candidate, ClusterRequest, LengthComparison, Ranking
from endprompt_megatron.planning.run_plan import shares_of_step
from endprompt_megatron.planning.throughput import LINK_SHARE, MESSAGE_SECONDS, get_hardware, kinds_of_numbers


def describe_cluster(
    request: ClusterRequest,
    ranking: Ranking,
    comparisons: list[LengthComparison],
    *,
    experiment: str,
    job: str,
    tokens: float,
    rows: int,
    command: str,
    picture: str | None = None,
) -> list[str]:
    """Return the page as a list of lines.

    Args:
        request: the planned model and cluster.
        ranking: ranked layouts of the request.
        comparisons: comparisons with full-length training, one per window; may be empty.
        experiment: name of the experiment.
        job: arguments of recipes/extend.py that start the experiment on this cluster, without the layout.
        tokens: number of physical tokens of the training run, which determines the hours.
        rows: largest number of layouts in the table of layouts that fit.
        command: command that writes the page.
        picture: file name of the figure; None without one.
    """
    hardware = get_hardware(request.hardware)
    return [
        f"# {experiment} on {request.num_gpus} x {request.hardware}: predicted, not measured",
        "",
        f"    {command}",
        "",
        f"{count_parameters(request.architecture):,} parameters, {request.precision}; {request.global_batch_size} samples of "
        f"{request.seq_length:,} tokens per step; hours are for {words_of_tokens(tokens)} tokens. {request.hardware}: "
        f"{hardware.memory_gib:.1f} GiB.",
        "",
        *_ranking_lines(request, ranking, job, tokens, rows),
        *_rejection_lines(ranking),
        *comparison_lines(request, comparisons, tokens=tokens),
        *([f"![Memory and time by window]({picture})", ""] if picture else []),
        *_assumption_lines(request),
    ]


def comparison_lines(request: ClusterRequest, comparisons: list[LengthComparison], *, tokens: float) -> list[str]:
    """Return the lines of the table that compares EndPrompt with full-length training; empty without comparisons."""
    if not comparisons:
        return []
    short = comparisons[0].endprompt
    fastest = short.candidates[0]
    rows = [["any", f"EndPrompt, {comparisons[0].short_length:,} tokens", *_comparison_cells(short, fastest, fastest, tokens)]]
    for found in comparisons:
        cells = _comparison_cells(found.full, fastest, found.same_layout, tokens)
        rows.append([f"{found.target_context_length:,}", "as long as the window", *cells])
    header = [
        "window", "samples", "fastest layout that fits", "GiB per GPU", "EndPrompt there", "hours", "time", "least GiB per GPU",
        "its hours",
    ]  # fmt: skip
    return [
        f"## EndPrompt against samples as long as the window, each in its own best layout of {request.num_gpus} x {request.hardware}",
        "",
        *_table(header, rows, left=3),
        "",
        "GiB values include only tensors. `EndPrompt there` is the memory of EndPrompt's samples in the layout of the same row. The "
        "fastest layout may use all memory. `least GiB per GPU` and `its hours` are those of the layout with the least memory, which uses "
        "full recomputation.",
        "",
    ]


def words_of_tokens(tokens: float) -> str:
    """Return a number of tokens as short text, such as 1B for 1e9."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:,.0f}"


def _comparison_cells(ranking: Ranking, endprompt: Candidate, same_layout: Candidate | None, tokens: float) -> list[str]:
    if not ranking.candidates or ranking.leanest is None:
        excess = f"none fits: {ranking.closest[0]:.1f} GiB too much" if ranking.closest else "none is valid"
        return [excess, "", "", "", "", "", ""]
    fastest, leanest = ranking.candidates[0], ranking.leanest
    return [
        f"{fastest.layout.describe()}, {_recomputation(fastest)}",
        f"{fastest.memory.total_gib:.1f}",
        f"{same_layout.memory.total_gib:.1f}" if same_layout else "",
        f"{fastest.hours(tokens):.2f}",
        f"{endprompt.tokens_per_second / fastest.tokens_per_second:.2f}x",
        f"{leanest.memory.total_gib:.1f}",
        f"{leanest.hours(tokens):.2f}",
    ]


def _ranking_lines(request: ClusterRequest, ranking: Ranking, job: str, tokens: float, rows: int) -> list[str]:
    lines = [f"## Layouts that fit, fastest first ({min(rows, len(ranking.candidates))} of {len(ranking.candidates)})", ""]
    if not ranking.candidates:
        return [*lines, "None.", ""]
    flops = training_flops_per_token(request.architecture, request.seq_length)
    header = ["layout", "micro-batches", "recomputation", "GiB per GPU", "reserve", "tokens/s/GPU", "TFLOP/s/GPU", "s per step", "hours"]
    table = [
        [
            candidate.layout.describe(),
            f"{candidate.layout.micro_batch_size} x {candidate.layout.num_micro_batches}",
            candidate.layout.recompute_granularity or "none",
            f"{candidate.memory.total_gib:.1f}",
            f"{candidate.reserve_gib:.1f}",
            f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.tokens_per_second * flops / 1e12:,.0f}",
            f"{candidate.time.total:.2f}",
            f"{candidate.hours(tokens):.2f}",
        ]
        for candidate in ranking.candidates[:rows]
    ]
    first = ranking.candidates[0]
    memory = first.memory
    return [
        *lines,
        *_table(header, table, left=1),
        "",
        f"The first layout: weights {memory.weights_gib:.1f} GiB, gradients {memory.gradients_gib:.1f}, "
        f"optimizer {memory.optimizer_gib:.1f}, activations {memory.activations_gib:.1f}, and the larger of logits {memory.logits_gib:.1f} "
        f"and the backward pass of one layer {memory.working_gib:.1f}. Its step time: {shares_of_step(first.time)}.",
        "",
        f"    python recipes/extend.py {job} {_overrides(first)}",
        "",
    ]


def _overrides(candidate: Candidate) -> str:
    """Return the layout as command-line overrides."""
    layout = candidate.layout
    virtual = layout.virtual_pipeline_model_parallel_size
    values = {
        "parallel.tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": virtual or "null",
        "parallel.context_parallel_size": layout.context_parallel_size,
        "parallel.use_distributed_optimizer": "true",
        "parallel.overlap_grad_reduce": "true",
        "parallel.overlap_param_gather": "true",
        "parallel.recompute_granularity": layout.recompute_granularity or "null",
        "trainer.micro_batch_size": layout.micro_batch_size,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def _rejection_lines(ranking: Ranking) -> list[str]:
    if not ranking.rejections:
        return []
    count = sum(rejection.count for rejection in ranking.rejections)
    return [
        f"## Rejected: {count} of {ranking.num_layouts} layouts (TP x PP x CP x DP)",
        "",
        *(f"- {rejection.count}: {rejection.reason} ({rejection.example})" for rejection in ranking.rejections),
        "",
    ]


def _recomputation(candidate: Candidate) -> str:
    granularity = candidate.layout.recompute_granularity
    return f"{granularity} recomputation" if granularity else "nothing recomputed"


def _assumption_lines(request: ClusterRequest) -> list[str]:
    hardware = get_hardware(request.hardware)
    kind, attention_kind = kinds_of_numbers(request.precision)
    te = "Transformer Engine's kernels" + (", which cache FP8 copies of the weights" if kind == "fp8" else "")
    kernels = te if request.backend == "te" else "plain torch's kernels"
    products = f"{hardware.matmul_share[kind]:.0%} of {hardware.peak_tflops[kind]:,.0f} TFLOP/s"
    attention = f"{hardware.attention_share[attention_kind]:.0%} of the {attention_kind} peak"
    return [
        "## Assumptions and limits",
        "",
        f"- Matrix products of layers reach {products}, attention {attention}, links and memory "
        f"{LINK_SHARE:.0%} of their bandwidth; every message costs {MESSAGE_SECONDS * 1e6:.0f} microseconds. One share per GPU is "
        f"calibrated on a published speed; the others are assumptions (see planning/throughput.py).",
        f"- Memory is the sum of tensor sizes. In addition to its weight, a parameter takes 4 bytes of gradient and 12 bytes of optimizer "
        f"state, which is split over DP x CP. Activations are those of {kernels}. A layout fits if it leaves a reserve for CUDA context "
        f"(1 GiB), NCCL (0.5 GiB for each kind of process group) and fragmentation (3 % of the GPU).",
        *(
            ["- Only adapters are trained, with short and with long samples. The time is estimated as if every weight were trained."]
            if request.trained
            else []
        ),
        *(["- S2-attention is timed as full attention."] if request.whole_samples else []),
        "- The communication of gradients overlaps with the last backward pass, and that of weights with the first forward pass. The "
        "interleaved schedule overlaps its sends.",
        "- The time does not include start-up, data loading, checkpoints, evaluation, launch times of small kernels, slow nodes, "
        "congestion or failures.",
        "- Both methods train on the same number of physical tokens, and their steps have the same number of samples.",
        "",
    ]


def _table(header: list[str], rows: list[list[str]], *, left: int) -> list[str]:
    """Return the lines of a Markdown table whose first `left` columns are aligned to the left."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
