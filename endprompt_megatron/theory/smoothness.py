"""Compute the attention score of one query and one key as a function S(d) of their relative distance d, measure its largest slope, and
compare the slope with the bound that EndPrompt derives from the highest frequency (eq. 3).

RoPE rotates dimension pair i of query and key by theta_i / s radians per position. With the vectors q and k before rotation, the score is

    S(d) = sum_i A_i cos(theta_i d / s + phi_i),    A_i = |q_i| |k_i| / sqrt(head_dim),    phi_i = arg q_i - arg k_i,

where q_i is the complex number formed by the dimensions i and i + head_dim / 2 of q. Scores are taken before the softmax. With YaRN, A_i
also contains the square of the attention factor, because the factor scales both query and key. The formulas write theta_i / s, as for
position interpolation; the code uses the frequencies of any scaling in its place. Distances are in positions, slopes in score per position.

Eq. 3, sup|S'| <= (theta_0 / s) sup|S|, is Bernstein's inequality for almost periodic functions. Both suprema are taken over ALL real d.
This module measures the suprema over a finite window, where sup|S| may be smaller than over all d. The measured sup|S'| can therefore
exceed the bound computed from the measured sup|S|, so that `Smoothness.ratio` exceeds 1. The ratio is reported unchanged. Two other bounds
hold on any window: sup|S'| <= sum_i A_i theta_i / s and sup|S| <= sum_i A_i. These sums equal the suprema over all real d if the
frequencies are linearly independent over the rationals (Kronecker). All bounds hold for a fixed query and a fixed key, and do not cover
their changes during training.

Shapes: `...` is any number of leading dimensions (layers, heads, pairs of tokens), f = head_dim / 2 is the number of frequencies, and g is
the number of distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.rope.scaling import RopeScaling

FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

# Distance between grid points, in radians of the highest frequency. The grid underestimates a maximum of |S| between two points by at most
# 0.125^2 / 8 = 0.2 % of sum_i A_i.
_GRID_RADIANS = 0.125
_VALUES_AT_ONCE = 2**23  # number of values in one table; 64 MiB of float64


@dataclass(frozen=True)
class ScoreFunctions:
    """The functions S(d) of many pairs of a query and a key.

    Attributes:
        coefficients: A_i exp(j phi_i), complex128 [..., f].
        frequencies: theta_i / s in radians per position, float64 [f].
    """

    coefficients: ComplexArray
    frequencies: FloatArray

    @property
    def amplitudes(self) -> FloatArray:
        """A_i, float64 [..., f]."""
        return np.abs(self.coefficients)

    @property
    def highest_frequency(self) -> float:
        """theta_0 / s, in radians per position."""
        return float(self.frequencies.max())

    def at(self, distances: FloatArray, *, derivative: int = 0) -> FloatArray:
        """Return the values of S or of one of its derivatives.

        Args:
            distances: real distances in positions, [g].
            derivative: order of the derivative: 0 for S, 1 for S' (per position), 2 for S'' (per position squared), and so on.
        Returns:
            float64 [..., g].
        """
        angles = np.outer(self.frequencies, np.asarray(distances, dtype=np.float64))
        coefficients = self.coefficients * (1j * self.frequencies) ** derivative
        return coefficients.real @ np.cos(angles) - coefficients.imag @ np.sin(angles)

    def amplitude_share_below(self, frequency: float) -> FloatArray:
        """Return the share of sum_i A_i at frequencies up to `frequency` (radians per position), float64 [...]."""
        return self.amplitudes[..., self.frequencies <= frequency].sum(axis=-1) / self.amplitudes.sum(axis=-1)


@dataclass(frozen=True)
class Smoothness:
    """Suprema of |S|, |S'| and |S''| over the window [0, last_distance], and the bounds that eq. 3 derives from sup|S|. Arrays have the
    shape [...].

    Attributes:
        last_distance: end of the window, in positions.
        grid_step: distance between grid points, in positions.
        highest_frequency: theta_0 / s, in radians per position.
        sup_score: supremum of |S|.
        sup_slope: supremum of |S'|, in score per position.
        sup_curvature: supremum of |S''|, in score per position squared.
        amplitude_sum: sum_i A_i, an upper bound of |S| for all d.
        slope_sum: sum_i A_i theta_i / s, an upper bound of |S'| for all d.
    """

    last_distance: int
    grid_step: float
    highest_frequency: float
    sup_score: FloatArray
    sup_slope: FloatArray
    sup_curvature: FloatArray
    amplitude_sum: FloatArray
    slope_sum: FloatArray

    @property
    def bound_slope(self) -> FloatArray:
        """Bound on |S'|: (theta_0 / s) sup|S|, with sup|S| over the window."""
        return self.highest_frequency * self.sup_score

    @property
    def bound_curvature(self) -> FloatArray:
        """Bound on |S''|: (theta_0 / s)^2 sup|S|, with sup|S| over the window."""
        return self.highest_frequency**2 * self.sup_score

    @property
    def ratio(self) -> FloatArray:
        """sup|S'| / bound_slope. The ratio is 1 if the bound is attained. It exceeds 1 only if sup|S| over the window is smaller than over
        all d."""
        return self.sup_slope / self.bound_slope

    @property
    def curvature_ratio(self) -> FloatArray:
        """sup|S''| / bound_curvature."""
        return self.sup_curvature / self.bound_curvature

    @property
    def ratio_everywhere(self) -> FloatArray:
        """sum_i A_i theta_i / (theta_0 sum_i A_i), at most 1. This is the ratio of eq. 3 over all real d if the frequencies are linearly
        independent."""
        return self.slope_sum / (self.highest_frequency * self.amplitude_sum)


def score_functions(queries: npt.ArrayLike, keys: npt.ArrayLike, rope: RopeScaling) -> ScoreFunctions:
    """Return S(d) for pairs of a query and a key before rotation.

    Args:
        queries, keys: [..., head_dim], with equal or broadcastable leading dimensions. The first half of a vector contains the real parts
            and the second half the imaginary parts, as in transformers' rotate_half and in Megatron's rotary embedding.
        rope: scaling that gives the frequencies and the attention factor.
    Raises:
        ConfigError: the size of the vectors is not rope.head_dim.
    """
    queries, keys = (np.asarray(vectors, dtype=np.float64) for vectors in (queries, keys))
    if {queries.shape[-1], keys.shape[-1]} != {rope.head_dim}:
        raise ConfigError(
            f"queries of {queries.shape[-1]} and keys of {keys.shape[-1]} dimensions with head_dim={rope.head_dim}: all must be equal."
        )
    half = rope.head_dim // 2
    turned = (queries[..., :half] + 1j * queries[..., half:]) * (keys[..., :half] - 1j * keys[..., half:])
    return ScoreFunctions(turned * rope.attention_factor**2 / np.sqrt(rope.head_dim), rope.inv_freq().astype(np.float64))


def measure_smoothness(functions: ScoreFunctions, *, last_distance: int) -> Smoothness:
    """Measure the suprema over the window, on a grid with a step of an eighth of a radian of the highest frequency.

    Args:
        functions: functions of any number of pairs.
        last_distance: L - 1, in positions; the window is the real interval [0, L - 1].
    """
    shape = functions.coefficients.shape[:-1]
    points = int(np.ceil(last_distance * functions.highest_frequency / _GRID_RADIANS)) + 1
    grid = np.linspace(0, last_distance, max(points, 2))
    flat = ScoreFunctions(functions.coefficients.reshape(-1, len(functions.frequencies)), functions.frequencies)
    suprema = np.zeros((3, flat.coefficients.shape[0]))
    for part in _in_parts(grid, len(suprema[0])):
        for derivative in range(3):
            values = np.abs(flat.at(part, derivative=derivative)).max(axis=-1)
            np.maximum(suprema[derivative], values, out=suprema[derivative])
    return Smoothness(
        last_distance=last_distance,
        grid_step=float(grid[1] - grid[0]),
        highest_frequency=functions.highest_frequency,
        sup_score=suprema[0].reshape(shape),
        sup_slope=suprema[1].reshape(shape),
        sup_curvature=suprema[2].reshape(shape),
        amplitude_sum=functions.amplitudes.sum(axis=-1),
        slope_sum=functions.amplitudes @ functions.frequencies,
    )


def reach_of_bound(frequency: float) -> float:
    """Return how many positions away from a known value of S the slope bound |S'| <= `frequency` * sup|S| still constrains S:
    2 / frequency.

    That many positions away, the bound allows a change of 2 sup|S|, which is the largest change that S can make. The sharper inequality of
    Bernstein and Szego, S'^2 + frequency^2 S^2 <= frequency^2 sup|S|^2, constrains S up to pi / frequency.
    """
    return 2 / frequency


def frequency_held_across(gap: tuple[int, int]) -> float:
    """Return the highest frequency (radians per position) whose slope bound constrains S up to the middle of a gap.

    Args:
        gap: (first, last) distance that is not observed. The distances first - 1 and last + 1 are observed.
    """
    first, last = gap
    return 4 / (last - first + 2)


def outside_of_observed(functions: ScoreFunctions, gap: tuple[int, int], *, last_distance: int) -> tuple[FloatArray, FloatArray]:
    """Measure how far scores in the gap lie outside the range of the scores at observed distances, for the same query and key.

    Args:
        functions: functions of any number of pairs.
        gap: (first, last) distance that is not observed. All other integer distances in 0 .. last_distance are observed.
        last_distance: L - 1.
    Returns:
        (share of the distances in the gap whose score lies outside [min, max] of the observed scores, largest excess as a share of
        max - min), both float64 [...].
    """
    first, last = gap
    flat = ScoreFunctions(functions.coefficients.reshape(-1, len(functions.frequencies)), functions.frequencies)
    rows = len(flat.coefficients)
    observed = np.concatenate([np.arange(first), np.arange(last + 1, last_distance + 1)])
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    for part in _in_parts(observed, rows):
        scores = flat.at(part)
        low, high = np.minimum(low, scores.min(axis=-1)), np.maximum(high, scores.max(axis=-1))
    outside, excess = np.zeros(rows), np.zeros(rows)
    for part in _in_parts(np.arange(first, last + 1), rows):
        scores = flat.at(part)
        over = np.maximum(scores - high[:, None], low[:, None] - scores)
        outside += (over > 0).sum(axis=-1)
        excess = np.maximum(excess, over.max(axis=-1))
    shape = functions.coefficients.shape[:-1]
    return (outside / (last - first + 1)).reshape(shape), (excess / (high - low)).reshape(shape)


def _in_parts(distances: npt.NDArray, rows: int) -> Iterator[npt.NDArray]:
    """Yield the distances in parts, so that a table [rows, part] has at most _VALUES_AT_ONCE values."""
    width = max(1, _VALUES_AT_ONCE // max(1, rows))
    for start in range(0, len(distances), width):
        yield distances[start : start + width]
