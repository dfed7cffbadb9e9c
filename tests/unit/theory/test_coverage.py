"""Coverage against counting every pair, and eq. 8-9 by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.scheme import SCHEMES, SampleLayout, get_scheme
from endprompt_megatron.theory.coverage import Coverage, coverage_of, gap_of_endprompt, pairs_of_positions


def counted(positions, window: int) -> np.ndarray:
    """Pairs by distance, one by one."""
    pairs = np.zeros(window, dtype=np.int64)
    for query in range(len(positions)):
        for key in range(query + 1):
            pairs[positions[query] - positions[key]] += 1
    return pairs


@st.composite
def layouts(draw) -> SampleLayout:
    a, b = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    return SampleLayout(a, b, a + b + draw(st.integers(0, 40)), draw(st.integers(1, 5)))


@pytest.mark.parametrize("name", sorted(SCHEMES))
@settings(max_examples=60)
@given(layout=layouts(), seed=st.integers(0, 1000))
def test_every_scheme_against_counting(name, layout, seed):
    scheme = get_scheme(name)
    found = coverage_of(name, layout, samples=3, seed=seed)
    if not scheme.uses_end_prompt:
        layout = replace(layout, num_context_tokens=layout.num_context_tokens + layout.num_prompt_tokens, num_prompt_tokens=0)
    expected = sum(counted(scheme.place(layout, seed, index), layout.target_context_length) for index in range(found.samples))
    assert found.pairs.dtype == np.int64
    np.testing.assert_array_equal(found.pairs, expected)
    assert found.is_exact != scheme.varies_by_sample
    tokens = layout.num_context_tokens + layout.num_prompt_tokens
    assert found.pairs_per_sample.sum() == pytest.approx(tokens * (tokens + 1) / 2)
    assert found.share.sum() == pytest.approx(1)


def test_endprompt_by_hand():
    """a = 3, b = 2, L = 10: positions 0 1 2 8 9."""
    found = coverage_of("endprompt", SampleLayout(3, 2, 10))
    #                               0  1  2  3  4  5  6  7  8  9
    assert found.pairs.tolist() == [5, 3, 1, 0, 0, 0, 1, 2, 2, 1]
    assert found.gaps == [(3, 5)] == [gap_of_endprompt(3, 2, target_context_length=10)]
    assert found.seen_share == 0.7
    assert found.share_from(6) == 6 / 15
    assert found.binned(4).tolist() == [9 / 4, 3 / 4, 3 / 2]


@given(positions=st.sets(st.integers(0, 60), min_size=1, max_size=25))
def test_any_positions_against_counting(positions):
    ordered = np.array(sorted(positions), dtype=np.int64)
    np.testing.assert_array_equal(pairs_of_positions(ordered, target_context_length=61), counted(ordered, 61))


@given(layout=layouts())
def test_the_gap_of_equation_9_is_what_no_pair_has(layout):
    a, b, window = layout.num_context_tokens, layout.num_prompt_tokens, layout.target_context_length
    gap = gap_of_endprompt(a, b, target_context_length=window)
    assert coverage_of("endprompt", layout).gaps == ([gap] if gap else [])


def test_the_paper_main_setting():
    """8,181 tokens of text and 11 of prompt in a window of 65,536: three quarters of the distances are never seen."""
    found = coverage_of("endprompt", SampleLayout(8181, 11, 65536))
    assert found.gaps == [(8181, 57344)]
    assert found.seen_share == pytest.approx(0.25, abs=0.0003)
    assert found.pairs[-1] == 1 and found.pairs[0] == 8192 and found.pairs.sum() == 8192 * 8193 // 2


def test_drawn_counts_approach_the_exact_mean():
    """endprompt_random, all starts enumerated: the prompt starts anywhere in [a, L - b] with the same chance."""
    a, b, window = 6, 3, 24
    text = np.arange(a)
    starts = range(a, window - b + 1)
    exact = sum(counted(np.concatenate([text, np.arange(start, start + b)]), window) for start in starts) / len(starts)
    found = coverage_of("endprompt_random", SampleLayout(a, b, window), samples=4000, seed=5)
    np.testing.assert_allclose(found.pairs_per_sample, exact, atol=0.08)
    assert found.gaps == []


def test_a_seed_draws_the_same_samples():
    layout = SampleLayout(20, 4, 100)
    first, again, other = (coverage_of("pose", layout, samples=5, seed=seed).pairs for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_gaps_at_both_ends():
    assert Coverage("any", np.array([0, 2, 0, 0, 1, 0]), 1, is_exact=True).gaps == [(0, 0), (2, 3), (5, 5)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: coverage_of("endprompts", SampleLayout(5, 2, 10)), ["endprompts", "contiguous"]),
        (lambda: coverage_of("pose", SampleLayout(5, 2, 10), samples=0), ["samples=0"]),
        (lambda: coverage_of("endprompt", SampleLayout(9, 2, 10)), ["9 context", "target_context_length=10"]),
        (lambda: coverage_of("contiguous", SampleLayout(9, 2, 10)), ["11 tokens", "target_context_length=10"]),
        (lambda: gap_of_endprompt(9, 2, target_context_length=10), ["9 context", "target_context_length=10"]),
    ],
)
def test_errors_quote_the_values(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
