"""Positions: hand-worked samples of eq. 5, and what every registered scheme owes to the trainer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.positions.scheme import SCHEMES, SampleLayout, get_scheme


@pytest.mark.parametrize(
    ("a", "b", "window", "expected"),
    [
        (3, 2, 10, [0, 1, 2, 8, 9]),
        (1, 1, 2, [0, 1]),
        (1, 1, 65536, [0, 65535]),
        (4, 3, 7, [0, 1, 2, 3, 4, 5, 6]),  # a + b = L: no gap
        (2, 4, 8, [0, 1, 4, 5, 6, 7]),  # the prompt may be the longer part
    ],
)
def test_endprompt_is_equation_5(a, b, window, expected):
    assert endprompt_positions(a, b, target_context_length=window).tolist() == expected


def test_contiguous_counts_from_zero():
    assert contiguous_positions(4, target_context_length=10).tolist() == [0, 1, 2, 3]
    assert contiguous_positions(10, target_context_length=10).tolist() == list(range(10))


def test_the_paper_main_setting():
    positions = endprompt_positions(8192 - 11, 11, target_context_length=65536)
    assert len(positions) == 8192
    assert positions[8180] == 8180 and positions[8181] == 65525 and positions[-1] == 65535
    # eq. 8: the distances that a sample shows are [0, a-1], [0, b-1] and [L-a-b+1, L-1]
    small = endprompt_positions(5, 3, target_context_length=40)
    distances = {int(left - right) for left in small for right in small if left >= right}
    assert distances == set(range(5)) | set(range(3)) | set(range(40 - 5 - 3 + 1, 40))


@st.composite
def layouts(draw) -> SampleLayout:
    a = draw(st.integers(1, 200))
    b = draw(st.integers(1, 40))
    return SampleLayout(a, b, a + b + draw(st.integers(0, 70000)))


def place(name: str, layout: SampleLayout, seed: int, index: int) -> np.ndarray:
    scheme = get_scheme(name)
    if not scheme.uses_end_prompt:
        layout = SampleLayout(layout.num_context_tokens + layout.num_prompt_tokens, 0, layout.target_context_length)
    return scheme.place(layout, seed, index)


@pytest.mark.parametrize("name", sorted(SCHEMES))
class TestEveryScheme:
    @given(layout=layouts(), seed=st.integers(0, 2**31), index=st.integers(0, 2**40))
    def test_positions_fit_the_window_in_order(self, name, layout, seed, index):
        positions = place(name, layout, seed, index)
        assert positions.dtype == np.int64
        assert positions.shape == (layout.num_context_tokens + layout.num_prompt_tokens,)
        assert (np.diff(positions) >= 1).all()
        assert positions[0] >= 0 and positions[-1] <= layout.target_context_length - 1

    @given(layout=layouts(), seed=st.integers(0, 2**31), index=st.integers(0, 2**40))
    def test_pure_function_of_its_arguments(self, name, layout, seed, index):
        first = place(name, layout, seed, index)
        place(name, SampleLayout(7, 2, 50), seed + 1, index + 1)  # another draw in between changes nothing
        np.random.seed(0)
        again = place(name, layout, seed, index)
        np.testing.assert_array_equal(first, again)
        first[:] = -1  # nor does a caller that writes into its result
        np.testing.assert_array_equal(place(name, layout, seed, index), again)

    @given(layout=layouts(), first=st.integers(0, 1000), second=st.integers(0, 1000))
    def test_only_varying_schemes_look_at_the_sample_index(self, name, layout, first, second):
        if not get_scheme(name).varies_by_sample:
            np.testing.assert_array_equal(place(name, layout, 1, first), place(name, layout, 2, second))

    @given(layout=layouts(), seed=st.integers(0, 2**31), index=st.integers(0, 2**40))
    def test_the_context_is_never_split(self, name, layout, seed, index):
        if get_scheme(name).uses_end_prompt:
            a = layout.num_context_tokens
            np.testing.assert_array_equal(place(name, layout, seed, index)[:a], np.arange(a))

    def test_registered_under_its_own_name(self, name):
        assert SCHEMES[name].name == name == get_scheme(name).name


@given(layout=layouts())
def test_the_end_prompt_reaches_the_last_position(layout):
    positions = place("endprompt", layout, 0, 0)
    b, window = layout.num_prompt_tokens, layout.target_context_length
    np.testing.assert_array_equal(positions[-b:], np.arange(window - b, window))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: endprompt_positions(6, 5, target_context_length=10), ["6 context", "5 prompt", "target_context_length=10"]),
        (lambda: endprompt_positions(0, 5, target_context_length=10), ["0 tokens", "of 5", "data.seq_length"]),
        (lambda: endprompt_positions(5, 0, target_context_length=10), ["5 tokens", "of 0", "method.end_prompt_length"]),
        (lambda: contiguous_positions(11, target_context_length=10), ["11 tokens", "target_context_length=10", "data.seq_length"]),
        (lambda: contiguous_positions(0, target_context_length=10), ["0 tokens", "target_context_length=10"]),
        (lambda: get_scheme("endprompts"), ["method.position_scheme=endprompts", "contiguous", "endprompt"]),
    ],
)
def test_errors_quote_the_values(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
