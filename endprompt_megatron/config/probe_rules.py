"""Rules for the probes, the measurements that a run makes before and after training."""

from __future__ import annotations

from endprompt_megatron.config.rule import Facts, Rule, at_least
from endprompt_megatron.config.schema import ProbesConfig

PROBED_SYSTEMS = ("base", "untrained", "trained")
RETRIEVAL_TASKS = ("single", "multi_key", "multi_value", "variable_tracking")
# tasks of evaluation/probes/long_text.py: key of their number of facts, and the most that it can write
LONG_TEXT_TASKS = {"word": ("planted_words", 24), "number": ("planted_numbers", 24)}
_SHORTEST_CONTEXT = 128  # tokens: room for a question and its answer


def _enabled(facts: Facts) -> bool:
    return facts.probes.enabled


def _shortest_window(probes: ProbesConfig) -> int:
    return min(probes.perplexity_lengths or probes.lengths, default=0)


def _lengths_beyond_the_target(facts: Facts) -> list[int]:
    return [length for length in facts.probes.lengths if length > facts.rope.target_context_length]


def _names(key: str, known: tuple[str, ...]) -> Rule:
    def broken(facts: Facts) -> bool:
        named = facts.value(key)
        return _enabled(facts) and (not named or bool(set(named) - set(known)))

    return Rule((key,), broken, lambda facts: f"{key}={facts.value(key)}: name at least one of {', '.join(known)}, and no other.")


def _number_of_facts(task: str, name: str, most: int) -> Rule:
    key = f"probes.{name}"
    return Rule(
        (key, "probes.tasks"),
        lambda facts: _enabled(facts) and task in facts.probes.tasks and not 1 <= facts.value(key) <= most,
        lambda facts: f"{key}={facts.value(key)}: must be between 1 and {most}, or leave {task} out of probes.tasks.",
    )


PROBE_RULES = (
    Rule(
        ("probes.lengths",),
        lambda facts: _enabled(facts) and (not facts.probes.lengths or min(facts.probes.lengths) < _SHORTEST_CONTEXT),
        lambda facts: f"probes.lengths={facts.probes.lengths}: name at least one length, none under {_SHORTEST_CONTEXT} tokens.",
    ),
    Rule(
        ("probes.perplexity_lengths",),
        lambda facts: _enabled(facts) and min(facts.probes.perplexity_lengths, default=2) < 2,
        lambda facts: f"probes.perplexity_lengths={facts.probes.perplexity_lengths}: windows have at least 2 tokens.",
    ),
    Rule(
        ("probes.lengths", "rope.target_context_length"),
        lambda facts: _enabled(facts) and bool(_lengths_beyond_the_target(facts)),
        lambda facts: (
            f"probes.lengths={list(facts.probes.lengths)}: {_lengths_beyond_the_target(facts)[0]} is beyond "
            f"rope.target_context_length={facts.rope.target_context_length}, for which the model is made. Leave it out, or set a "
            f"larger target."
        ),
    ),
    *(_number_of_facts(task, name, most) for task, (name, most) in LONG_TEXT_TASKS.items()),
    at_least("probes.long_texts", 1, when=_enabled),
    Rule(
        ("probes.perplexity_tail", "probes.lengths"),
        lambda facts: _enabled(facts) and not 0 <= facts.probes.perplexity_tail < max(min(facts.probes.lengths, default=0), 1),
        lambda facts: (
            f"probes.perplexity_tail={facts.probes.perplexity_tail}: must be >= 0 and less than the shortest of "
            f"probes.lengths={list(facts.probes.lengths)}; 0 measures perplexity in windows instead."
        ),
    ),
    _names("probes.systems", PROBED_SYSTEMS),
    _names("probes.tasks", (*RETRIEVAL_TASKS, *LONG_TEXT_TASKS)),
    Rule(
        ("probes.text",),
        lambda facts: _enabled(facts) and not facts.probes.text,
        lambda facts: "probes.text is empty: name a held-out corpus, or set probes.enabled=false.",
    ),
    Rule(
        ("probes.needle_depths",),
        lambda facts: (
            _enabled(facts) and (not facts.probes.needle_depths or any(not 0 <= depth <= 1 for depth in facts.probes.needle_depths))
        ),
        lambda facts: f"probes.needle_depths={facts.probes.needle_depths}: depths are between 0 (start) and 1 (end).",
    ),
    Rule(
        ("probes.needle_digits",),
        lambda facts: _enabled(facts) and facts.probes.needle_digits > 18,
        lambda facts: f"probes.needle_digits={facts.probes.needle_digits}: must be <= 18. The default is 5.",
    ),
    at_least("probes.needle_tokens", 0, more="; 0 sets no bound.", when=_enabled),
    Rule(
        ("probes.perplexity_stride", "probes.perplexity_lengths", "probes.lengths"),
        lambda facts: (
            _enabled(facts)
            and facts.probes.perplexity_stride != 0
            and not 0 < facts.probes.perplexity_stride < _shortest_window(facts.probes)
        ),
        lambda facts: (
            f"probes.perplexity_stride={facts.probes.perplexity_stride}: must be less than the shortest window of "
            f"{_shortest_window(facts.probes)} tokens, so that every window overlaps the one before, or 0 for windows that do not."
        ),
    ),
    at_least("probes.prefill_chunk", 0, more="; 0 reads a context whole.", when=_enabled),
    *(at_least(f"probes.{name}", 1, when=_enabled) for name in ("needle_trials", "needle_digits", "perplexity_tokens")),
)
