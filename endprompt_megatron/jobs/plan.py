"""Plan an experiment for a cluster. The job ranks the layouts, compares EndPrompt with full-length training and writes a page with a
figure. It trains nothing and needs neither a GPU nor the weights of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.ranges import check_ranges
from endprompt_megatron.config.schema import ParallelConfig, RunConfig
from endprompt_megatron.jobs import preflight
from endprompt_megatron.launch import launcher
from endprompt_megatron.output_files import claimed, replace_text
from endprompt_megatron.planning.layout_search import ClusterRequest, compare_lengths, rank_layouts
from endprompt_megatron.planning.pages import describe_cluster

PAGE, PICTURE = "plan.md", "plan.png"


def plan_cluster(config: RunConfig, options: ClusterConfig, *, command: str, overrides: Sequence[str] = ()) -> list[str]:
    """Rank the layouts of a cluster for an experiment, and write the page.

    Args:
        config: configuration of the experiment, not yet validated. Its layout is ignored.
        options: description of the cluster.
        command: command line of the plan, for the page.
        overrides: the experiment's overrides in `command`, quoted for a shell. The page uses them in the command that starts the run in
            the fastest layout.
    Returns:
        The lines of the page, without the figure.
    Raises:
        ConfigError: the experiment or the cluster is invalid, or the output directory cannot be written.
    """
    request = cluster_request(config, options)
    ranking = rank_layouts(request)
    short = request if not config.method.full_length else replace(request, seq_length=config.data.seq_length)
    lengths = [length for length in options.lengths if length > preflight.known_base(config)[0].max_position_embeddings]
    comparisons = compare_lengths(short, lengths) if lengths else []
    job = " ".join([*overrides, *_cluster_overrides(config, request, accelerator=config.accelerator)])
    described: dict[str, Any] = {"experiment": config.name, "job": job, "tokens": options.tokens, "rows": options.rows, "command": command}
    lines = describe_cluster(request, ranking, comparisons, **described)
    with claimed(Path(options.output_dir), doing="writes a plan there") as directory:
        picture = None
        if comparisons:
            from endprompt_megatron.report.figures.planning import plot_lengths

            plot_lengths(directory / PICTURE, comparisons, request=request, tokens=options.tokens)
            picture = PICTURE
        replace_text(directory / PAGE, "\n".join(describe_cluster(request, ranking, comparisons, **described, picture=picture)))
    return lines


def cluster_request(config: RunConfig, options: ClusterConfig) -> ClusterRequest:
    """Return the request for planning an experiment on a cluster.

    Args:
        config: same as for plan_cluster.
        options: description of the cluster.
    Raises:
        ConfigError: the experiment or the cluster breaks a rule.
    """
    check_ranges(options, "plan.")
    check_ranges(config)  # before the accelerator and the layout are replaced below
    # the plan is always for GPUs, and for any layout: the experiment's layout may not fit this cluster
    run = preflight.resolve(replace(config, accelerator="gpu", parallel=ParallelConfig()), world_size=1, runs_here=False)
    in_its_layout = replace(run, config=replace(run.config, parallel=config.parallel), world_size=config.parallel.model_parallel_size)
    planned = preflight.plan_request(in_its_layout, num_prompt_tokens=0)
    num_gpus = launcher.planned_world_size(config) if options.num_gpus is None else options.num_gpus
    return ClusterRequest(
        architecture=planned.architecture,
        num_gpus=num_gpus,
        gpus_per_node=options.gpus_per_node,
        hardware=options.hardware or config.launch.gpu,
        precision=planned.precision,
        seq_length=planned.seq_length,
        global_batch_size=planned.global_batch_size,
        backend=planned.backend,
        trained=planned.trained,
        whole_samples=config.method.attention == "s2",
        bf16_layers=(config.precision.num_layers_at_start_in_bf16, config.precision.num_layers_at_end_in_bf16),
    )


def _cluster_overrides(config: RunConfig, request: ClusterRequest, *, accelerator: str) -> list[str]:
    """Return the overrides that set the experiment's cluster and accelerator to the planned ones."""
    nodes = -(-request.num_gpus // request.gpus_per_node)
    while request.num_gpus % nodes:
        nodes += 1
    planned = {"nproc_per_node": request.num_gpus // nodes, "num_nodes": nodes, "gpu": request.hardware}
    changed = [f"launch.{key}={value}" for key, value in planned.items() if getattr(config.launch, key) != value]
    return [*(["accelerator=gpu"] if accelerator != "gpu" else []), *changed]
