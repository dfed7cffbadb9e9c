"""Implementation of `dry_run=true`. It checks and plans a job of any number of ranks, in one process without a GPU. Megatron creates the
process groups on torch's `fake` backend, and the model is built on the `meta` device. A dry run fetches and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from endprompt_megatron.checkpoint.hf.weights import check_values
from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.config.resolved import ResolvedRun
from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import ParallelConfig, RunConfig
from endprompt_megatron.config.validation import find_problems
from endprompt_megatron.data.corpora import inspect_corpora
from endprompt_megatron.data.manifest import Check
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.memory_fit import smallest_change
from endprompt_megatron.launch.launcher import local_processes
from endprompt_megatron.log import global_rank
from endprompt_megatron.mcore.fake import RankGroups, groups_of_rank
from endprompt_megatron.model.pipeline_stages import PipelineStage, PipelineStages, build_pipeline_stages
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.memory import reserve_gib
from endprompt_megatron.planning.run_plan import PlanRequest, describe_plan, fullest, plan_memory
from endprompt_megatron.planning.throughput import HARDWARE, has_speed
from endprompt_megatron.positions.scheme import SCHEMES, get_scheme

_READ_BYTES = 4 * 2**30  # a dry run reads weights up to this size, which takes seconds; larger ones are read only when the run loads them


def dry_run(config: RunConfig, *, world_size: int) -> Iterator[str]:
    """Check a job and describe its plan.

    Args:
        config: configuration of the run.
        world_size: number of ranks of the job.
    Yields:
        The lines of the plan, without line ends.
    Raises:
        ConfigError, DataError, CheckpointError: the configuration or a file is invalid, or the job does not fit into the memory of its
            GPUs; in this case, the message states the smallest change that makes it fit.
    """
    if global_rank() > 0:
        return  # rank 0 prints the plan
    run = preflight.resolve(config, world_size=world_size, runs_here=False)
    config = run.config
    _check_gpu(config)
    hf_path = Path(config.model.hf_path)
    base = preflight.check_base(run) if hf_path.exists() else None
    values_are_read = base is not None and check_values(hf_path, max_bytes=_READ_BYTES)
    if run.accelerator == "cpu":  # this machine will run the job
        from endprompt_megatron.jobs.run_probes import check_probe_memory

        check_probe_memory(run)
    preflight.check_output_dir(config)
    num_prompt_tokens = config.method.end_prompt_length
    if not SCHEMES[config.method.position_scheme].uses_end_prompt:
        num_prompt_tokens = 0
    elif base is not None and base.end_prompts is not None:
        num_prompt_tokens = max(base.end_prompts.lengths)
    request = preflight.plan_request(run, num_prompt_tokens=num_prompt_tokens)
    yield from describe_plan(request)
    yield from _group_lines(config, world_size)
    yield from _stage_lines(stages_of(run), run.architecture, config.parallel)
    yield from _base_lines(config, base, values_are_read=values_are_read)
    yield from _data_lines(config, base)
    refuse_what_does_not_fit(run, request)


def stages_of(run: ResolvedRun) -> PipelineStages:
    """Build every pipeline stage of the run's model on the `meta` device."""
    config = run.config
    return build_pipeline_stages(
        run.architecture,
        rope=run.rope,
        max_sequence_length=config.rope.target_context_length,
        parallel=config.parallel,
        precision=config.precision.name,
        world_size=run.world_size,
        adapter=config.adapter,
        attention_groups=config.method.attention_groups if config.method.attention == "s2" else None,
    )


def needed_gib(request: PlanRequest) -> float:
    """Return the memory in GiB that the fullest rank needs: its tensors and, on a GPU, the reserve for CUDA, NCCL and fragmentation."""
    reserve = reserve_gib(request.layout, device_memory_gib=available_gib(request)) if request.hardware else 0.0
    return fullest(plan_memory(request)).total_gib + reserve


def available_gib(request: PlanRequest) -> float:
    """Return the memory of one rank in GiB."""
    if request.hardware:
        return HARDWARE[request.hardware].memory_gib
    assert request.device_memory_gib is not None  # plan_request measures the host's memory if there is no GPU
    return request.device_memory_gib


def refuse_what_does_not_fit(run: ResolvedRun, request: PlanRequest) -> None:
    """Check that the estimated memory does not exceed the memory of a rank.

    Raises:
        ConfigError: the run does not fit; the message states the smallest change with which it fits.
    """
    needed, available = needed_gib(request), available_gib(request)
    if needed <= available:
        return

    def works(changed: RunConfig, ranks: int) -> bool:
        if find_problems(Facts(changed, ranks, run.architecture, tuple(SCHEMES), base_rope=run.base_rope)):
            return False
        planned = preflight.plan_request(replace(run, config=changed, world_size=ranks), num_prompt_tokens=request.num_prompt_tokens)
        return needed_gib(planned) <= available_gib(planned)

    change = smallest_change(run.config, world_size=request.world_size, works=works)
    device, of_it = (
        (f"launch.gpu={request.hardware}", "reserve for CUDA, NCCL and fragmentation included")
        if request.hardware
        else (f"accelerator={run.accelerator}", "without the memory that the operating system needs")
    )
    way_out = (
        f"The smallest change that fits: {' '.join(change)}"
        if change
        else "No layout of these ranks or more fits: train on shorter samples (data.seq_length), or name a device with more memory"
    )
    raise ConfigError(
        f"{device}: a rank has {available:.1f} GiB, and this run needs about {needed:.1f} GiB of it ({of_it}) in samples of "
        f"data.seq_length={run.config.data.seq_length}. {way_out}."
    )


def _check_gpu(config: RunConfig) -> None:
    """Raise ConfigError if the GPU is not in the table or cannot compute in the run's precision."""
    gpu, precision = config.launch.gpu, config.precision.name
    if gpu not in HARDWARE:
        raise ConfigError(f"launch.gpu={gpu}: not in the table of GPUs. Choose one of {', '.join(sorted(HARDWARE))}.")
    if precision in FP8_MULTIPLES and not has_speed(HARDWARE[gpu], precision):
        able = [name for name, hardware in sorted(HARDWARE.items()) if has_speed(hardware, precision)]
        raise ConfigError(
            f"precision.name={precision}: {gpu} has no tensor cores for it. Set precision=bf16, or launch.gpu to one of {', '.join(able)}."
        )


def _group_lines(config: RunConfig, world_size: int) -> Iterator[str]:
    if world_size == 1:
        return
    first, last = (groups_of_rank(config.parallel, world_size=world_size, rank=rank) for rank in (0, world_size - 1))
    node_size = local_processes(config)
    yield f"  groups       {world_size} ranks on {-(-world_size // node_size)} x {node_size}; members for rank 0 and for rank {last.rank}:"
    kinds = {
        "tensor": "tensor",
        "context": "context",
        "pipeline": "pipeline",
        "data": "data",
        "optimizer": "data x context, which sum gradients" + " and share the optimizer" * config.parallel.use_distributed_optimizer,
    }
    for kind, words in kinds.items():
        members, others = getattr(first, kind), getattr(last, kind)
        if len(members) > 1:
            yield f"               {len(members)} {words}: {_ranks(members)} and {_ranks(others)}; {_nodes(members, others, node_size)}"
    if spans_nodes(first, world_size, node_size):
        yield (
            f"               TENSOR PARALLEL GROUPS SPAN NODES of {node_size}: every layer waits for the network. Set "
            f"parallel.tensor_model_parallel_size to a divisor of {node_size}."
        )


def spans_nodes(groups: RankGroups, world_size: int, node_size: int) -> bool:
    """Return whether any tensor parallel group spans more than one node. The ranks of such a group are consecutive.

    Args:
        groups: process groups of any rank.
        world_size, node_size: number of ranks of the job and of a node.
    """
    size = len(groups.tensor)
    return any(start // node_size != (start + size - 1) // node_size for start in range(0, world_size, size))


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) < 3:
        return ", ".join(map(str, ranks))
    step = ranks[1] - ranks[0]
    if list(ranks) != list(range(ranks[0], ranks[-1] + 1, step)):
        return f"{', '.join(map(str, ranks[:3]))}, ..., {ranks[-1]}"
    return f"{ranks[0]}..{ranks[-1]}" + (f" by {step}" if step > 1 else "")


def _nodes(members: tuple[int, ...], others: tuple[int, ...], node_size: int) -> str:
    most = max(len({rank // node_size for rank in ranks}) for ranks in (members, others))
    return "inside a node" if most == 1 else f"over {most} nodes"


def _stage_lines(model: PipelineStages, architecture: ModelArchitecture, parallel: ParallelConfig) -> Iterator[str]:
    rows = architecture.padded_vocab_size(parallel.tensor_model_parallel_size)
    padding = f", and {model.num_padding:,} that pad the vocabulary from {architecture.vocab_size:,} to {rows:,}"
    yield (
        f"  parameters   {model.num_parameters:,} in the whole model{padding if model.num_padding else ''}; built stage by stage, each "
        f"rank holds:"
    )
    for stage in model.stages:
        trained = "" if stage.num_trained == stage.num_parameters else f", of which {stage.num_trained:,} train"
        yield f"               stage {stage.index}: {stage.num_parameters:,}{trained}; {_layers(stage)}"


def _layers(stage: PipelineStage) -> str:
    """Return the layer numbers of a stage, with consecutive layers as first..last."""
    runs: list[list[int]] = []
    for layer in stage.layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "layers " + ", ".join(f"{first}..{last}" if first < last else str(first) for first, last in runs)


def _base_lines(config: RunConfig, base: preflight.Base | None, *, values_are_read: bool) -> Iterator[str]:
    hf_path = config.model.hf_path
    if base is not None:
        values = "their values are finite" if values_are_read else "their values are checked when the run loads them"
        yield f"  base         {hf_path}: config.json, tokenizer and the headers of its weights are those of {config.model.name}; {values}"
    elif config.model.source is not None:
        yield f"  base         {hf_path} is not there yet: the run creates it ({config.model.source})"
    else:
        yield f"  base         {hf_path} is not there yet: needed before the run. Download the model there, or set model.hf_path"


def _data_lines(config: RunConfig, base: preflight.Base | None) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    tokenizer_hash = base.tokenizer_hash if base else None
    check: Check = "all" if data.verify else "changed"
    states = inspect_corpora(data.train, directory=Path(data.directory), tokenizer_hash=tokenizer_hash, check=check)
    total_weight = sum(state.weight for state in states)
    drawn = trainer.max_steps * trainer.global_batch_size * data.seq_length * get_scheme(config.method.position_scheme).text_span
    shares = [1.0, 0.0, 0.0] if data.validation else [float(share) for share in data.split.split(",")]
    for state in states:
        epochs = ""
        if state.num_tokens:
            epochs = f"; {drawn * state.weight / total_weight / (state.num_tokens * shares[0] / sum(shares)):.2f} epochs"
        yield f"  data         {state.path}: {state.description}{epochs}"
    for state in inspect_corpora(data.validation, directory=Path(data.directory), tokenizer_hash=tokenizer_hash, check=check):
        yield f"  held out     {state.path}: {state.description}"
