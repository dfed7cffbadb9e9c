"""Main job of the package. It reads a Hugging Face model, trains it on Megatron-Core and writes a Hugging Face model with a longer context
window. It probes the model before and after training and writes a report. Every rank of a job calls `extend`; a job may have a single
rank."""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE
from endprompt_megatron.checkpoint.hf.exporter import export_hf
from endprompt_megatron.checkpoint.hf.fingerprint import weights_fingerprint
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD, model_card
from endprompt_megatron.checkpoint.hf.peft_adapter import export_peft_adapter
from endprompt_megatron.checkpoint.hf.sources import ensure_base_model
from endprompt_megatron.checkpoint.hf.verify import format_findings, verify_export
from endprompt_megatron.checkpoint.training import RunState
from endprompt_megatron.config.resolved import ResolvedRun
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.data.corpora import check_corpora, prepare_corpora
from endprompt_megatron.data.dataset import TokenizerFacts, build_datasets
from endprompt_megatron.data.manifest import Check
from endprompt_megatron.evaluation.probes.results import Probes, probe_system
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.run_metadata import Run, conditions_of_run, provenance_of_run, summary_of_run
from endprompt_megatron.jobs.run_probes import check_probe_memory, make_probes
from endprompt_megatron.jobs.sittings import Sittings
from endprompt_megatron.jobs.stage_times import StageTimes
from endprompt_megatron.launch import launcher
from endprompt_megatron.launch.processes import sweep_multiprocessing_directories
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.model import backends
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.fusions import choose_fusions
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.precision import describe_precision
from endprompt_megatron.output_files import check_not_moved, explained_if_moved, make_directory, release, replace_text
from endprompt_megatron.positions.scheme import get_scheme
from endprompt_megatron.report.reach import reach_sentences
from endprompt_megatron.report.run import format_table, format_terminal_table, native_window, write_report
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.training.metrics import peak_memory_gib
from endprompt_megatron.training.signals import StopRequests
from endprompt_megatron.training.trainer import Trainer, TrainingResult
from endprompt_megatron.training.watchdog import Watchdog


def extend(config: RunConfig) -> dict[str, Any]:
    """Run the main job, or resume it from its output directory.

    Args:
        config: configuration of the run.
    Returns:
        The content of summary.json.
    Raises:
        ConfigError, DataError, CheckpointError, BackendUnavailableError: a check failed. If possible, checks run before anything is
            launched or written.
        OutputError: a file of the output directory cannot be written. Complete files are kept.
        TrainingError: a step was bad and trainer.bad_step=stop.
        RunInterrupted: SIGTERM or SIGUSR1 stopped the run.
    """
    try:
        with StopRequests() as stop:
            return _run(config, stop)
    finally:
        release(Path(config.output_dir))


def _run(config: RunConfig, stop: StopRequests) -> dict[str, Any]:
    started, times = time.monotonic(), StageTimes()
    sweep_multiprocessing_directories()
    with times.stage("prepare"):
        resolved, base = prepare(config)
    config, accelerator = resolved.config, resolved.accelerator
    backend = backends.resolve(config.backend, accelerator=accelerator, precision=config.precision.name)
    output_dir = Path(config.output_dir)
    for line in [*base.end_prompts.notes, *base.end_prompts.describe()] if base.end_prompts else ():
        get_logger().info(line)
    if accelerator == "cpu" and config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    runtime = mcore_runtime.initialize(
        config.parallel,
        accelerator=accelerator,
        seed=config.seed,
        # longer than the watchdog's timeout, because the watchdog's report has more detail than the timeout of a collective
        timeout_minutes=2 * config.launch.hang_timeout_minutes or None,
    )
    try:
        backends.assert_same_everywhere(backend)
        # precision=auto is measured on the CPU of each rank and may differ between ranks
        resolved = resolved.with_precision(mcore_runtime.from_rank_zero(config.precision.name))
        config = resolved.config
        fusions = choose_fusions(
            has_te_kernels=backend.has_te_kernels,
            positions_shared=_shares_positions(config, base),
            attention_factor=resolved.rope.attention_factor,
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        )
        precision = describe_precision(config.precision.name, _bf16_layers(config))
        get_logger().info(f"backend {backend.name}: {backend.description}; precision {precision}; {fusions.describe()}")
        failures = FailureBoard()
        with (
            Watchdog(0, failures),  # only rank 0 writes; if a write fails, the watchdog ends the other ranks
            explained_if_moved(output_dir),
            Sittings(output_dir, times, started=started) as sittings,
        ):
            return _extend(Run(resolved, base, output_dir, runtime, backend, fusions, stop, times, sittings, failures))
    finally:
        mcore_runtime.shut_down()


def prepare(config: RunConfig) -> tuple[ResolvedRun, preflight.Base]:
    """Run the checks that need no process group, and create the base model if model.source names one. Rank 0 also claims the output
    directory and, if no launcher started this process, prepares the text. Under a launcher, the other ranks are already waiting, and
    `_prepare_run` prepares the text after the process group is initialised.

    Args:
        config: configuration of the run.
    Returns:
        (the resolved run, the base model)
    Raises:
        ConfigError, DataError, CheckpointError, BackendUnavailableError: a check failed.
    """
    world_size = launcher.planned_world_size(config)
    run = preflight.resolve(config, world_size=world_size)
    config, accelerator = run.config, run.accelerator
    if not launcher.starts_workers(config):  # workers select their own GPUs
        mcore_runtime.select_device(accelerator)
        backends.resolve(config.backend, accelerator=accelerator, precision=config.precision.name)
    ensure_base_model(config.model.source, Path(config.model.hf_path))
    base = preflight.check_base(run)
    check_probe_memory(run)
    if global_rank() == 0:
        preflight.check_output_dir(config)
        if not launcher.is_worker():
            _prepare_text(config, base, check="all" if config.data.verify else "changed")
            if config.probes.enabled:
                check_corpora(config.probes.text, directory=Path(config.data.directory))
        preflight.claim_output_dir(config, take_lock=not launcher.launched_by_plain_start())
    return run, base


def _extend(run: Run) -> dict[str, Any]:
    config = run.config
    with run.times.stage("prepare"):
        blends, data_hashes, probes = _prepare_run(run)
        chunks = _base_chunks(run)
    if config.rope.existing_scaling:
        get_logger().info(f"the base's own RoPE scaling ({_words(run.base.rope)}): {config.rope.existing_scaling}; now {_words(run.rope)}")
    systems: dict[str, Any] = {}
    probed = config.probes.systems if probes else []
    if probes and "base" in probed:
        systems["base"] = _probe(run, probes, chunks, "base", "base model, untouched", rope=run.base.rope)
    if probes and ("untrained" in probed or (probed and not config.method.trained)):
        systems["untrained"] = _probe(run, probes, chunks, "untrained", f"base with {_words(run.rope)}, no training", rope=run.rope)
    provenance = provenance_of_run(run, data_hashes)
    with run.times.stage("train"):
        result = _train(run, chunks, blends, run.output_dir, config, provenance)
    check_not_moved(run.output_dir)
    with run.times.stage("export"):
        export = _export(run, chunks, result, provenance)
    if probes and "trained" in probed and config.method.trained:
        label = f"after {config.method.name}, {result.state.step} steps"
        systems["trained"] = _probe(run, probes, chunks, "trained", label, rope=run.rope, state=result.state)
    if config.control and config.method.trained:
        systems["control"] = _train_control(run, blends, probes)
    check_not_moved(run.output_dir)
    summary = summary_of_run(run, result, systems, export)
    if global_rank() == 0:
        _write_results(run, systems, summary, probes, export)
    return summary


def _write_results(run: Run, systems: dict[str, Any], summary: dict[str, Any], probes: Probes | None, export: Path) -> None:
    """Write evaluation.json, summary.json, the report and the model card, and log the results."""
    if probes:
        conditions = {**probes.conditions(), **conditions_of_run(run)}
        _write_json(run.output_dir / "evaluation.json", {"conditions": conditions, "systems": systems})
    _write_json(run.output_dir / "summary.json", summary)
    page = write_report(run.output_dir)
    if probes:
        evaluation = json.loads((run.output_dir / "evaluation.json").read_text())
        _write_model_card(run, export, evaluation)
        lines = [format_terminal_table(evaluation), "", *reach_sentences(evaluation["systems"], native=native_window(summary))]
        get_logger().info("\n" + "\n".join(lines))
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["stage_seconds"].items())
    sittings = f", in {summary['sittings']} sittings" if summary["sittings"] > 1 else ""
    get_logger().info(f"time: {spent}; {summary['wall_seconds']:.0f} s in all{sittings}")
    get_logger().info(f"model {export}\nreport {page}")


def _prepare_run(run: Run) -> tuple[tuple[Any, Any], dict[str, str], Probes | None]:
    """Prepare the text and the probes. Return ((training text, validation text), hashes of the text, probes or None)."""
    config = run.config
    # one rank per host prepares the text; the other ranks wait and then reuse the files
    if run.runtime.world_size > 1 or launcher.is_worker():
        if run.runtime.local_rank == 0:
            # a run without a launcher verified the data before it started this process
            verify = config.data.verify and not launcher.launched_by_plain_start()
            _prepare_text(config, run.base, check="all" if verify else "changed")
            if config.probes.enabled:
                check_corpora(config.probes.text, directory=Path(config.data.directory))
        torch.distributed.barrier()
    blends, data_hashes = _prepare_text(config, run.base, check="sizes")  # the contents were checked before
    probes = None
    if config.probes.enabled and config.parallel.context_parallel_size == 1:
        probes = make_probes(config, run.base)
    elif config.probes.enabled:
        get_logger().info(
            f"no probes: parallel.context_parallel_size={config.parallel.context_parallel_size} splits a context over ranks, and probes "
            f"need the whole context on each rank. Start the same command with parallel.context_parallel_size=1 afterwards: it probes the "
            f"trained model without training again."
        )
    return blends, data_hashes, probes


def _prepare_text(config: RunConfig, base: preflight.Base, *, check: Check) -> tuple[tuple[Any, Any], dict[str, str]]:
    data = config.data
    options = dict(directory=Path(data.directory), tokenizer=base.tokenizer, tokenizer_hash=base.tokenizer_hash)
    train, hashes = prepare_corpora(data.train, **options, check=check)
    if not data.validation:
        return (train, None), hashes
    validation, more = prepare_corpora(data.validation, **options, check=check)
    return (train, validation), {**hashes, **more}


def _base_chunks(run: Run) -> list[EndPromptGPTModel]:
    chunks = build_model_chunks(
        run.base.architecture,
        rope=run.rope,
        max_sequence_length=run.config.rope.target_context_length,
        parallel=run.config.parallel,
        precision=run.config.precision.name,
        backend=run.backend,
        device=run.runtime.device,
        bf16_layers=_bf16_layers(run.config),
        fusions=run.fusions,
        adapter=run.config.adapter,
        attention_groups=run.config.method.attention_groups if run.config.method.attention == "s2" else None,
        seed=run.config.seed,
    )
    load_hf_weights(chunks, run.base.hf_path, run.base.architecture)
    return chunks


def _shares_positions(config: RunConfig, base: preflight.Base) -> bool:
    """Return whether all samples of a micro-batch have the same positions in training. The value also holds for the control, whose
    contiguous positions are the same for all samples."""
    lengths = base.end_prompts.lengths if base.end_prompts else []
    scheme = get_scheme(config.method.position_scheme)
    return scheme.shares_positions(prompt_lengths=lengths, micro_batch_size=config.trainer.micro_batch_size)


def _bf16_layers(config: RunConfig) -> tuple[int, int]:
    return config.precision.num_layers_at_start_in_bf16, config.precision.num_layers_at_end_in_bf16


def _words(rope: RopeScaling) -> str:
    return f"{rope.type.upper()} x{rope.factor:g}"


def _probe(
    run: Run, probes: Probes, chunks: list[EndPromptGPTModel], name: str, label: str, *, rope: RopeScaling, state: RunState | None = None
) -> dict[str, Any]:
    """Probe one system, or read its cached results.

    Args:
        run: the run.
        probes: questions and texts of the probes.
        chunks: model chunks of this rank.
        name: name of the system, base | untrained | trained | control.
        label: label of the system in tables.
        rope: RoPE scaling to probe with. Afterwards, the chunks have the run's RoPE scaling again.
        state: state of the system's training; None for the base without training.
    """
    for chunk in chunks:
        chunk.set_rope(rope)
    cache = run.output_dir / "probes" / (f"{name}.json" if state is None else f"{name}_step_{state.step:07d}.json")
    check_not_moved(run.output_dir)
    with run.times.stage(f"probe {name}"):
        found = probe_system(
            name, label, chunks, probes, device=run.runtime.device, cache=cache,
            kept_beside=run.base.hf_path if state is None else None,
            weights=[weights_fingerprint(run.base.hf_path), *(state.identity() if state else [])],
        )  # fmt: skip
    for chunk in chunks:
        chunk.set_rope(run.rope)
    return found


def _train(
    run: Run,
    chunks: list[EndPromptGPTModel],
    blends: tuple[Any, Any],
    output_dir: Path,
    config: RunConfig,
    provenance: dict[str, Any] | None = None,
) -> TrainingResult:
    for chunk in chunks:
        chunk.assert_rope(run.rope)
    if not config.method.trained:
        return TrainingResult(RunState(), 0.0, peak_memory_gib(run.runtime.device))
    trainer_config = config.trainer
    evaluations = trainer_config.eval_batches * trainer_config.global_batch_size if trainer_config.eval_interval else 0
    train_dataset, validation_dataset = build_datasets(
        *blends,
        split=config.data.split,
        seq_length=config.data.seq_length,
        num_train_samples=trainer_config.max_steps * trainer_config.global_batch_size,
        num_validation_samples=evaluations,
        seed=config.seed,
        tokenizer=TokenizerFacts(run.base.architecture.vocab_size, run.base.tokenizer.eos_token_id, run.base.tokenizer_hash),
        cache_dir=Path(config.data.directory) / "indices",
        position_scheme=config.method.position_scheme,
        target_context_length=config.rope.target_context_length,
        end_prompts=run.base.end_prompts,
        end_prompt_loss_weight=config.method.end_prompt_loss_weight,
        num_chunks=config.method.num_chunks,
        verify=config.data.verify,
    )
    trainer = Trainer(
        config,
        run.runtime,
        chunks,
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        output_dir=output_dir,
        stop=run.stop,
        provenance=provenance,
        failures=run.failures,
    )
    return trainer.train()


def _train_control(run: Run, blends: tuple[Any, Any], probes: Probes | None) -> dict[str, Any] | None:
    """Train the control from the same base model with contiguous positions and no end prompt, and probe it if probes are enabled."""
    get_logger().info("control: the same training with contiguous positions and no end prompt")
    method = replace(run.config.method, name="control_short_pi", position_scheme="contiguous")
    config = replace(run.config, method=method)
    directory = run.output_dir / "control"
    if global_rank() == 0:
        make_directory(directory)
    with run.times.stage("train control"):
        chunks = _base_chunks(run)
        result = _train(run, chunks, blends, directory, config)
    if probes is None:
        return None
    label = f"control without the anchor, {result.state.step} steps"
    return _probe(run, probes, chunks, "control", label, rope=run.rope, state=result.state)


def _export(run: Run, chunks: list[EndPromptGPTModel], result: TrainingResult, provenance: dict[str, Any]) -> Path:
    config = run.config

    def verify(written: Path) -> None:
        findings = verify_export(
            chunks,
            written,
            architecture=run.base.architecture,
            rope=run.rope,
            target_context_length=config.rope.target_context_length,
        )
        get_logger().info(f"{run.output_dir / 'hf'} verified with transformers\n{format_findings(findings)}")

    export = export_hf(
        chunks,
        run.output_dir / "hf",
        base_hf_path=run.base.hf_path,
        architecture=run.base.architecture,
        rope=run.rope,
        target_context_length=config.rope.target_context_length,
        max_shard_bytes=int(config.export.max_shard_gib * 2**30),
        provenance={
            **provenance,
            "steps": result.state.step,
            "tokens": result.state.tokens,
            "exported_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        verify=verify if config.export.verify else None,
    )
    if config.adapter.type == "lora":
        check_not_moved(run.output_dir)
        adapter = export_peft_adapter(
            chunks,
            run.output_dir / "adapter",
            base_hf_path=run.base.hf_path,
            architecture=run.base.architecture,
            adapter=config.adapter,
        )
        get_logger().info(f"adapter {adapter} (for peft; load it on the base with the RoPE scaling of {export / 'config.json'})")
    return export


def _write_model_card(run: Run, export: Path, evaluation: dict[str, Any]) -> None:
    """Write the measured results into the model card of the export."""
    results = (
        f"{format_table(evaluation)}\n\nThe table shows retrieval of planted facts and perplexity by context length in tokens, at "
        f"contiguous positions. Brackets contain the share of correct parts of the answer and the log-probability of the answer in nats. "
        f"The experiment `{run.config.name}` reproduces this table."
    )
    provenance = json.loads((export / PROVENANCE_FILE).read_text())
    replace_text(export / MODEL_CARD, model_card(provenance, base_hf_path=run.base.hf_path, results=results))


def _write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=2) + "\n")
