"""What makes a run's configuration wrong, in words, and what two sittings of one run may not differ in."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from endprompt_megatron.config.precision import precision_problems

if TYPE_CHECKING:  # plain numbers only: the schema imports nothing but errors and these rules
    from endprompt_megatron.config.schema import ParallelConfig, RunConfig
    from endprompt_megatron.planning.architecture import ModelArchitecture
    from endprompt_megatron.rope.scaling import RopeScaling

# Keys that may differ between the sittings of one run: how long, how often it reports, how it is cut over processes and by which kernels
# it is computed, what it does about faults, how it is probed; never what is trained.
_FREE_KEYS = (
    "dry_run",
    "control",
    "output_dir",
    "cpu_threads",
    "backend",
    "parallel",
    "trainer.max_steps",
    "trainer.micro_batch_size",
    "trainer.eval_interval",
    "trainer.eval_batches",
    "trainer.save_interval",
    "trainer.keep_last",
    "trainer.async_save",
    "trainer.log_interval",
    "trainer.bad_step",
    "trainer.max_bad_steps",
    "trainer.grad_spike_factor",
    "data.num_workers",
    "probes",
    "evaluation",  # what probes was called
    "export",
    "launch",
)
EVALUATED_SYSTEMS = ("base", "untrained", "trained")
RETRIEVAL_TASKS = ("single", "multi_key", "multi_value", "variable_tracking")
# tasks of evaluation/probes/long_text.py: key of their number of facts, and the most that it can write
LONG_TEXT_TASKS = {"word": ("planted_words", 24), "number": ("planted_numbers", 24)}
# Megatron's distributed and plain optimizers store different things
_BOUND_KEYS = ("parallel.use_distributed_optimizer",)


def find_problems(
    config: RunConfig,
    *,
    world_size: int,
    architecture: ModelArchitecture,
    schemes: tuple[str, ...],
    prompt_lengths: list[int] | None,
    base_rope: RopeScaling | None,
) -> list[str]:
    """Every broken rule, one sentence each: the value, the rule, the way out. Arguments as RunConfig.validate."""
    return [
        *_existing_scaling_problems(config, architecture, base_rope),
        *_window_problems(config, window_to_stretch(config, architecture, base_rope), architecture.rope_theta),
        *_method_problems(config, schemes, prompt_lengths),
        *_attention_problems(config),
        *_adapter_problems(config),
        *_layout_problems(config, world_size, architecture),
        *precision_problems(config, architecture),
        *_number_problems(config),
    ]


def resume_differences(stored: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two configurations train different things.

    Args:
        stored, current: of RunConfig.to_dict().
        defaults: of RunConfig().to_dict(): what a key meant before there was such a key.
    Returns:
        (dotted key, stored value, current value) of each key that one run must keep.
    """
    return _differences(stored, current, defaults, "")


def _differences(stored: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(stored.keys() | current.keys()):
        dotted = f"{prefix}{key}"
        default = defaults.get(key)
        was, now = stored.get(key, default), current.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, default if isinstance(default, dict) else {}, f"{dotted}.")
        elif not _is_free(dotted) and json.dumps(was, default=str) != json.dumps(now, default=str):
            found.append((dotted, was, now))
    return found


def _is_free(dotted: str) -> bool:
    return dotted not in _BOUND_KEYS and any(dotted == key or dotted.startswith(key + ".") for key in _FREE_KEYS)


def _existing_scaling_problems(config: RunConfig, architecture: ModelArchitecture, base_rope: RopeScaling | None) -> list[str]:
    choice, target = config.rope.existing_scaling, config.rope.target_context_length
    if choice not in (None, "replace", "multiply"):
        return [f"rope.existing_scaling={choice}: choose replace or multiply, or null where the base has no RoPE scaling."]
    if base_rope is None or base_rope.type == "none":
        return [f"rope.existing_scaling={choice}: the base has no RoPE scaling. Leave it null."] if choice else []
    native = architecture.max_position_embeddings
    unscaled = base_rope.unscaled_window(native)
    replace = f"rope.existing_scaling=replace rope.factor={target / unscaled:g} drops it and starts from the unscaled window of {unscaled}"
    multiply = f"rope.existing_scaling=multiply rope.factor={target / native:g} keeps it and stretches its window of {native} further"
    if choice is None:
        return [
            f"rope.existing_scaling=null: the base's config.json stretches its window already (type {base_rope.type}, factor "
            f"{base_rope.factor:g}). Choose: {replace}" + (f"; {multiply}." if base_rope.type == "pi" else ".")
        ]
    if choice == "multiply" and (base_rope.type != "pi" or config.rope.type != "pi"):
        return [
            f"rope.existing_scaling=multiply with rope.type={config.rope.type} on a base of type {base_rope.type}: only linear scaling can "
            f"be multiplied, by rope.type=pi, because no rope_type of config.json means two others. {replace}."
        ]
    return []


def window_to_stretch(config: RunConfig, architecture: ModelArchitecture, base_rope: RopeScaling | None) -> int:
    """Positions that rope.factor counts from: the base's window, or the one before its own scaling where that is replaced."""
    native = architecture.max_position_embeddings
    return base_rope.unscaled_window(native) if base_rope and config.rope.existing_scaling == "replace" else native


def _window_problems(config: RunConfig, native: int, theta: float) -> list[str]:
    problems = []
    rope = config.rope
    if rope.type not in ("none", "pi", "ntk", "abf", "yarn", "llama3"):
        problems.append(f"rope.type={rope.type}: choose one of none, pi, ntk, abf, yarn, llama3.")
    if rope.type == "abf" and not (rope.theta is not None and theta <= rope.theta < math.inf):
        problems.append(
            f"rope.theta={rope.theta} with rope.type=abf: must be the raised base, at least the model's own rope_theta={theta:g}, e.g. "
            f"rope.theta={theta * 10:g}."
        )
    if rope.type != "abf" and rope.theta is not None:
        problems.append(f"rope.theta={rope.theta} with rope.type={rope.type}: for abf alone. Set rope=abf, or rope.theta=null.")
    if rope.ntk_dynamic_factor is not None and (rope.type != "ntk" or not rope.ntk_dynamic_factor >= 1):
        problems.append(f"rope.ntk_dynamic_factor={rope.ntk_dynamic_factor} with rope.type={rope.type}: for ntk alone, and >= 1.")
    if not 0 < rope.beta_slow < rope.beta_fast:
        problems.append(f"rope.beta_slow={rope.beta_slow}, rope.beta_fast={rope.beta_fast}: 0 < slow < fast is needed (published: 1, 32).")
    if not 0 < rope.low_freq_factor < rope.high_freq_factor:
        problems.append(
            f"rope.low_freq_factor={rope.low_freq_factor}, rope.high_freq_factor={rope.high_freq_factor}: 0 < low < high is needed. "
            f"Published: 1 and 4."
        )
    if not math.isfinite(config.rope.factor):
        problems.append(f"rope.factor={config.rope.factor}: must be a finite number.")
    original = config.rope.original_context_length or native
    target, seq_length = config.rope.target_context_length, config.data.seq_length
    if original != native:
        problems.append(f"rope.original_context_length={original}: the base's window is {native}. Leave it null to take the base's own.")
    if target <= native:
        problems.append(
            f"rope.target_context_length={target}: must be larger than the native window of {native} positions. "
            f"Set for example rope.target_context_length={2 * native} rope.factor=2."
        )
    if config.rope.type == "none":
        if config.rope.factor != 1.0:
            problems.append(f"rope.factor={config.rope.factor} with rope.type=none: must be 1. Set rope.type=pi to stretch.")
    elif abs(config.rope.factor * native - target) > 1e-6 * target:
        problems.append(
            f"rope.factor={config.rope.factor}: must equal rope.target_context_length / native window = {target} / {native} = "
            f"{target / native:g}. Set rope.factor={target / native:g}."
        )
    if seq_length > target:
        problems.append(
            f"data.seq_length={seq_length}: physical tokens must fit into rope.target_context_length={target}. "
            f"Set data.seq_length={min(native, target)} or less."
        )
    if seq_length < 2:
        problems.append(f"data.seq_length={seq_length}: a sample needs at least 2 tokens.")
    return problems


def _method_problems(config: RunConfig, schemes: tuple[str, ...], prompt_lengths: list[int] | None) -> list[str]:
    problems = []
    method = config.method
    if method.position_scheme not in schemes:
        problems.append(f"method.position_scheme={method.position_scheme}: no such scheme. Choose one of {', '.join(sorted(schemes))}.")
    if not method.end_prompts or any(not text for text in method.end_prompts):
        problems.append(f"method.end_prompts={method.end_prompts}: needs at least one text, and none may be empty.")
    if method.end_prompt_loss_weight < 0:
        problems.append(f"method.end_prompt_loss_weight={method.end_prompt_loss_weight}: must be >= 0. The default is 0.1.")
    if method.end_prompt_length is not None and method.end_prompt_length < 1:
        problems.append(f"method.end_prompt_length={method.end_prompt_length}: must be >= 1, or null for the tokenizer's length.")
    if method.num_chunks < 1:
        problems.append(f"method.num_chunks={method.num_chunks}: must be >= 1. The default is 2.")
    lengths = prompt_lengths or ([method.end_prompt_length] if method.end_prompt_length else [])
    if lengths and config.data.seq_length - max(lengths) < 1:
        problems.append(
            f"data.seq_length={config.data.seq_length} with an end prompt of {max(lengths)} tokens: the context segment "
            f"a = S - b = {config.data.seq_length - max(lengths)} must be at least 1 token. "
            f"Set data.seq_length={max(lengths) * 8} or shorten the end prompt (method.end_prompt_length)."
        )
    return problems


def _attention_problems(config: RunConfig) -> list[str]:
    attention, groups = config.method.attention, config.method.attention_groups
    if attention not in ("full", "s2"):
        return [f"method.attention={attention}: choose full or s2."]
    if attention == "full":
        return []
    if groups < 1:
        return [f"method.attention_groups={groups}: must be >= 1. LongLoRA's is 4."]
    problems = []
    seq_length, context = config.data.seq_length, config.parallel.context_parallel_size
    if groups > 1 and seq_length % (2 * groups):
        problems.append(
            f"method.attention_groups={groups}: data.seq_length={seq_length} must be a multiple of 2*attention_groups={2 * groups}: "
            f"groups are shifted by half a group. Set data.seq_length={-(-seq_length // (2 * groups)) * 2 * groups}."
        )
    if context > 1:
        problems.append(
            f"method.attention=s2 with parallel.context_parallel_size={context}: a group has to stand whole on a rank. "
            f"Set parallel.context_parallel_size=1."
        )
    return problems


def _adapter_problems(config: RunConfig) -> list[str]:
    adapter = config.adapter
    if adapter.type not in ("none", "lora"):
        return [f"adapter.type={adapter.type}: choose none or lora."]
    if adapter.type == "none":
        return []
    problems = []
    if adapter.rank < 1:
        problems.append(f"adapter.rank={adapter.rank}: must be >= 1. LongLoRA's is 8.")
    if not 0 < adapter.alpha < math.inf:
        problems.append(f"adapter.alpha={adapter.alpha}: must be a finite number > 0. LongLoRA's is 16.")
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    found = list(adapter.target_modules)
    if not found or len(set(found)) < len(found) or not set(found) <= set(modules):
        problems.append(f"adapter.target_modules={found}: name at least one of {', '.join(modules)}, each once.")
    return problems


def cut_problems(parallel: ParallelConfig, *, world_size: int, architecture: ModelArchitecture) -> list[str]:
    """What speaks against cutting the model so over so many ranks, in sentences; nothing about batches."""
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
    }
    problems = [f"parallel.{key}={size}: must be >= 1." for key, size in sizes.items() if size < 1]
    if problems:
        return problems
    tensor, pipeline, context = sizes.values()
    for what, count in (("attention heads", architecture.num_attention_heads), ("KV heads", architecture.num_query_groups)):
        if count % tensor:
            fitting = [size for size in range(1, count + 1) if count % size == 0]
            problems.append(
                f"parallel.tensor_model_parallel_size={tensor}: must divide the model's {count} {what}. Choose one of {fitting}."
            )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and (virtual < 1 or pipeline == 1):
        problems.append(
            f"parallel.virtual_pipeline_model_parallel_size={virtual}: must be >= 1 and needs pipeline_model_parallel_size > 1. "
            f"Set it to null."
        )
    elif architecture.num_layers % (pipeline * (virtual or 1)):
        problems.append(
            f"parallel.pipeline_model_parallel_size={pipeline} x virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size}: must divide the model's {architecture.num_layers} layers."
        )
    if parallel.sequence_parallel and tensor == 1:
        problems.append("parallel.sequence_parallel=true with tensor_model_parallel_size=1: nothing to split. Set it to false.")
    if world_size % parallel.model_parallel_size:
        problems.append(
            f"world size {world_size}: must be a multiple of TP x PP x CP = {tensor} x {pipeline} x {context} = "
            f"{parallel.model_parallel_size}. Start that many processes, or set smaller sizes."
        )
    return problems


def _layout_problems(config: RunConfig, world_size: int, architecture: ModelArchitecture) -> list[str]:
    parallel, trainer = config.parallel, config.trainer
    if world_size < 1:
        return [
            f"launch.num_nodes={config.launch.num_nodes}, launch.nproc_per_node={config.launch.nproc_per_node}: both must be >= 1; null "
            f"processes are one a GPU."
        ]
    problems = cut_problems(parallel, world_size=world_size, architecture=architecture)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if min(tensor, pipeline, context) < 1:
        return problems
    if context > 1 and config.data.seq_length % (2 * context):
        problems.append(
            f"parallel.context_parallel_size={context}: data.seq_length={config.data.seq_length} must be a multiple of "
            f"2*context_parallel_size={2 * context}. Set data.seq_length={-(-config.data.seq_length // (2 * context)) * 2 * context}."
        )
    if parallel.sequence_parallel and config.data.seq_length % (tensor * context):
        problems.append(f"data.seq_length={config.data.seq_length}: sequence_parallel needs a multiple of {tensor * context}.")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        problems.append("parallel.overlap_param_gather=true: needs use_distributed_optimizer=true. Set both, or neither.")
    if parallel.recompute_granularity not in (None, "selective", "full"):
        problems.append(f"parallel.recompute_granularity={parallel.recompute_granularity}: choose null, selective or full.")
    if world_size % parallel.model_parallel_size == 0:
        step = trainer.micro_batch_size * config.data_parallel_size(world_size)
        if trainer.micro_batch_size < 1 or trainer.global_batch_size < 1 or trainer.global_batch_size % step:
            problems.append(
                f"trainer.global_batch_size={trainer.global_batch_size}: must be a positive multiple of micro_batch_size x "
                f"data-parallel size = {trainer.micro_batch_size} x {config.data_parallel_size(world_size)} = {step}."
            )
        elif virtual is not None and config.num_micro_batches(world_size) % pipeline:
            problems.append(
                f"parallel.virtual_pipeline_model_parallel_size={virtual}: the interleaved schedule needs a number of micro-batches "
                f"that is a multiple of pipeline_model_parallel_size={pipeline}, not {config.num_micro_batches(world_size)}. Change "
                f"trainer.global_batch_size or trainer.micro_batch_size."
            )
    return problems


def _number_problems(config: RunConfig) -> list[str]:
    problems = []
    if config.accelerator not in ("auto", "gpu", "cpu"):
        problems.append(f"accelerator={config.accelerator}: choose auto, gpu or cpu.")
    if config.seed < 0:
        problems.append(f"seed={config.seed}: must be >= 0.")
    if config.model.source not in (None, "smollm2_135m", "tiny_random"):
        problems.append(f"model.source={config.model.source}: choose smollm2_135m, tiny_random or null.")
    least_of = {
        "max_steps": 1 if config.method.trained else 0,
        "log_interval": 1,
        "eval_interval": 0,
        "eval_batches": 0,
        "save_interval": 0,
        "keep_last": 0,
        "max_bad_steps": 0,
    }
    for key, least in least_of.items():
        if getattr(config.trainer, key) < least:
            problems.append(f"trainer.{key}={getattr(config.trainer, key)}: must be >= {least}.")
    spike = config.trainer.grad_spike_factor
    if not (spike == 0 or 1 < spike < math.inf):
        problems.append(f"trainer.grad_spike_factor={spike}: must be greater than 1, or 0 to look for no spikes.")
    if not 0 <= config.launch.hang_timeout_minutes <= 100_000:
        problems.append(
            f"launch.hang_timeout_minutes={config.launch.hang_timeout_minutes}: must be between 0 and 100000; 0 waits for ever."
        )
    for key in ("warmup_steps", "clip_grad", "weight_decay"):
        if not getattr(config.optim, key) >= 0:
            problems.append(f"optim.{key}={getattr(config.optim, key)}: must be >= 0.")
    if config.trainer.bad_step not in ("stop", "skip"):
        problems.append(f"trainer.bad_step={config.trainer.bad_step}: choose stop or skip.")
    if config.data.num_workers < 0:
        problems.append(f"data.num_workers={config.data.num_workers}: must be >= 0.")
    if not config.export.max_shard_gib > 0:
        problems.append(f"export.max_shard_gib={config.export.max_shard_gib}: must be > 0. The default is 4.5.")
    if not (config.optim.lr > 0 and 0 <= config.optim.min_lr <= config.optim.lr < math.inf):
        problems.append(f"optim.lr={config.optim.lr}, optim.min_lr={config.optim.min_lr}: needs 0 <= min_lr <= lr and lr > 0.")
    if config.optim.lr_schedule not in ("constant", "cosine", "linear"):
        problems.append(f"optim.lr_schedule={config.optim.lr_schedule}: choose constant, cosine or linear.")
    if config.method.trained and config.optim.lr_schedule != "constant" and config.optim.warmup_steps >= config.trainer.max_steps:
        problems.append(
            f"optim.warmup_steps={config.optim.warmup_steps}: must be less than trainer.max_steps={config.trainer.max_steps} "
            f"for lr_schedule={config.optim.lr_schedule}."
        )
    if not config.data.train:
        problems.append("data.train is empty: name at least one corpus, e.g. data.train='[{path: my_texts.jsonl}]'.")
    for key, sources in (("train", config.data.train), ("validation", config.data.validation)):
        problems += [
            f"data.{key}: weight={source.weight:g} of {source.path} must be > 0. Drop a corpus rather than weigh it 0."
            for source in sources
            if not source.weight > 0
        ]
    if not config.data.validation and not is_split(config.data.split):
        problems.append(f"data.split={config.data.split}: needs three shares train,validation,test, e.g. 98,2,0.")
    probes = config.probes
    if probes.enabled:
        if not probes.lengths or min(probes.lengths) < 128:
            problems.append(f"probes.lengths={probes.lengths}: name at least one length, none under 128 tokens.")
        if probes.perplexity_lengths and min(probes.perplexity_lengths) < 2:
            problems.append(f"probes.perplexity_lengths={probes.perplexity_lengths}: windows have at least 2 tokens.")
        beyond = [length for length in probes.lengths if length > config.rope.target_context_length]
        if beyond:
            problems.append(
                f"probes.lengths={list(probes.lengths)}: {beyond[0]} is beyond rope.target_context_length="
                f"{config.rope.target_context_length}, for which the model is made. Leave it out, or set a larger target."
            )
        problems += _long_text_problems(config)
        for key, known in (("systems", EVALUATED_SYSTEMS), ("tasks", (*RETRIEVAL_TASKS, *LONG_TEXT_TASKS))):
            named = getattr(probes, key)
            if not named or set(named) - set(known):
                problems.append(f"probes.{key}={named}: name at least one of {', '.join(known)}, and no other.")
        if not probes.text:
            problems.append("probes.text is empty: name a held-out corpus, or set probes.enabled=false.")
        if not probes.needle_depths or any(not 0 <= depth <= 1 for depth in probes.needle_depths):
            problems.append(f"probes.needle_depths={probes.needle_depths}: depths are between 0 (start) and 1 (end).")
        if probes.needle_digits > 18:
            problems.append(f"probes.needle_digits={probes.needle_digits}: must be <= 18. The default is 5.")
        if probes.needle_tokens < 0:
            problems.append(f"probes.needle_tokens={probes.needle_tokens}: must be >= 0; 0 sets no bound.")
        shortest = min(probes.perplexity_lengths or probes.lengths, default=0)
        if probes.perplexity_stride and not 0 < probes.perplexity_stride < shortest:
            problems.append(
                f"probes.perplexity_stride={probes.perplexity_stride}: must be less than the shortest window of {shortest} tokens, "
                f"so that every window overlaps the one before, or 0 for windows that do not."
            )
        if probes.prefill_chunk < 0:
            problems.append(f"probes.prefill_chunk={probes.prefill_chunk}: must be >= 0; 0 reads a context whole.")
        for key in ("needle_trials", "needle_digits", "perplexity_tokens"):
            if getattr(probes, key) < 1:
                problems.append(f"probes.{key}={getattr(probes, key)}: must be >= 1.")
    return problems


def _long_text_problems(config: RunConfig) -> list[str]:
    probes, problems = config.probes, []
    for task, (key, most) in LONG_TEXT_TASKS.items():
        if task in probes.tasks and not 1 <= getattr(probes, key) <= most:
            problems.append(f"probes.{key}={getattr(probes, key)}: must be between 1 and {most}, or leave {task} out of probes.tasks.")
    if probes.long_texts < 1:
        problems.append(f"probes.long_texts={probes.long_texts}: must be >= 1.")
    shortest = min(probes.lengths, default=0)
    if probes.perplexity_tail < 0 or probes.perplexity_tail >= max(shortest, 1):
        problems.append(
            f"probes.perplexity_tail={probes.perplexity_tail}: must be >= 0 and less than the shortest of probes.lengths="
            f"{list(probes.lengths)}; 0 measures perplexity in windows instead."
        )
    return problems


def is_split(text: str) -> bool:
    """Whether a text is train,validation,test shares of which the first is some."""
    shares = _numbers(text)
    return shares is not None and len(shares) == 3 and shares[0] > 0 and all(0 <= share < math.inf for share in shares)


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None
