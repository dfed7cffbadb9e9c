"""What is put right around the harness's generators, on a generator of ours that has the harness's faults."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.lm_eval_harness.ruler_prompts import bounded, generator_of


def _tokenizer(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=text.split())


def _module() -> SimpleNamespace:
    """Common words in the harness's form: a prompt of 3 tokens a word, drawn from the module's own generator."""
    module = SimpleNamespace(RNG=random.Random(42))

    def generate_input_output(num_words: int, max_seq_length: int):
        words = [str(module.RNG.randrange(10**6)) for _ in range(num_words)]
        return "", " ".join([*words, random.choice("ab"), *words, *words]), words[:1]

    def make(num_samples: int, max_seq_length: int, tokenizer=None):
        return [generate_input_output(10, max_seq_length) for _ in range(num_samples)]

    module.generate_input_output, module.sys_word_pair_random = generate_input_output, make
    return module


def _made(samples: int | None) -> list:
    random.seed(1)
    module = _module()
    if samples is None:
        return module.sys_word_pair_random(num_samples=500, max_seq_length=4096, tokenizer=_tokenizer)
    with bounded("ruler_cwe", module, samples=samples):
        return module.sys_word_pair_random(num_samples=500, max_seq_length=4096, tokenizer=_tokenizer)


def test_fewer_samples_are_the_first_of_all():
    assert _made(7) == _made(None)[:7]


def test_a_length_at_which_the_generator_would_not_end_is_refused():
    module = _module()
    with bounded("ruler_cwe", module, samples=2):
        with pytest.raises(DataError, match="takes 153 tokens of this tokenizer and 152 are allowed"):
            module.sys_word_pair_random(num_samples=500, max_seq_length=152, tokenizer=_tokenizer)
        assert len(module.sys_word_pair_random(num_samples=500, max_seq_length=153, tokenizer=_tokenizer)) == 2


def test_the_generator_is_given_back():
    module = _module()
    before = module.sys_word_pair_random
    with bounded("ruler_cwe", module, samples=2):
        assert module.sys_word_pair_random is not before
    assert module.sys_word_pair_random is before


def test_needle_tasks_share_a_generator():
    assert generator_of("niah_multiquery") == ("niah_utils", "generate_samples")
    assert generator_of("ruler_qa_squad") == generator_of("ruler_qa_hotpot") == ("qa_utils", "generate_samples")
