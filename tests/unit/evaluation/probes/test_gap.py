"""The gap probe: where its facts stand, measured on the tokens, and which distances training shows, counted pair by pair."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.probes.gap import make_gap_haystacks, regions_of_endprompt, summarise_by_region
from endprompt_megatron.evaluation.probes.needle import score_haystacks
from endprompt_megatron.positions.scheme import SampleLayout
from endprompt_megatron.theory.coverage import coverage_of
from tests.support.tiny import load_model

REGIONS = ["near", "gap", "anchor"]
SPLIT = dict(num_context_tokens=236, num_prompt_tokens=20, target_context_length=2048)


def words(text: str) -> list[int]:
    """A tokenizer: words with the space before them, every digit and sign by itself."""
    return [zlib.crc32(piece.encode()) for piece in re.findall(r" ?[^\W\d_]+|\d|\W|_", text)]


def _make(**options):
    return make_gap_haystacks(words, **{**SPLIT, "length": 2048, "trials": 5, "digits": 5, "seed": 3, **options})


def _span_of_fact(tokens: tuple[int, ...]) -> tuple[int, int]:
    """(first, last) token of what is neither noise nor introduction."""
    text = list(tokens)
    fact = words(" The pass key is")
    first = next(index for index in range(len(text)) if text[index : index + len(fact)] == fact)
    ending = words(" is the pass key. ")
    last = next(index for index in range(first, len(text)) if text[index : index + len(ending)] == ending) + len(ending) - 1
    return first, last


@given(a=st.integers(120, 400), b=st.integers(1, 60), window=st.integers(1024, 4096), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_all_of_question_and_answer_stands_in_the_region_from_all_of_the_fact(a, b, window, seed):
    seen = coverage_of("endprompt", SampleLayout(a, b, window)).seen
    layout = dict(num_context_tokens=a, num_prompt_tokens=b, target_context_length=window)
    made = make_gap_haystacks(words, length=window, trials=3, digits=5, seed=seed, **layout)
    assert len(made) == 9
    for haystack, region in zip(made, REGIONS * 3, strict=True):
        (question,) = haystack.questions
        read = haystack.tokens + question.prompt + question.answer[:-1]
        first, last = _span_of_fact(read)
        distances = np.arange(len(haystack.tokens) - last, len(read) - first)
        assert seen[distances].all() if region != "gap" else not seen[distances].any()
        assert (distances[-1] < max(a, b)) == (region == "near") and (distances[0] > window - a - b) == (region == "anchor")
        assert question.distance == len(haystack.tokens) + len(question.prompt) - last - 1  # as the other probes count it


def test_haystacks_of_a_trial_differ_in_the_place_of_the_key_alone():
    made = _make()
    assert made == _make() and made != _make(seed=4)
    keys = set()
    for trial in range(5):
        three = made[3 * trial : 3 * trial + 3]
        assert len({haystack.questions[0].answer for haystack in three}) == 1
        assert len({haystack.questions[0].prompt for haystack in three}) == 1
        assert len({tuple(sorted(haystack.tokens)) for haystack in three}) == 1 and len({haystack.tokens for haystack in three}) == 3
        assert all(2048 - len(words("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "))
                   < len(haystack.tokens) + len(haystack.questions[0].prompt) + 5 <= 2048 for haystack in three)  # fmt: skip
        keys.add(three[0].questions[0].answer)
    assert len(keys) == 5
    far = [haystack.questions[0].distance for haystack in made[1::3]]
    assert sorted(far, reverse=True) == far and far[0] - far[-1] > 900  # trials go through the gap evenly


def test_regions_are_those_that_training_shows():
    regions = regions_of_endprompt(236, 20, target_context_length=2048)
    assert regions == {"near": (0, 235), "gap": (236, 1792), "anchor": (1793, 2047)}
    coverage = coverage_of("endprompt", SampleLayout(236, 20, 2048))
    assert coverage.gaps == [regions["gap"]]
    with pytest.raises(ConfigError, match="cover every distance of a window of 600"):
        regions_of_endprompt(400, 40, target_context_length=600)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ConfigError, match="none within anchor, distances 1793 to 2047. Use the target length 2048"):
        _make(length=1024)
    with pytest.raises(ConfigError, match="none within near, distances 0 to 29"):
        _make(num_context_tokens=30)
    with pytest.raises(DataError, match="Use lengths of at least"):
        _make(length=60)


def test_figures_by_region():
    rows = [
        [0.9, 1.0, 1.0, -1.0, 100],
        [0.5, 0.0, 0.4, -3.0, 900],
        [0.4, 1.0, 0.8, -5.0, 1792],
        [0.0, 0.0, 0.2, -7.0, 1793],
        [None, 1.0, 1.0, 0.0, None],
    ]
    found = summarise_by_region(rows, **SPLIT)
    assert list(found) == REGIONS
    assert found["gap"] == {
        "exact_match": 0.5,
        "digit_accuracy": pytest.approx(0.6),
        "key_log_probability": -4.0,
        "trials": 2,
        "distances": [900, 1792],
    }
    assert (found["near"]["trials"], found["near"]["key_log_probability"]) == (1, -1.0)
    assert (found["anchor"]["trials"], found["anchor"]["key_log_probability"]) == (1, -7.0)
    assert list(summarise_by_region(rows[:1], **SPLIT)) == ["near"]


def test_a_model_is_probed_in_every_region(tiny_model_dir, single_process):
    tokenizer = load_tokenizer(tiny_model_dir)
    layout = dict(num_context_tokens=600, num_prompt_tokens=20, target_context_length=2048)
    made = make_gap_haystacks(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], length=2048, trials=2, digits=5, seed=0, **layout
    )
    scored = score_haystacks(load_model(tiny_model_dir), made, device=torch.device("cpu"), label="test")
    found = summarise_by_region(scored["gap"]["2048"]["records"], **layout)
    assert {name: figures["trials"] for name, figures in found.items()} == dict.fromkeys(REGIONS, 2)
