"""Check the configuration of a run against the ranges in the schema and against RULES, the table of all other rules. The check reports all
broken rules at once. Each rule lists the keys that it reads, and its message states a valid value."""

from __future__ import annotations

import math

from endprompt_megatron.config.layout_rules import LAYOUT_RULES
from endprompt_megatron.config.precision import PRECISION_RULES
from endprompt_megatron.config.probe_rules import PROBE_RULES
from endprompt_megatron.config.ranges import range_problems
from endprompt_megatron.config.rule import Facts, Rule, next_multiple, one_of

_ROPE_TYPES = ("none", "pi", "ntk", "abf", "yarn", "llama3")
_ADAPTER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def find_problems(facts: Facts) -> list[str]:
    """Return one message per broken rule, with the value, the rule and a fix. A rule of RULES is skipped if the value of one of its keys is
    outside its range."""
    outside = range_problems(facts.config)
    readable = (rule for rule in RULES if outside.keys().isdisjoint(rule.keys))
    return [words for found in outside.values() for words in found] + [words for rule in readable for words in rule.problems(facts)]


def is_split(text: str) -> bool:
    """Return whether a text has the form train,validation,test, with three shares >= 0 and a training share > 0."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        return False
    return len(shares) == 3 and shares[0] > 0 and all(0 <= share < math.inf for share in shares)


def _is_scaled(facts: Facts) -> bool:
    return facts.base_rope is not None and facts.base_rope.type != "none"


def _replace(facts: Facts) -> str:
    unscaled = facts.base_scaling.unscaled_window(facts.architecture.max_position_embeddings)
    factor = facts.rope.target_context_length / unscaled
    return f"rope.existing_scaling=replace rope.factor={factor:g} drops it and starts from the unscaled window of {unscaled}"


def _choose_existing_scaling(facts: Facts) -> str:
    native = facts.architecture.max_position_embeddings
    factor = facts.rope.target_context_length / native
    multiply = f"; rope.existing_scaling=multiply rope.factor={factor:g} keeps it and stretches its window of {native} further."
    return (
        f"rope.existing_scaling=null: the base's config.json already scales RoPE (type {facts.base_scaling.type}, factor "
        f"{facts.base_scaling.factor:g}). Choose: {_replace(facts)}" + (multiply if facts.base_scaling.type == "pi" else ".")
    )


_EXISTING = "rope.existing_scaling"
_EXISTING_SCALING_RULES = (
    one_of(_EXISTING, (None, "replace", "multiply"), way_out="choose replace or multiply, or null where the base has no RoPE scaling."),
    Rule(
        (_EXISTING,),
        lambda facts: facts.value(_EXISTING) in ("replace", "multiply") and not _is_scaled(facts),
        lambda facts: f"{_EXISTING}={facts.value(_EXISTING)}: the base has no RoPE scaling. Leave it null.",
    ),
    Rule((_EXISTING,), lambda facts: facts.value(_EXISTING) is None and _is_scaled(facts), _choose_existing_scaling),
    Rule(
        (_EXISTING, "rope.type"),
        lambda facts: facts.value(_EXISTING) == "multiply" and _is_scaled(facts) and {facts.base_scaling.type, facts.rope.type} != {"pi"},
        lambda facts: (
            f"{_EXISTING}=multiply with rope.type={facts.rope.type} on a base of type {facts.base_scaling.type}: only linear scaling "
            f"can be multiplied, by rope.type=pi, because config.json has no rope_type for a combination of two types. {_replace(facts)}."
        ),
    ),
)


def _theta_is_raised(facts: Facts) -> bool:
    theta = facts.rope.theta
    return theta is not None and facts.architecture.rope_theta <= theta < math.inf


def _factor_misses_the_target(facts: Facts) -> bool:
    rope = facts.rope
    return rope.type != "none" and abs(facts.factor * facts.window - rope.target_context_length) > 1e-6 * rope.target_context_length


_WINDOW_RULES = (
    one_of("rope.type", _ROPE_TYPES, way_out=f"choose one of {', '.join(_ROPE_TYPES)}."),
    Rule(
        ("rope.theta", "rope.type"),
        lambda facts: facts.rope.type == "abf" and not _theta_is_raised(facts),
        lambda facts: (
            f"rope.theta={facts.rope.theta} with rope.type=abf: must be the raised base, at least the model's own "
            f"rope_theta={facts.architecture.rope_theta:g}, e.g. rope.theta={facts.architecture.rope_theta * 10:g}."
        ),
    ),
    Rule(
        ("rope.theta", "rope.type"),
        lambda facts: facts.rope.type != "abf" and facts.rope.theta is not None,
        lambda facts: (
            f"rope.theta={facts.rope.theta} with rope.type={facts.rope.type}: applies to abf only. Set rope=abf, or rope.theta=null."
        ),
    ),
    Rule(
        ("rope.ntk_dynamic_factor", "rope.type"),
        lambda facts: facts.rope.ntk_dynamic_factor is not None and (facts.rope.type != "ntk" or not facts.rope.ntk_dynamic_factor >= 1),
        lambda facts: (
            f"rope.ntk_dynamic_factor={facts.rope.ntk_dynamic_factor} with rope.type={facts.rope.type}: applies to ntk only, and must be "
            f">= 1."
        ),
    ),
    Rule(
        ("rope.beta_slow", "rope.beta_fast"),
        lambda facts: not 0 < facts.rope.beta_slow < facts.rope.beta_fast,
        lambda facts: (
            f"rope.beta_slow={facts.rope.beta_slow}, rope.beta_fast={facts.rope.beta_fast}: 0 < slow < fast must hold (published: 1, 32)."
        ),
    ),
    Rule(
        ("rope.low_freq_factor", "rope.high_freq_factor"),
        lambda facts: not 0 < facts.rope.low_freq_factor < facts.rope.high_freq_factor,
        lambda facts: (
            f"rope.low_freq_factor={facts.rope.low_freq_factor}, rope.high_freq_factor={facts.rope.high_freq_factor}: "
            f"0 < low < high must hold (published: 1, 4)."
        ),
    ),
    Rule(
        ("rope.original_context_length",),
        lambda facts: facts.rope.original_context_length not in (None, facts.window),
        lambda facts: (
            f"rope.original_context_length={facts.rope.original_context_length}: the base's window is {facts.window}. Leave it null "
            f"to use the base's window."
        ),
    ),
    Rule(
        ("rope.target_context_length",),
        lambda facts: facts.rope.target_context_length <= facts.window,
        lambda facts: (
            f"rope.target_context_length={facts.rope.target_context_length}: must be larger than the native window of "
            f"{facts.window} positions. Set for example rope.target_context_length={2 * facts.window} rope.factor=2."
        ),
    ),
    Rule(
        ("rope.factor", "rope.type"),
        lambda facts: facts.rope.type == "none" and facts.rope.factor != 1.0,
        lambda facts: f"rope.factor={facts.rope.factor} with rope.type=none: must be 1. Set rope.type=pi to stretch.",
    ),
    Rule(
        ("rope.factor", "rope.target_context_length"),
        _factor_misses_the_target,
        lambda facts: (
            f"rope.factor={facts.rope.factor}: must equal rope.target_context_length / native window = "
            f"{facts.rope.target_context_length} / {facts.window} = {facts.rope.target_context_length / facts.window:g}. Set "
            f"rope.factor={facts.rope.target_context_length / facts.window:g}."
        ),
    ),
    Rule(
        ("data.seq_length", "rope.target_context_length"),
        lambda facts: facts.config.data.seq_length > facts.rope.target_context_length,
        lambda facts: (
            f"data.seq_length={facts.config.data.seq_length}: physical tokens must fit into "
            f"rope.target_context_length={facts.rope.target_context_length}. Set "
            f"data.seq_length={min(facts.window, facts.rope.target_context_length)} or less."
        ),
    ),
)


def _longest_prompt(facts: Facts) -> int:
    """Return b of the longest end prompt, or 0 if it is not known."""
    return max(facts.prompt_lengths or [facts.method.end_prompt_length or 0])


def _most_chunks(facts: Facts) -> int | None:
    """Return the largest possible method.num_chunks, which is the number of tokens that are divided. Return None if the scheme divides
    nothing or the length is not known."""
    lengths = {"pose": facts.config.data.seq_length, "endprompt_pose": _longest_prompt(facts)}
    return lengths.get(facts.method.position_scheme) or None


PROMPT_RULES = (
    Rule(
        ("method.num_chunks", "method.position_scheme", "method.end_prompt_length", "method.end_prompts", "data.seq_length"),
        lambda facts: facts.method.num_chunks > (_most_chunks(facts) or facts.method.num_chunks),
        lambda facts: (
            f"method.num_chunks={facts.method.num_chunks}: {facts.method.position_scheme} divides "
            f"{'a sample' if facts.method.position_scheme == 'pose' else 'an end prompt'} of {_most_chunks(facts)} tokens. Set "
            f"method.num_chunks={min(2, _most_chunks(facts) or 1)}."
        ),
    ),
    Rule(
        ("data.seq_length", "method.end_prompt_length", "method.end_prompts"),
        lambda facts: _longest_prompt(facts) > 0 and facts.config.data.seq_length - _longest_prompt(facts) < 1,
        lambda facts: (
            f"data.seq_length={facts.config.data.seq_length} with an end prompt of {_longest_prompt(facts)} tokens: the context segment "
            f"a = S - b = {facts.config.data.seq_length - _longest_prompt(facts)} must be at least 1 token. Set "
            f"data.seq_length={_longest_prompt(facts) * 8} or shorten the end prompt (method.end_prompt_length)."
        ),
    ),
)

_METHOD_RULES = (
    Rule(
        ("method.position_scheme",),
        lambda facts: facts.method.position_scheme not in facts.schemes,
        lambda facts: (
            f"method.position_scheme={facts.method.position_scheme}: no such scheme. Choose one of {', '.join(sorted(facts.schemes))}."
        ),
    ),
    Rule(
        ("method.end_prompts",),
        lambda facts: not facts.method.end_prompts,
        lambda facts: "method.end_prompts=[]: needs at least one text.",
    ),
    *PROMPT_RULES,
)


def _is_s2(facts: Facts) -> bool:
    return facts.method.attention == "s2"


_ATTENTION_RULES = (
    one_of("method.attention", ("full", "s2")),
    Rule(
        ("method.attention_groups", "data.seq_length"),
        lambda facts: (
            _is_s2(facts) and facts.method.attention_groups > 1 and facts.config.data.seq_length % (2 * facts.method.attention_groups) != 0
        ),
        lambda facts: (
            f"method.attention_groups={facts.method.attention_groups}: data.seq_length={facts.config.data.seq_length} must be a "
            f"multiple of 2*attention_groups={2 * facts.method.attention_groups}: groups are shifted by half a group. Set "
            f"data.seq_length={next_multiple(facts.config.data.seq_length, 2 * facts.method.attention_groups)}."
        ),
    ),
    Rule(
        ("method.attention", "method.attention_groups", "parallel.context_parallel_size"),
        lambda facts: _is_s2(facts) and facts.method.attention_groups >= 1 and facts.parallel.context_parallel_size > 1,
        lambda facts: (
            f"method.attention=s2 with parallel.context_parallel_size={facts.parallel.context_parallel_size}: a group has to stand whole "
            f"on a rank. Set parallel.context_parallel_size=1."
        ),
    ),
)


def _is_lora(facts: Facts) -> bool:
    return facts.config.adapter.type == "lora"


def _names_modules(facts: Facts) -> bool:
    found = list(facts.config.adapter.target_modules)
    return bool(found) and len(set(found)) == len(found) and set(found) <= set(_ADAPTER_MODULES)


_ADAPTER_RULES = (
    one_of("adapter.type", ("none", "lora")),
    Rule(
        ("adapter.rank",),
        lambda facts: _is_lora(facts) and facts.config.adapter.rank > facts.architecture.hidden_size,
        lambda facts: (
            f"adapter.rank={facts.config.adapter.rank}: must be at most the model's hidden size of {facts.architecture.hidden_size}. "
            f"LongLoRA uses 8."
        ),
    ),
    Rule(
        ("adapter.target_modules",),
        lambda facts: not _names_modules(facts),
        lambda facts: (
            f"adapter.target_modules={list(facts.config.adapter.target_modules)}: name at least one of {', '.join(_ADAPTER_MODULES)}, "
            f"each once."
        ),
    ),
)


_DATA_RULES = (
    Rule(
        ("data.train",),
        lambda facts: not facts.config.data.train,
        lambda facts: "data.train is empty: name at least one corpus, e.g. data.train='[{path: my_texts.jsonl}]'.",
    ),
    Rule(
        ("data.split",),
        lambda facts: not is_split(facts.config.data.split),
        lambda facts: f"data.split={facts.config.data.split}: needs three shares train,validation,test, e.g. 98,2,0.",
    ),
)

_TRAINER_RULES = (
    Rule(
        ("trainer.max_steps", "method.trained"),
        lambda facts: facts.method.trained and facts.config.trainer.max_steps < 1,
        lambda facts: f"trainer.max_steps={facts.config.trainer.max_steps}: must be >= 1. To train nothing, set method=untrained_pi.",
    ),
    Rule(
        ("trainer.grad_spike_factor",),
        lambda facts: 0 < facts.config.trainer.grad_spike_factor <= 1,
        lambda facts: (
            f"trainer.grad_spike_factor={facts.config.trainer.grad_spike_factor}: must be greater than 1, or 0 to switch the check off."
        ),
    ),
    one_of("trainer.bad_step", ("stop", "skip")),
    Rule(
        ("optim.lr", "optim.min_lr"),
        lambda facts: facts.config.optim.min_lr > facts.config.optim.lr,
        lambda facts: f"optim.min_lr={facts.config.optim.min_lr}: must be at most optim.lr={facts.config.optim.lr}.",
    ),
    one_of("optim.lr_schedule", ("constant", "cosine", "linear"), way_out="choose constant, cosine or linear."),
    Rule(
        ("optim.warmup_steps", "optim.lr_schedule", "trainer.max_steps"),
        lambda facts: (
            facts.method.trained
            and facts.config.optim.lr_schedule != "constant"
            and facts.config.optim.warmup_steps >= facts.config.trainer.max_steps
        ),
        lambda facts: (
            f"optim.warmup_steps={facts.config.optim.warmup_steps}: must be less than trainer.max_steps={facts.config.trainer.max_steps} "
            f"for lr_schedule={facts.config.optim.lr_schedule}."
        ),
    ),
)

_RUN_RULES = (one_of("model.source", (None, "smollm2_135m", "tiny_random"), way_out="choose smollm2_135m, tiny_random or null."),)

RULES = (
    *_EXISTING_SCALING_RULES,
    *_WINDOW_RULES,
    *_METHOD_RULES,
    *_ATTENTION_RULES,
    *_ADAPTER_RULES,
    *LAYOUT_RULES,
    *PRECISION_RULES,
    *_RUN_RULES,
    *_TRAINER_RULES,
    *_DATA_RULES,
    *PROBE_RULES,
)
