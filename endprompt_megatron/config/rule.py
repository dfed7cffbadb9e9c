"""The form of a rule that a run's configuration must satisfy: which keys it reads, when it is broken, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.config.schema import MethodConfig, ParallelConfig, ProbesConfig, RopeConfig, RunConfig
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Facts:
    """The input of the rules.

    Attributes:
        config: configuration of the run, with derived values filled in (config/resolved.py).
        world_size: ranks of the job.
        architecture: architecture of the base model.
        schemes: names of the registered position schemes.
        prompt_lengths: b of each end prompt of the cue set, in tokens; None before the tokenizer is read.
        base_rope: frequencies of the base model; None for unscaled ones.
    """

    config: RunConfig
    world_size: int
    architecture: ModelArchitecture
    schemes: tuple[str, ...] = ()
    prompt_lengths: list[int] | None = None
    base_rope: RopeScaling | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""
        return self.config.parallel

    @property
    def rope(self) -> RopeConfig:
        """The RoPE settings."""
        return self.config.rope

    @property
    def method(self) -> MethodConfig:
        """The method settings: positions of tokens and weights of the loss."""
        return self.config.method

    @property
    def probes(self) -> ProbesConfig:
        """The settings of the probes, the measurements that a run makes before and after training."""
        return self.config.probes

    @property
    def window(self) -> int:
        """Positions that rope.factor counts from: the base's window, or the one before its own scaling where that is replaced."""
        native = self.architecture.max_position_embeddings
        if self.base_rope is not None and self.config.rope.existing_scaling == "replace":
            return self.base_rope.unscaled_window(native)
        return native

    @property
    def factor(self) -> float:
        """s: rope.factor, which resolving has filled in."""
        assert self.config.rope.factor is not None
        return self.config.rope.factor

    @property
    def base_scaling(self) -> RopeScaling:
        """The scaling that the base has already, for rules that know there is one."""
        assert self.base_rope is not None
        return self.base_rope

    def value(self, key: str) -> Any:
        """The value of a dotted key, e.g. trainer.max_steps."""
        found: Any = self.config
        for name in key.split("."):
            found = getattr(found, name)
        return found


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        keys: dotted keys that it reads.
        broken: whether the facts break it.
        message: the value, the rule and the way out, in a sentence; a list where several values break it.
    """

    keys: tuple[str, ...]
    broken: Callable[[Facts], bool]
    message: Callable[[Facts], str | list[str]]

    def problems(self, facts: Facts) -> list[str]:
        """Return the error messages; empty if the facts comply with the rule."""
        if not self.broken(facts):
            return []
        found = self.message(facts)
        return [found] if isinstance(found, str) else found


def one_of(key: str, choices: Iterable[str | None], *, way_out: str | None = None) -> Rule:
    """The value is one of a list."""
    allowed = tuple(choices)
    words = [choice or "null" for choice in allowed]
    listed = way_out or f"choose {', '.join(words[:-1])} or {words[-1]}."
    return Rule((key,), lambda facts: facts.value(key) not in allowed, lambda facts: f"{key}={facts.value(key)}: {listed}")


def at_least(key: str, least: float, *, more: str = "", when: Callable[[Facts], bool] = lambda facts: True) -> Rule:
    """The value is a number of at least `least`; NaN is none.

    Args:
        more: said after the rule, with what separates it, e.g. " The default is 5.".
        when: where the rule counts.
    """
    return Rule(
        (key,),
        lambda facts: when(facts) and not facts.value(key) >= least,
        lambda facts: f"{key}={facts.value(key)}: must be >= {least:g}{more or '.'}",
    )


def finite(number: float) -> bool:
    """Whether a number is neither infinite nor NaN."""
    return math.isfinite(number)


def next_multiple(number: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `number`."""
    return -(-number // of) * of
