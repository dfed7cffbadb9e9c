"""Checks that run before a process group is initialised, a file is written or a GPU is used. They cover the configuration, the files of the
base model, the tokenizer and the output directory."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.fingerprint import weights_fingerprint
from endprompt_megatron.checkpoint.hf.tokenizer import check_token_ids, hash_tokenizer, load_tokenizer
from endprompt_megatron.checkpoint.training_directory import RUN_FILE
from endprompt_megatron.config.ranges import range_problems
from endprompt_megatron.config.resolved import ResolvedRun, fill_in, with_precision
from endprompt_megatron.config.resume import resume_differences
from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.config.validation import PROMPT_RULES, find_problems
from endprompt_megatron.data.prompts import EndPromptSet, tokenize_end_prompts
from endprompt_megatron.errors import CheckpointError, ConfigError, DamagedFileError, OutputError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import (
    directory_problem,
    foreign_files,
    hold,
    read_json,
    read_or_set_aside,
    read_text,
    replace_text,
    set_aside,
)
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.memory import TrainedParts
from endprompt_megatron.planning.run_plan import PlanRequest
from endprompt_megatron.planning.throughput import GPUS_PER_NODE
from endprompt_megatron.positions.scheme import SCHEMES
from endprompt_megatron.rope.scaling import RopeScaling

_CONFIG_FILE, _BASE_FILE = "config.yaml", "base.json"
_DERIVED_FROM = ("rope.", "model.")  # prefixes of the keys that other values are derived from before the rules are checked
# Files that a run writes before its first checkpoint. Each file that a later start reuses records the inputs that it was made from.
_BEFORE_RESULTS = {_BASE_FILE, "logs", "probes", "metrics.jsonl", "tensorboard", "sittings.json", "checkpoints"}
_WITHOUT_CONFIG = (
    "Neither this file nor a checkpoint identifies the run that the directory belongs to: restore the file, or remove the directory to "
    "start the run from the beginning, or set output_dir to another directory."
)


@dataclass(frozen=True)
class Base:
    """A base model whose files have passed the checks.

    Attributes:
        hf_path: directory of the model.
        architecture: sizes of the model.
        rope: RoPE scaling of the model before the run changes it.
        tokenizer: transformers tokenizer of the model.
        tokenizer_hash: hash that identifies the tokenizer.
        end_prompts: tokenised end prompts; None if the position scheme uses none.
    """

    hf_path: Path
    architecture: ModelArchitecture
    rope: RopeScaling
    tokenizer: Any
    tokenizer_hash: str
    end_prompts: EndPromptSet | None


def known_base(config: RunConfig) -> tuple[ModelArchitecture, RopeScaling]:
    """Return the architecture and the RoPE scaling of the base model. They are read from its directory if it exists, else from
    model.hf_config of the configuration (in a dry run before the download, or for a model that is fetched on first use). If the directory
    contains weights, their headers are checked.

    Raises:
        CheckpointError: the description is incomplete, the directory contradicts model.hf_config, or the weights contradict config.json.
    """
    from endprompt_megatron.checkpoint.hf.weights import check_present_weights  # imports torch

    hf_path = Path(config.model.hf_path)
    if not hf_path.exists() and config.model.hf_config:
        return architecture_from_hf(config.model.hf_config), rope_from_hf(config.model.hf_config)
    stored = read_hf_config(hf_path)
    found = {**vars(architecture_from_hf(stored)), "rope scaling": rope_from_hf(stored)}
    if config.model.hf_config:
        expected = {**vars(architecture_from_hf(config.model.hf_config)), "rope scaling": rope_from_hf(config.model.hf_config)}
        differing = [name for name, value in expected.items() if found[name] != value]
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"model.hf_path={hf_path} is not the model that model={config.model.name} describes: {name} is {found[name]} there and "
                f"{expected[name]} in model.hf_config. Point model.hf_path at the right directory, or choose another model."
            )
    check_present_weights(hf_path, architecture_from_hf(stored))
    return architecture_from_hf(stored), rope_from_hf(stored)


def resolve(config: RunConfig, *, world_size: int, runs_here: bool = True) -> ResolvedRun:
    """Check the configuration of a run against every rule and fill in the derived values.

    Args:
        config: configuration of the run; not modified.
        world_size: number of ranks of the job.
        runs_here: whether this machine runs the job. With False (a plan for other GPUs), accelerator=gpu does not require a GPU here.
    Raises:
        ConfigError: the configuration breaks a rule. The error lists all broken rules.
        CheckpointError: see known_base.
        BackendUnavailableError: accelerator=gpu, and this machine has no GPU.
    """
    from endprompt_megatron.mcore import runtime  # imports torch, which recipes/compare.py does not need otherwise

    outside = range_problems(config)
    if any(key.startswith(_DERIVED_FROM) for key in outside):
        raise ConfigError(*(words for found in outside.values() for words in found))
    architecture, base_rope = known_base(config)
    facts = Facts(config, world_size, architecture, tuple(SCHEMES), base_rope=base_rope)
    filled, notes = fill_in(config, window=facts.window)
    problems = find_problems(replace(facts, config=filled))
    if problems:
        raise ConfigError(*problems)
    for note in notes:
        get_logger().info(note)
    accelerator = filled.accelerator
    if runs_here or accelerator == "auto":
        accelerator = runtime.resolve_accelerator(accelerator)
    filled = with_precision(filled, runtime.resolve_precision(filled.precision.name, accelerator))
    return ResolvedRun(filled, world_size, accelerator, architecture, base_rope, _rope_of(filled, architecture, base_rope))


def _rope_of(config: RunConfig, architecture: ModelArchitecture, base_rope: RopeScaling) -> RopeScaling:
    """Return the RoPE scaling that the run trains with, derived from the scaling of the base model."""
    return base_rope.extended(asdict(config.rope), max_position_embeddings=architecture.max_position_embeddings)


def check_base(run: ResolvedRun) -> Base:
    """Read and check the files of the base model (config, tokenizer and the header of every safetensors file) and the settings of the later
    export, and tokenise the end prompts.

    Raises:
        ConfigError, DataError, CheckpointError: a check failed.
    """
    from endprompt_megatron.checkpoint.hf.transformers_config import check_same_config
    from endprompt_megatron.checkpoint.hf.transformers_model import check_export_settings
    from endprompt_megatron.checkpoint.hf.weights import check_hf_weights

    config, hf_path = run.config, Path(run.config.model.hf_path)
    tokenizer = load_tokenizer(hf_path)
    architecture, rope = known_base(config)  # read again: ensure_base_model may have created the model after `resolve`
    end_prompts = None
    if SCHEMES[config.method.position_scheme].uses_end_prompt:
        end_prompts = tokenize_end_prompts(
            config.method.end_prompts,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            fixed_length=config.method.end_prompt_length,
        )
        facts = Facts(config, run.world_size, architecture, tuple(SCHEMES), end_prompts.lengths, rope)
        problems = [problem for rule in PROMPT_RULES for problem in rule.problems(facts)]
        if problems:
            raise ConfigError(*problems)
    check_hf_weights(hf_path, architecture)
    check_same_config(hf_path, architecture, rope)
    check_export_settings(hf_path, run.rope, config.rope.target_context_length)
    check_token_ids(hf_path, tokenizer, num_rows=architecture.vocab_size)
    return Base(hf_path, architecture, rope, tokenizer, hash_tokenizer(hf_path), end_prompts)


def check_output_dir(config: RunConfig) -> None:
    """Check that the output directory is missing, is empty or contains this run. Writes nothing.

    Raises:
        ConfigError: the directory contains a run with another configuration, or files but no run; or output_dir or data.directory is a
            file.
    """
    output_dir = Path(config.output_dir)
    directories = {"output_dir": output_dir, "data.directory": Path(config.data.directory)}
    unusable = [problem for key, path in directories.items() if (problem := directory_problem(key, path)) is not None]
    if unusable:
        raise ConfigError(*unusable)
    names = {path.name for path in foreign_files(output_dir)} if output_dir.is_dir() else set()
    if any(map(_is_of_config, names)) or _run_files(output_dir):
        stored = _stored_config(output_dir)
        if stored is None:
            return
        differing = resume_differences(stored, config.to_dict(), RunConfig().to_dict())
        differing = [one for one in differing if one[0] != "model.hf_path"] + _base_differences(output_dir, differing, config.model.hf_path)
        if differing:
            shown = "; ".join(f"{key}: {was!r} there, {now!r} now" for key, was, now in differing[:5])
            raise ConfigError(
                f"output_dir={output_dir} holds another run ({shown}). Only the same config can resume a run "
                f"(trainer.max_steps, intervals and the layout may change). Undo the change, or start a separate run: add "
                f"name={_name_apart(config.name, differing)}."
            )
    elif any(name != _BASE_FILE for name in names):  # the base file is written before config.yaml
        raise ConfigError(f"output_dir={output_dir} holds files but no config.yaml of a run. Set output_dir to another directory.")


def _stored_config(output_dir: Path) -> dict[str, Any] | None:
    """Return the configuration of the run in an output directory. It is read from config.yaml or, if that file is damaged or missing after
    a crash, from the newest readable checkpoint. Return None if neither can be read and the directory contains no checkpoints or results.

    Raises:
        ConfigError: neither config.yaml nor a checkpoint can be read, and the directory contains checkpoints or results.
    """
    try:
        return _read_config(output_dir / _CONFIG_FILE)
    except DamagedFileError as error:
        for run_file in _run_files(output_dir):
            try:
                return _checked_config(read_json(run_file, way_out="").get("config"), run_file)
            except DamagedFileError:
                continue
        others = [path.name for path in foreign_files(output_dir) if path.name not in _BEFORE_RESULTS and not _is_of_config(path.name)]
        if others or any((output_dir / "checkpoints").glob("step_*")):
            raise ConfigError(str(error)) from error
        return None


def _is_of_config(name: str) -> bool:
    """Return whether this or an earlier release writes the configuration to a file of this name. A crash may leave any of these files."""
    return name in (_CONFIG_FILE, f"{_CONFIG_FILE}.tmp") or name.startswith(f"{_CONFIG_FILE}.damaged")


def _run_files(output_dir: Path) -> list[Path]:
    """Return the paths of run.json in all complete checkpoints, the newest first."""
    found = (output_dir / "checkpoints").glob(f"step_*/{RUN_FILE}")
    return sorted((path for path in found if path.parent.name.removeprefix("step_").isdigit()), reverse=True)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.yaml.

    Raises:
        DamagedFileError: the file does not have the form that `claim_output_dir` writes.
    """
    try:
        stored = yaml.load(read_text(path, way_out=_WITHOUT_CONFIG), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(path, f"is not YAML ({' '.join(str(error).split())})", _WITHOUT_CONFIG) from error
    return _checked_config(stored, path)


def _checked_config(stored: Any, path: Path) -> dict[str, Any]:
    defaults = RunConfig().to_dict()
    if not isinstance(stored, dict):
        raise DamagedFileError(path, f"does not hold the configuration of a run but {str(stored)[:40]!r}", _WITHOUT_CONFIG)
    if list(defaults)[-1] not in stored:  # the keys are written in the order of the defaults
        raise DamagedFileError(path, "is cut off: its last keys are missing", _WITHOUT_CONFIG)
    try:
        resume_differences(stored, defaults, defaults)
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"does not hold the configuration of a run ({error})", _WITHOUT_CONFIG) from error
    return stored


def _name_apart(name: str, differing: list[tuple[str, Any, Any]]) -> str:
    """Return a short name for a run that differs from the run `name`. The name contains one or two changed values, or else a hash of the
    differences, so that equal differences give equal names."""
    parts = [f"{key.rpartition('.')[2]}_{now}" for key, _, now in differing if not isinstance(now, dict | list)][:2]
    named = re.sub(r"[^A-Za-z0-9.]+", "_", "_".join([name, *parts])).strip("_")
    digest = hashlib.sha256(json.dumps(differing, default=str).encode()).hexdigest()[:6]
    return named if parts and len(named) <= 60 and len(differing) <= 2 else f"{name}_{digest}"


def _base_differences(output_dir: Path, differing: list[tuple[str, Any, Any]], now: str) -> list[tuple[str, Any, Any]]:
    """Return model.hf_path as a difference if the weights of the base model differ from those at the start of the run, else no difference.
    The weights are compared by fingerprint, so the model may be moved. If the run recorded no fingerprint or a fingerprint cannot be read,
    the paths are compared."""
    was = next((was for key, was, _ in differing if key == "model.hf_path"), now)
    try:
        known = read_json(output_dir / _BASE_FILE, way_out="").get("fingerprint")
        same = known == weights_fingerprint(Path(now)) if isinstance(known, str) else None
    except (OSError, DamagedFileError):
        same = None
    if same is None:
        same = Path(str(was)).resolve() == Path(now).resolve()
    return [] if same else [("model.hf_path", was, now if was != now else f"{now} with other weights")]


def _is_base(known: dict[str, Any]) -> bool:
    return isinstance(known.get("fingerprint"), str)


def claim_output_dir(config: RunConfig, *, take_lock: bool = True) -> None:
    """Create the output directory of the run, or check that it holds this run, and write config.yaml. Only one process of a job may call
    this.

    Args:
        config: configuration of the run.
        take_lock: whether to lock the directory against other processes; False if the parent process holds the lock while it waits for this
            process.
    Raises:
        ConfigError: see check_output_dir; or another process holds the lock, or the directory cannot be created or locked.
        OutputError: a file of the directory cannot be written.
    """
    check_output_dir(config)
    output_dir = Path(config.output_dir)
    stored_path = output_dir / _CONFIG_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if take_lock:
            hold(output_dir, doing="runs there")
        check_output_dir(config)  # check again: another process may have written a run before it released the lock
        base_file = output_dir / _BASE_FILE
        anew = f"the fingerprint of the base is recorded again, from the weights in {config.model.hf_path}"
        if read_or_set_aside(base_file, is_valid=_is_base, consequence=anew) is None:
            replace_text(base_file, json.dumps({"fingerprint": weights_fingerprint(Path(config.model.hf_path))}) + "\n")
        if stored_path.exists():
            try:
                _read_config(stored_path)
            except DamagedFileError as error:
                set_aside(stored_path, error.fault, consequence="it is written again for the same run")
        replace_text(stored_path, yaml.safe_dump(config.to_dict(), sort_keys=False))
    except OutputError:
        raise  # the error names the file
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({error}). Set output_dir to a writable directory.") from error


def plan_request(run: ResolvedRun, *, num_prompt_tokens: int | None) -> PlanRequest:
    """Return the input for planning a run.

    Args:
        run: run to plan.
        num_prompt_tokens: b, number of tokens of the end prompt; None if the tokenizer is not available.
    """
    config, world_size, architecture = run.config, run.world_size, run.architecture
    on_gpu = run.accelerator == "gpu"
    parallel = config.parallel
    return PlanRequest(
        experiment=config.name,
        architecture=architecture,
        world_size=world_size,
        micro_batch_size=config.trainer.micro_batch_size,
        global_batch_size=config.trainer.global_batch_size,
        max_steps=config.trainer.max_steps,
        seq_length=config.data.seq_length,
        num_prompt_tokens=num_prompt_tokens,
        target_context_length=config.rope.target_context_length,
        original_context_length=round(config.rope.target_context_length / run.factor),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        recompute_granularity=parallel.recompute_granularity,
        precision=config.precision.name,
        backend="te" if on_gpu and config.backend != "torch" and config.precision.name != "fp32" else "torch",
        position_scheme=config.method.position_scheme,
        rope_type=config.rope.type,
        rope_factor=run.factor,
        hardware=config.launch.gpu if on_gpu else None,
        device_memory_gib=None if on_gpu else _host_memory_gib() * config.launch.num_nodes / world_size,
        gpus_per_node=config.launch.nproc_per_node or GPUS_PER_NODE,
        trained=trained_parts(config, architecture),
    )


def trained_parts(config: RunConfig, architecture: ModelArchitecture) -> TrainedParts | None:
    """Return the trainable parameters of a run with adapters; None if every weight is trained."""
    adapter = config.adapter
    if adapter.type == "none":
        return None
    key_size = architecture.key_value_size // 2
    sizes = {
        "q_proj": architecture.query_size,
        "k_proj": key_size,
        "v_proj": key_size,
        "o_proj": architecture.query_size,
    }  # the dimension of each projection that is not hidden_size
    per_layer = sum(adapter.rank * (architecture.hidden_size + sizes[target]) for target in adapter.target_modules)
    return TrainedParts(per_layer, adapter.train_embeddings, adapter.train_norms)


def _host_memory_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30
