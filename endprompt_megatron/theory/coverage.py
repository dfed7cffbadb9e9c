"""Count how often each relative distance occurs in training under a position scheme. The counts are exact for `contiguous` and `endprompt`
(eq. 8-9). For schemes that draw positions, the counts come from random samples.

A pair consists of a query token and a key token that the query may attend to, including the query token itself. A sample of n tokens has
n (n + 1) / 2 pairs under every scheme; the scheme determines their distances. A distance is a difference of position ids, without any RoPE
scaling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import check_segments
from endprompt_megatron.positions.scheme import SampleLayout, get_scheme

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coverage:
    """Counts of every relative distance in `samples` training samples of one scheme.

    Attributes:
        scheme: value of `method.position_scheme`.
        pairs: int64 [L], number of pairs at each distance 0 .. L - 1, over all samples.
        samples: number of samples counted; 1 if all samples have the same positions.
        is_exact: whether every sample of the scheme has these counts. Otherwise the counts come from random samples, and a distance with
            the count 0 may still occur in other samples.
    """

    scheme: str
    pairs: IntArray
    samples: int
    is_exact: bool

    @property
    def target_context_length(self) -> int:
        """L, number of positions of the extended window."""
        return len(self.pairs)

    @property
    def pairs_per_sample(self) -> FloatArray:
        """Mean number of pairs per sample, by distance, float64 [L]."""
        return self.pairs / self.samples

    @property
    def share(self) -> FloatArray:
        """Share of all pairs, by distance, float64 [L]. The shares sum to 1."""
        return self.pairs / self.pairs.sum()

    @property
    def seen(self) -> BoolArray:
        """Whether each distance occurs, bool [L]."""
        return self.pairs > 0

    @property
    def seen_share(self) -> float:
        """Share of the distances 0 .. L - 1 that occur."""
        return float(self.seen.mean())

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Intervals of distances that do not occur, as (first, last), ascending."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], ~self.seen, [False]]).astype(np.int8)))
        return [(int(first), int(past) - 1) for first, past in zip(edges[::2], edges[1::2], strict=True)]

    def share_from(self, distance: int) -> float:
        """Return the share of the pairs that are at least `distance` positions apart."""
        return float(self.pairs[distance:].sum() / self.pairs.sum())

    def binned(self, width: int) -> FloatArray:
        """Return the mean number of pairs per sample and distance in bins of `width` distances, float64 [ceil(L / width)]. The last bin may
        be narrower."""
        starts = np.arange(0, len(self.pairs), width)
        return np.add.reduceat(self.pairs_per_sample, starts) / np.diff(np.append(starts, len(self.pairs)))


def coverage_of(scheme: str, layout: SampleLayout, *, samples: int = 1000, seed: int = 1234) -> Coverage:
    """Count the pairs of a scheme by distance.

    Args:
        scheme: value of `method.position_scheme`.
        layout: lengths of an EndPrompt sample. In schemes without an end prompt, the b tokens are text, so that all schemes have the same
            physical length.
        samples: number of samples to draw; ignored if all samples have the same positions.
        seed: seed of the draws, as in a training run. The sample indices are 0 .. samples - 1.
    Raises:
        ConfigError: the scheme is unknown, samples < 1, or the lengths do not fit into the window.
    Source: EndPrompt (arXiv 2605.14589), eq. 8.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples}: must be >= 1. The default is 1000.")
    found = get_scheme(scheme)
    if not found.uses_end_prompt:
        total = layout.num_context_tokens + layout.num_prompt_tokens
        layout = replace(layout, num_context_tokens=total, num_prompt_tokens=0)
    if scheme == "contiguous":
        return Coverage(scheme, _contiguous_pairs(layout), 1, is_exact=True)
    if scheme == "endprompt":
        return Coverage(scheme, _endprompt_pairs(layout), 1, is_exact=True)
    counted = 1 if not found.varies_by_sample else samples
    counter = _PairCounter(layout.target_context_length)
    for index in range(counted):
        counter.add(found.place(layout, seed, index))
    return Coverage(scheme, counter.pairs(), counted, is_exact=not found.varies_by_sample)


def gap_of_endprompt(num_context_tokens: int, num_prompt_tokens: int, *, target_context_length: int) -> tuple[int, int] | None:
    """Return the interval (first, last) of distances that occur in no EndPrompt sample, or None if every distance occurs.

    Args:
        num_context_tokens, num_prompt_tokens, target_context_length: a, b, L.
    Raises:
        ConfigError: a segment is empty, or a + b > L.
    Source: EndPrompt (arXiv 2605.14589), eq. 9: [max(a, b), L - a - b].
    """
    check_segments(num_context_tokens, num_prompt_tokens, target_context_length)
    first = max(num_context_tokens, num_prompt_tokens)
    last = target_context_length - num_context_tokens - num_prompt_tokens
    return (first, last) if first <= last else None


def pairs_of_positions(positions: IntArray, *, target_context_length: int) -> IntArray:
    """Return the number of pairs of one sample by distance, int64 [L].

    Args:
        positions: int64 [n], strictly increasing, within [0, L - 1].
        target_context_length: L.
    """
    counter = _PairCounter(target_context_length)
    counter.add(positions)
    return counter.pairs()


def _contiguous_pairs(layout: SampleLayout) -> IntArray:
    total = layout.num_context_tokens
    contiguous_positions(total, target_context_length=layout.target_context_length)  # raises ConfigError if the lengths do not fit
    return np.maximum(total - np.arange(layout.target_context_length, dtype=np.int64), 0)


def _endprompt_pairs(layout: SampleLayout) -> IntArray:
    """Count the pairs by distance as in eq. 8. Pairs lie within the context, within the prompt, or between a prompt token and a context
    token."""
    a, b, window = layout.num_context_tokens, layout.num_prompt_tokens, layout.target_context_length
    check_segments(a, b, window)
    distance = np.arange(window, dtype=np.int64)
    from_centre = distance - (window - b)  # prompt token j and context token i are L - b + j - i apart
    across = np.minimum(np.minimum(from_centre + a, b - from_centre), min(a, b))
    return np.maximum(a - distance, 0) + np.maximum(b - distance, 0) + np.maximum(across, 0)


class _PairCounter:
    """Counts pairs by distance over many samples. The work per sample grows with the number of pairs of segments, not with the number of
    pairs of tokens. A segment is a run of consecutive positions.

    As a function of distance, the number of pairs between two segments is a trapezoid, and the number of pairs within one segment is a
    falling ramp. The second differences of both functions are zero except at a few points. The class therefore adds up second differences
    and sums them twice at the end.
    """

    def __init__(self, target_context_length: int):
        self._window = target_context_length
        self._second_difference = np.zeros(target_context_length + 2, dtype=np.int64)

    def add(self, positions: IntArray) -> None:
        """Add the pairs of one sample; `positions` is int64 [n], strictly increasing."""
        ends = np.append(np.flatnonzero(np.diff(positions) != 1), len(positions) - 1)
        lengths = np.diff(ends, prepend=-1)
        starts = positions[ends] - lengths + 1
        change = self._second_difference
        for index, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            change[0] += length
            change[1] -= length + 1
            change[length + 1] += 1
            for earlier, earlier_length in zip(starts[:index].tolist(), lengths[:index].tolist(), strict=True):
                nearest = start - earlier - earlier_length + 1
                change[nearest] += 1
                change[nearest + length] -= 1
                change[nearest + earlier_length] -= 1
                change[nearest + length + earlier_length] += 1

    def pairs(self) -> IntArray:
        """Return the number of pairs added so far by distance, int64 [L]."""
        return np.cumsum(np.cumsum(self._second_difference))[: self._window]
