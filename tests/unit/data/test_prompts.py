"""The cue set: tokenisation of prompts, and the prompt of each sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.data.prompts import PAPER_END_PROMPTS, EndPromptSet, tokenize_end_prompts
from endprompt_megatron.errors import ConfigError


def letters(text: str) -> list[int]:
    """A tokenizer for hand-worked cases: one token per character."""
    return [ord(letter) for letter in text]


def test_the_papers_prompts_by_name():
    prompts = tokenize_end_prompts(["EP_1", "EP_2", "EP_3", "Fin"], letters)
    assert prompts.texts == ("This is the end of text, please pay attention here", "<|eot_id|>", "End.", "Fin")
    assert prompts.token_ids[2] == (69, 110, 100, 46) and prompts.token_ids[3] == (70, 105, 110)
    assert prompts.lengths == [50, 10, 4, 3]
    assert set(PAPER_END_PROMPTS) == {"EP_1", "EP_2", "EP_3"}


def test_a_real_tokenizer_gives_the_prompt_back(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    prompts = tokenize_end_prompts(["EP_1"], lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(prompts.token_ids[0]) == PAPER_END_PROMPTS["EP_1"]
    assert prompts.notes == () and prompts.draw(0, 0).tolist() == list(prompts.token_ids[0])


def test_length_as_the_tokenizer_says_leaves_no_note():
    assert tokenize_end_prompts(["EP_1", "EP_3"], letters).notes == ()
    assert tokenize_end_prompts(["End."], letters, fixed_length=4).notes == ()


def test_fixed_length_cuts_and_repeats_and_says_so():
    prompts = tokenize_end_prompts(["abcdefg", "xyz", "12345"], letters, fixed_length=5)
    assert [bytes(ids).decode() for ids in prompts.token_ids] == ["abcde", "xyzxy", "12345"]
    assert len(prompts.notes) == 2
    assert "'abcdefg': 7 tokens cut to method.end_prompt_length=5" in prompts.notes[0]
    assert "'xyz': 3 tokens repeated to method.end_prompt_length=5" in prompts.notes[1]


@given(st.text("abcd", min_size=1, max_size=30), st.integers(1, 200))
def test_fixed_length_is_met_by_repetition_alone(text, length):
    ids = tokenize_end_prompts([text], letters, fixed_length=length).token_ids[0]
    assert len(ids) == length
    assert all(ids[index] == ord(text[index % len(text)]) for index in range(length))


def test_ep_2_notes_a_tokenizer_that_does_not_know_it():
    assert tokenize_end_prompts(["EP_2"], lambda text: [128009]).notes == ()
    prompts = tokenize_end_prompts(["EP_2"], letters)
    assert prompts.notes == ("EP_2 '<|eot_id|>' is not a special token of this tokenizer: it becomes 10 ordinary tokens",)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="method.end_prompts: '   '.*Choose another"):
        tokenize_end_prompts(["EP_1", "   "], lambda text: letters(text.strip()))


def test_draws_follow_seed_and_index_and_leave_nothing_out():
    prompts = tokenize_end_prompts(["EP_1", "EP_2", "EP_3"], letters)
    draws = [tuple(prompts.draw(1234, index)) for index in range(600)]
    assert [tuple(prompts.draw(1234, index)) for index in reversed(range(600))] == draws[::-1]
    counts = Counter(draws)
    assert set(counts) == set(prompts.token_ids)
    assert min(counts.values()) > 150, "drawn uniformly: 200 of each are expected"
    assert [tuple(prompts.draw(1235, index)) for index in range(600)] != draws


def test_draws_are_what_they_were():
    """Resuming a run requires the same draws in every version of this code."""
    prompts = EndPromptSet(("a", "b", "c"), ((0,), (1,), (2,)))
    expected = [int(np.random.default_rng([1234, 1, index]).integers(3)) for index in range(20)]
    assert [int(prompts.draw(1234, index)[0]) for index in range(20)] == expected


def test_draw_is_int64_and_owned_by_the_caller():
    prompts = tokenize_end_prompts(["EP_3"], letters)
    drawn = prompts.draw(0, 0)
    assert drawn.dtype == np.int64
    drawn[:] = 0
    assert prompts.draw(0, 0).tolist() == letters("End.")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n\nThe end.\n", "\n\nThe end.\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"C:\\new", r"C:\new"),
        ("already\n", "already\n"),
        (r"5 \% and \x", r"5 \% and \x"),
    ],
)
def test_escapes_mean_what_they_mean_in_code(written, meant):
    assert tokenize_end_prompts([written], letters).texts == (meant,)


@pytest.mark.parametrize("name", ["EP1", "ep_1", "EP_9", " EP-2", "Ep 3"])
def test_names_that_look_like_a_cue_and_are_none_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=r"method.end_prompts=.*EP_1, EP_2, EP_3"):
        tokenize_end_prompts([name], letters)


def test_prompts_are_described_as_they_are_trained_on():
    assert tokenize_end_prompts([r"Fin\n"], letters).describe() == ["end prompt 'Fin\\n': b=4, ids [70, 105, 110, 10]"]
