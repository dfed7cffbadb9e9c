"""Measure the effect of training in one run. The trained model is compared with the base that has the new RoPE and no training, on the
same questions and held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from endprompt_megatron.comparison.bootstrap import bootstrap_interval


@dataclass(frozen=True)
class PairedChange:
    """Change of a measure with its 95% interval over paired units. A unit is a part of the measured material that both systems have scored,
    such as a block of tokens.

    Attributes:
        change: value after training minus value before, mean over units.
        low, high: bootstrap interval of the change over units.
        units: number of units.
    """

    change: float
    low: float
    high: float
    units: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class AnswerChange:
    """Right answers of two systems to the same questions.

    Attributes:
        before, after: number of right answers.
        questions: number of questions.
        p: p-value of a two-sided sign test over the questions that only one system answered right. Questions about one fact at several
            lengths count separately although they are not independent, so p may be too small.
    """

    before: int
    after: int
    questions: int
    p: float


def answer_change(before: Mapping[str, Any], after: Mapping[str, Any], lengths: Iterable[int]) -> AnswerChange | None:
    """Compare {length: scores with records} of two systems at these lengths. Lengths at which the distances in the records differ are left
    out, because the systems then answered different questions. Return None if no question is left."""
    pairs: list[tuple[bool, bool]] = []
    for length in lengths:
        mine, theirs = (list((system.get(str(length)) or {}).get("records") or []) for system in (after, before))
        if not mine or [row[4] for row in mine] != [row[4] for row in theirs]:
            continue
        pairs += [(bool(one[1]), bool(other[1])) for one, other in zip(theirs, mine, strict=True)]
    if not pairs:
        return None
    lost, won = (sum(pair == which for pair in pairs) for which in ((True, False), (False, True)))
    p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return AnswerChange(sum(one for one, _ in pairs), sum(other for _, other in pairs), len(pairs), p)


def loss_change(before: Mapping[str, Any], after: Mapping[str, Any], lengths: Iterable[int]) -> PairedChange | None:
    """Compare {length: [mean loss of a block of tokens]} of two systems at these lengths, in nats per token. Lengths with different numbers
    of blocks are left out, because the systems then scored different tokens. Return None if fewer than two blocks are left."""
    differences: list[float] = []
    for length in lengths:
        mine, theirs = after.get(str(length)) or [], before.get(str(length)) or []
        if len(mine) == len(theirs):
            differences += [one - other for one, other in zip(mine, theirs, strict=True)]
    if not differences:
        return None
    low, high = bootstrap_interval(differences)
    return PairedChange(float(np.mean(differences)), low, high, len(differences)) if not math.isnan(low) else None
