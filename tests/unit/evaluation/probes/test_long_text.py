"""Long texts with planted facts: how they are laid out, and one reading for all lengths against transformers reading each length anew."""

from __future__ import annotations

import math
from typing import get_type_hints

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.config.probe_rules import LONG_TEXT_TASKS
from endprompt_megatron.config.schema import ProbesConfig
from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.probes.long_text import MOST_FACTS, make_long_texts, read_long_texts
from endprompt_megatron.model import sdpa
from tests.support.tiny import load_model

CPU = torch.device("cpu")
PROSE = " ".join(f"The {name} of house {number} was seen. Nobody spoke!" for number in range(400) for name in ("owner", "dog", "window"))
FACTS = {"word": 5, "number": 3}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _texts(
    encode, *, length: int = 1200, facts: dict[str, int] = FACTS, count: int = 1, seed: int = 3, documents: tuple[str, ...] = (PROSE,)
):
    return make_long_texts(documents, encode, length=length, facts=facts, digits=5, count=count, seed=seed)


class TestLayout:
    def test_a_text_is_a_function_of_its_arguments(self, encode):
        assert _texts(encode) == _texts(encode)
        assert _texts(encode) != _texts(encode, seed=4)

    def test_facts_stand_between_sentences_at_even_distances_and_fill_the_length(self, encode, tokenizer):
        text = _texts(encode)[0]
        assert len(text.tokens) == len(text.planted) == 1200 and len(text.facts) == 8
        for number, fact in enumerate(text.facts):
            said = tokenizer.decode(text.tokens[: fact.end])
            subject = tokenizer.decode(fact.question.prompt).removeprefix("\nRemember: ")
            answer = tokenizer.decode(fact.question.answer).strip()
            assert said.endswith(f"\n\n{subject[0].upper()}{subject[1:]} {answer}. Remember: {subject} {answer}.\n\n")
            assert abs(fact.end / 1200 - (number + 0.5) / 8) < 0.1
        kept = tokenizer.decode([token for token, planted in zip(text.tokens, text.planted, strict=True) if not planted])
        assert PROSE.startswith(kept)
        kinds = [fact.question.task for fact in text.facts]
        assert sorted(kinds) == ["number"] * 3 + ["word"] * 5 and kinds[0] != kinds[1]

    def test_texts_of_one_document_do_not_overlap_and_have_other_facts(self, encode, tokenizer):
        first, second = _texts(encode, length=900, count=2)
        prose = ["".join(tokenizer.decode(t) for t, p in zip(text.tokens, text.planted, strict=True) if not p) for text in (first, second)]
        assert prose[0][-200:] not in prose[1] and prose[1][:200] not in prose[0]
        assert [fact.question.answer for fact in first.facts] != [fact.question.answer for fact in second.facts]

    def test_what_cannot_be_made_is_refused(self, encode):
        with pytest.raises(DataError, match=r"no held-out document has 999999 tokens.*the longest document has \d{4,}"):
            _texts(encode, length=999_999)
        with pytest.raises(DataError, match=r"probes.long_texts=500.*Set probes.long_texts=\d+"):
            _texts(encode, count=500)
        with pytest.raises(DataError, match="more than half"):
            _texts(encode, length=600, facts={"word": 20})

    def test_the_ranges_of_the_config_end_at_the_number_of_facts_that_can_be_written(self):
        hints = get_type_hints(ProbesConfig, include_extras=True)
        assert set(LONG_TEXT_TASKS) == set(MOST_FACTS)
        assert {task: hints[f"planted_{task}s"].__metadata__[0].most for task in LONG_TEXT_TASKS} == MOST_FACTS


@pytest.fixture(scope="module")
def model(single_process, tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def _reference_losses(reference, tokens) -> torch.Tensor:
    """Negative log-likelihood of every token after the first."""
    logits = reference(torch.tensor([tokens])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")


@pytest.mark.parametrize("merged", [True, False], ids=["merged attention", "masks"])
@pytest.mark.parametrize("chunk", [0, 64, 250])
def test_one_reading_gives_what_transformers_finds_at_every_length(model, reference, encode, monkeypatch, chunk, merged):
    if not merged:
        monkeypatch.setattr(sdpa, "_FLASH_ON_CPU", None)
    text, lengths = _texts(encode, length=1000)[0], [300, 1000, 500]
    found = read_long_texts(model, [text], lengths, perplexity_tail=120, device=CPU, label="test", prefill_chunk=chunk)
    longest = max(len(fact.question.prompt) + len(fact.question.answer) for fact in text.facts)
    for length in lengths:
        cut = length - longest  # question and answer end within the length
        losses = _reference_losses(reference, text.tokens[:length])
        scored = [index for index in range(length - 120, length) if not text.planted[index]]
        expected = math.exp(np.mean([losses[index - 1] for index in scored]))
        assert found["perplexity"][str(length)] == pytest.approx(expected, rel=1e-4)
        assert np.mean(np.exp(found["perplexity_blocks"][str(length)])) == pytest.approx(expected, rel=0.2)
        for task in FACTS:
            asked = [fact for fact in text.facts if fact.question.task == task and fact.end <= cut]
            records = found[task][str(length)]["records"]
            assert len(records) == len(asked) == found[task][str(length)]["trials"]
            for fact, (depth, _, _, log_probability, distance) in zip(asked, records, strict=True):
                whole = [*text.tokens[:cut], *fact.question.prompt, *fact.question.answer]
                expected = -_reference_losses(reference, whole)[-len(fact.question.answer) :].sum()
                assert log_probability == pytest.approx(float(expected), abs=2e-3)
                assert len(whole) <= length and depth == fact.end / cut and distance == cut + len(fact.question.prompt) - fact.end


def test_lengths_do_not_depend_on_one_another(model, encode):
    """A question at a longer length must leave nothing behind that a shorter one sees."""
    texts = _texts(encode, length=1000)
    together = read_long_texts(model, texts, [300, 500, 1000], perplexity_tail=60, device=CPU, label="test")
    for length in (300, 500, 1000):
        alone = read_long_texts(model, texts, [length], perplexity_tail=60, device=CPU, label="test")
        for task in FACTS:
            mine, theirs = (np.array(found[task][str(length)]["records"], dtype=float) for found in (alone, together))
            np.testing.assert_allclose(mine, theirs, atol=2e-4)
        assert alone["perplexity"][str(length)] == pytest.approx(together["perplexity"][str(length)], rel=1e-5)


def test_without_a_tail_no_perplexity(model, encode):
    found = read_long_texts(model, _texts(encode, length=900), [900], perplexity_tail=0, device=CPU, label="test")
    assert found.keys() == set(FACTS)
