"""Rules that the configuration of a run must satisfy. A `Rule` contains the keys that it reads, a condition and an error message. `Facts`
is the input of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.config.schema import MethodConfig, ParallelConfig, ProbesConfig, RopeConfig, RunConfig
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Facts:
    """Input of the rules.

    Attributes:
        config: configuration of the run, with derived values filled in (config/resolved.py).
        world_size: number of ranks of the job.
        architecture: architecture of the base model.
        schemes: names of the registered position schemes.
        prompt_lengths: b of each end prompt of the cue set, in tokens; None before the tokenizer is read.
        base_rope: RoPE scaling of the base model; None means that the base is not scaled.
    """

    config: RunConfig
    world_size: int
    architecture: ModelArchitecture
    schemes: tuple[str, ...] = ()
    prompt_lengths: list[int] | None = None
    base_rope: RopeScaling | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """Parallel layout."""
        return self.config.parallel

    @property
    def rope(self) -> RopeConfig:
        """RoPE settings."""
        return self.config.rope

    @property
    def method(self) -> MethodConfig:
        """Settings of the method: positions of tokens and weights of the loss."""
        return self.config.method

    @property
    def probes(self) -> ProbesConfig:
        """Settings of the probes, which are the measurements before and after training."""
        return self.config.probes

    @property
    def window(self) -> int:
        """Window that rope.factor multiplies, in positions: the base's window, or with rope.existing_scaling=replace the window before the
        base's own scaling."""
        native = self.architecture.max_position_embeddings
        if self.base_rope is not None and self.config.rope.existing_scaling == "replace":
            return self.base_rope.unscaled_window(native)
        return native

    @property
    def factor(self) -> float:
        """s: rope.factor, filled in by `fill_in`."""
        assert self.config.rope.factor is not None
        return self.config.rope.factor

    @property
    def base_scaling(self) -> RopeScaling:
        """RoPE scaling of the base, for rules that have checked that it exists."""
        assert self.base_rope is not None
        return self.base_rope

    def value(self, key: str) -> Any:
        """Return the value of a dotted key, e.g. trainer.max_steps."""
        found: Any = self.config
        for name in key.split("."):
            found = getattr(found, name)
        return found


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        keys: dotted keys that the rule reads.
        broken: returns whether the facts break the rule.
        message: returns an error message with the value, the rule and a fix; a list of messages if several values break the rule.
    """

    keys: tuple[str, ...]
    broken: Callable[[Facts], bool]
    message: Callable[[Facts], str | list[str]]

    def problems(self, facts: Facts) -> list[str]:
        """Return the error messages; an empty list if the facts satisfy the rule."""
        if not self.broken(facts):
            return []
        found = self.message(facts)
        return [found] if isinstance(found, str) else found


def one_of(key: str, choices: Iterable[str | None], *, way_out: str | None = None) -> Rule:
    """Return the rule that the value of `key` must be one of `choices`.

    Args:
        key: dotted key.
        choices: allowed values; None stands for null.
        way_out: end of the error message; None lists the choices.
    """
    allowed = tuple(choices)
    words = [choice or "null" for choice in allowed]
    listed = way_out or f"choose {', '.join(words[:-1])} or {words[-1]}."
    return Rule((key,), lambda facts: facts.value(key) not in allowed, lambda facts: f"{key}={facts.value(key)}: {listed}")


def next_multiple(number: int, of: int) -> int:
    """Return the smallest multiple of `of` that is at least `number`."""
    return -(-number // of) * of
