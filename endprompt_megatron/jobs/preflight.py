"""Everything that can be found wrong before a process group, a file or a GPU is touched: the config's rules, the base model's files, the
tokenizer, the output directory."""

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
from endprompt_megatron.config.resolved import ResolvedRun, fill_in, with_precision
from endprompt_megatron.config.resume import resume_differences
from endprompt_megatron.config.rule import Facts
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.config.validation import PROMPT_RULES, find_problems
from endprompt_megatron.data.prompts import EndPromptSet, tokenize_end_prompts
from endprompt_megatron.errors import CheckpointError, ConfigError, OutputError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import foreign_files, hold, replace_text
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.memory import TrainedParts
from endprompt_megatron.planning.run_plan import PlanRequest
from endprompt_megatron.planning.throughput import GPUS_PER_NODE
from endprompt_megatron.positions.scheme import SCHEMES
from endprompt_megatron.rope.scaling import RopeScaling

_CONFIG_FILE, _BASE_FILE = "config.yaml", "base.json"


@dataclass(frozen=True)
class Base:
    """The base model, checked.

    Attributes:
        hf_path: its directory.
        architecture: its numbers.
        rope: its own frequencies.
        tokenizer: of transformers.
        tokenizer_hash: identity of the tokenizer.
        end_prompts: tokenised cue set; None for schemes without one.
    """

    hf_path: Path
    architecture: ModelArchitecture
    rope: RopeScaling
    tokenizer: Any
    tokenizer_hash: str
    end_prompts: EndPromptSet | None


def known_base(config: RunConfig) -> tuple[ModelArchitecture, RopeScaling]:
    """The base's numbers and frequencies: from its directory where that is there, else from the config's model.hf_config (a dry run
    before the download, or a model that is fetched on first use).

    Raises:
        CheckpointError: neither is complete, or the two contradict each other.
    """
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
    return architecture_from_hf(stored), rope_from_hf(stored)


def resolve(config: RunConfig, *, world_size: int, runs_here: bool = True) -> ResolvedRun:
    """Check every rule of a run's configuration and fill in what follows from it.

    Args:
        config: of the run; is left as it is.
        world_size: ranks of the job.
        runs_here: whether this machine runs the job; False for a plan, whose GPUs may be elsewhere.
    Raises:
        ConfigError: with all problems at once.
        CheckpointError: neither the base model's directory nor model.hf_config describes it, or they contradict each other.
        BackendUnavailableError: accelerator=gpu, and this machine has none.
    """
    from endprompt_megatron.mcore import runtime  # torch, which recipes/compare.py has no other use for

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
    """The frequencies that the run trains with, from those of the base."""
    return base_rope.extended(asdict(config.rope), max_position_embeddings=architecture.max_position_embeddings)


def check_base(run: ResolvedRun) -> Base:
    """The base model's files: config, tokenizer, end prompts, and the header of every safetensors file.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with them.
    """
    from endprompt_megatron.checkpoint.hf.weights import check_hf_weights

    config, hf_path = run.config, Path(run.config.model.hf_path)
    tokenizer = load_tokenizer(hf_path)
    architecture, rope = known_base(config)  # of a base that was made since
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
    check_token_ids(hf_path, tokenizer, num_rows=architecture.vocab_size)
    return Base(hf_path, architecture, rope, tokenizer, hash_tokenizer(hf_path), end_prompts)


def check_output_dir(config: RunConfig) -> None:
    """Whether the output directory is free, or this run's own. Writes nothing.

    Raises:
        ConfigError: it holds a run with another config, or files that are no run.
    """
    output_dir = Path(config.output_dir)
    stored_path = output_dir / _CONFIG_FILE
    if stored_path.is_file():
        differing = resume_differences(yaml.safe_load(stored_path.read_text()), config.to_dict(), RunConfig().to_dict())
        differing = [one for one in differing if one[0] != "model.hf_path"] + _base_differences(output_dir, differing, config.model.hf_path)
        if differing:
            shown = "; ".join(f"{key}: {was!r} there, {now!r} now" for key, was, now in differing[:5])
            raise ConfigError(
                f"output_dir={output_dir} holds another run ({shown}). A run is resumed by the same config only "
                f"(trainer.max_steps, intervals and the layout may change). Undo the change, or start a run of its own: add "
                f"name={_name_apart(config.name, differing)}."
            )
    elif output_dir.is_dir() and any(path.name != _BASE_FILE for path in foreign_files(output_dir)):  # written before config.yaml
        raise ConfigError(f"output_dir={output_dir} holds files but no config.yaml of a run. Set output_dir to another directory.")


def _name_apart(name: str, differing: list[tuple[str, Any, Any]]) -> str:
    """A short name that carries what is different, the same for the same difference."""
    parts = [f"{key.rpartition('.')[2]}_{now}" for key, _, now in differing if not isinstance(now, dict | list)][:2]
    named = re.sub(r"[^A-Za-z0-9.]+", "_", "_".join([name, *parts])).strip("_")
    digest = hashlib.sha256(json.dumps(differing, default=str).encode()).hexdigest()[:6]
    return named if parts and len(named) <= 60 and len(differing) <= 2 else f"{name}_{digest}"


def _base_differences(output_dir: Path, differing: list[tuple[str, Any, Any]], now: str) -> list[tuple[str, Any, Any]]:
    """The base as a difference, where its weights are not those that the run started from; where it lies does not count. Runs of before
    there was a record of the weights are known by the path."""
    was = next((was for key, was, _ in differing if key == "model.hf_path"), now)
    try:
        known = json.loads((output_dir / _BASE_FILE).read_text())["fingerprint"]
        same = known == weights_fingerprint(Path(now))
    except (OSError, ValueError, KeyError, TypeError):
        same = Path(was).resolve() == Path(now).resolve()
    return [] if same else [("model.hf_path", was, now if was != now else f"{now} with other weights")]


def claim_output_dir(config: RunConfig, *, take_lock: bool = True) -> None:
    """Make the run's output directory, with config.yaml in it, or recognise it as this run's. For one process of the job.

    Args:
        config: of the run.
        take_lock: keep other processes out; false where a process that waits for this one has the lock.
    Raises:
        ConfigError: as check_output_dir; another process runs there; or it cannot be written.
    """
    check_output_dir(config)
    output_dir = Path(config.output_dir)
    stored_path = output_dir / _CONFIG_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if take_lock:
            hold(output_dir, doing="runs there")
        check_output_dir(config)  # again: the other process may have ended in between
        base_file = output_dir / _BASE_FILE
        if not base_file.is_file():
            replace_text(base_file, json.dumps({"fingerprint": weights_fingerprint(Path(config.model.hf_path))}) + "\n")
        replace_text(stored_path, yaml.safe_dump(config.to_dict(), sort_keys=False))
    except OutputError:
        raise  # names the file
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be written ({error}). Set output_dir to a writable directory.") from error


def plan_request(run: ResolvedRun, *, num_prompt_tokens: int | None) -> PlanRequest:
    """What planning makes a run's plan of.

    Args:
        run: to plan.
        num_prompt_tokens: b; None while the tokenizer is not at hand.
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
    """What trains, as planning counts it; None where that is everything."""
    adapter = config.adapter
    if adapter.type == "none":
        return None
    key_size = architecture.key_value_size // 2
    sizes = {
        "q_proj": architecture.query_size,
        "k_proj": key_size,
        "v_proj": key_size,
        "o_proj": architecture.query_size,
    }  # beside hidden_size
    per_layer = sum(adapter.rank * (architecture.hidden_size + sizes[target]) for target in adapter.target_modules)
    return TrainedParts(per_layer, adapter.train_embeddings, adapter.train_norms)


def _host_memory_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30
