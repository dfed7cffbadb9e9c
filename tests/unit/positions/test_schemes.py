"""Positions: hand-worked samples of eq. 5, and what every registered scheme owes to the trainer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.positions.endprompt_random import endprompt_random_positions
from endprompt_megatron.positions.pose import endprompt_pose_positions, pose_sample
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
    return SampleLayout(a, b, a + b + draw(st.integers(0, 70000)), draw(st.integers(1, 5)))


def place(name: str, layout: SampleLayout, seed: int, index: int) -> np.ndarray:
    scheme = get_scheme(name)
    if not scheme.uses_end_prompt:
        layout = replace(layout, num_context_tokens=layout.num_context_tokens + layout.num_prompt_tokens, num_prompt_tokens=0)
    return scheme.place(layout, seed, index)


@pytest.mark.parametrize("name", sorted(SCHEMES))
class TestEveryScheme:
    @given(layout=layouts(), seed=st.integers(0, 2**31), index=st.integers(0, 2**40))
    def test_chosen_text_is_in_order_and_there(self, name, layout, seed, index):
        scheme = get_scheme(name)
        if scheme.choose_text is None:
            assert scheme.text_span == 1
            return
        text = scheme.choose_text(layout, seed, index)
        total = layout.num_context_tokens + layout.num_prompt_tokens
        assert text.shape == (total,) and text[0] == 0 and (np.diff(text) >= 1).all() and text[-1] < scheme.text_span * total
        # positions and text skip at the same places or fewer
        skips = set(np.flatnonzero(np.diff(text) > 1)) | set(np.flatnonzero(np.diff(scheme.place(layout, seed, index)) > 1))
        assert len(skips) < layout.num_chunks

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


class Drawn:
    """A random generator with given draws: it checks the requested bounds, then returns the next number."""

    def __init__(self, *draws: tuple[int, int, int | list[int]]):
        self.draws = list(draws)

    def integers(self, low: int, high: int, size: int | None = None, endpoint: bool = False) -> np.ndarray | int:
        assert endpoint
        expected_low, expected_high, value = self.draws.pop(0)
        assert (low, high) == (expected_low, expected_high)
        assert size is None or len(value) == size
        return value if size is None else np.array(value)


def test_endprompt_random_by_hand():
    """a = 3, b = 2, L = 10: a start in [3, 8]."""
    positions = endprompt_random_positions(3, 2, target_context_length=10, random=Drawn((3, 8, 5)))
    assert positions.tolist() == [0, 1, 2, 5, 6]


def test_endprompt_pose_by_hand():
    """a = 3, b = 5, L = 20: pieces of 3 and 2 tokens, skips in [0, 12] in order."""
    positions = endprompt_pose_positions(3, 5, target_context_length=20, random=Drawn((0, 12, [9, 4])))
    assert positions.tolist() == [0, 1, 2, 7, 8, 9, 15, 16]


def test_pose_by_hand():
    """c = 6, L = 32, text of 30: r in [1, 3]; the second chunk from [r, 30 - (6 - r)] in the text, a skip in [0, 26] in the positions."""
    drawn = Drawn((1, 3, 2), (0, 24, [11]), (0, 26, [20]))
    sample = pose_sample(6, num_text_tokens=30, target_context_length=32, random=drawn)
    assert sample.positions.tolist() == [0, 1, 22, 23, 24, 25]
    assert sample.text.tolist() == [0, 1, 13, 14, 15, 16]


def test_pose_with_three_chunks_by_hand():
    """c = 9: the first chunk in [1, 3], the second in [1, (9 - 2 + 1) // 2]; skips in order."""
    drawn = Drawn((1, 3, 2), (1, 4, 3), (0, 9, [5, 1]), (0, 11, [0, 8]))
    sample = pose_sample(9, num_text_tokens=18, target_context_length=20, random=drawn, num_chunks=3)
    assert sample.text.tolist() == [0, 1, 3, 4, 5, 10, 11, 12, 13]
    assert sample.positions.tolist() == [0, 1, 2, 3, 4, 13, 14, 15, 16]


@pytest.mark.parametrize("name", sorted(name for name, scheme in SCHEMES.items() if scheme.varies_by_sample))
def test_another_sample_and_another_seed_are_placed_otherwise(name):
    layout = SampleLayout(90, 10, 65536)
    placed = {tuple(place(name, layout, seed, index)) for seed in range(5) for index in range(20)}
    assert len(placed) > 95


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: endprompt_positions(6, 5, target_context_length=10), ["6 context", "5 prompt", "target_context_length=10"]),
        (lambda: endprompt_positions(0, 5, target_context_length=10), ["0 tokens", "of 5", "data.seq_length"]),
        (lambda: endprompt_positions(5, 0, target_context_length=10), ["5 tokens", "of 0", "method.end_prompt_length"]),
        (lambda: contiguous_positions(11, target_context_length=10), ["11 tokens", "target_context_length=10", "data.seq_length"]),
        (lambda: contiguous_positions(0, target_context_length=10), ["0 tokens", "target_context_length=10"]),
        (lambda: pose_sample(5, num_text_tokens=4, target_context_length=10, random=None), ["5 tokens", "text of 4", "data.seq_length"]),
        (
            lambda: pose_sample(5, num_text_tokens=9, target_context_length=10, random=None, num_chunks=0),
            ["method.num_chunks=0", "default is 2"],
        ),
        (lambda: endprompt_pose_positions(5, 2, target_context_length=10, random=None, num_chunks=0), ["method.num_chunks=0"]),
        (lambda: endprompt_random_positions(9, 2, target_context_length=10, random=None), ["9 context", "target_context_length=10"]),
        (lambda: get_scheme("endprompts"), ["method.position_scheme=endprompts", "contiguous", "endprompt"]),
    ],
)
def test_errors_quote_the_values(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
