"""Rules for the probes, which are the measurements of a run before and after training."""

from __future__ import annotations

from endprompt_megatron.config.rule import Facts, Rule
from endprompt_megatron.config.schema import ProbesConfig

PROBED_SYSTEMS = ("base", "untrained", "trained")
RETRIEVAL_TASKS = ("single", "multi_key", "multi_value", "variable_tracking")
LONG_TEXT_TASKS = ("word", "number")  # defined in evaluation/probes/long_text.py


def _enabled(facts: Facts) -> bool:
    return facts.probes.enabled


def _shortest_window(probes: ProbesConfig) -> int:
    return min(probes.perplexity_lengths or probes.lengths, default=0)


def _lengths_beyond_the_target(facts: Facts) -> list[int]:
    return [length for length in facts.probes.lengths if length > facts.rope.target_context_length]


def _names(key: str, known: tuple[str, ...]) -> Rule:
    def broken(facts: Facts) -> bool:
        named = facts.value(key)
        return bool(set(named) - set(known)) or (_enabled(facts) and not named)

    return Rule((key,), broken, lambda facts: f"{key}={facts.value(key)}: name at least one of {', '.join(known)}, and no other.")


PROBE_RULES = (
    Rule(
        ("probes.lengths",),
        lambda facts: _enabled(facts) and not facts.probes.lengths,
        lambda facts: "probes.lengths=[]: name at least one length.",
    ),
    Rule(
        ("probes.lengths", "rope.target_context_length"),
        lambda facts: _enabled(facts) and bool(_lengths_beyond_the_target(facts)),
        lambda facts: (
            f"probes.lengths={list(facts.probes.lengths)}: {_lengths_beyond_the_target(facts)[0]} is beyond "
            f"rope.target_context_length={facts.rope.target_context_length}, the extended window. Leave it out, or set a larger target."
        ),
    ),
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
        lambda facts: _enabled(facts) and not facts.probes.needle_depths,
        lambda facts: "probes.needle_depths=[]: name at least one, between 0 (start) and 1 (end).",
    ),
    Rule(
        ("probes.perplexity_stride", "probes.perplexity_lengths", "probes.lengths"),
        lambda facts: (
            _enabled(facts)
            and facts.probes.perplexity_stride != 0
            and not 0 < facts.probes.perplexity_stride < _shortest_window(facts.probes)
        ),
        lambda facts: (
            f"probes.perplexity_stride={facts.probes.perplexity_stride}: must be less than the shortest window of "
            f"{_shortest_window(facts.probes)} tokens, so that consecutive windows overlap, or 0 for windows without overlap."
        ),
    ),
)
