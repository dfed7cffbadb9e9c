"""The probes against plain transformers: greedy generation and the loss of the same window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf_config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf_import import load_hf_weights
from endprompt_megatron.checkpoint.hf_tokenizer import load_tokenizer
from endprompt_megatron.config import ParallelConfig
from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.needle import NeedleTrial, make_trials, score_trials
from endprompt_megatron.evaluation.perplexity import held_out_blocks, perplexity_by_window
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.rope.scaling import RopeScaling


@pytest.fixture(scope="module")
def encode(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def both(tiny_model_dir, single_process):
    """The same weights in Megatron and in transformers."""
    architecture = architecture_from_hf(read_hf_config(tiny_model_dir))
    rope = RopeScaling("none", architecture.rope_theta, architecture.head_dim)
    chunk = build_model_chunks(
        architecture, rope=rope, max_sequence_length=128, parallel=ParallelConfig(), precision="fp32", backend=resolve("torch"),
        device=torch.device("cpu"),
    )[0].eval()  # fmt: skip
    load_hf_weights([chunk], tiny_model_dir, architecture)
    return chunk, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def test_trials_are_the_same_for_every_model_and_fill_their_length(encode):
    arguments = dict(lengths=[256, 512], depths=[0.0, 0.5, 1.0], trials=6, digits=5, seed=3)
    trials = make_trials(encode, **arguments)
    assert trials == make_trials(encode, **arguments)
    assert trials != make_trials(encode, **{**arguments, "seed": 4})
    noise = len(encode("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "))
    for trial in trials:
        used = len(trial.prompt) + len(trial.key)
        assert trial.length - noise < used <= trial.length
    assert len({trial.key for trial in trials}) == len(trials)
    assert all(trial.num_digit_tokens in (len(trial.key), len(trial.key) - 1) for trial in trials)
    assert [trial.depth for trial in trials[:6]] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]


def test_the_fact_stands_at_its_depth(encode):
    for trial in make_trials(encode, lengths=[512], depths=[0.0, 0.5, 1.0], trials=3, digits=5, seed=0):
        text, key = list(trial.prompt), list(trial.key)
        first = next(i for i in range(len(text)) if text[i : i + len(key) - 1] == key[1:])
        assert abs(first / len(text) - trial.depth) < 0.25


def test_a_length_without_room_is_refused(encode):
    with pytest.raises(DataError, match="Use lengths of at least"):
        make_trials(encode, lengths=[64], depths=[0.5], trials=1, digits=5, seed=0)


def test_exact_match_is_what_greedy_generation_does(both):
    """A key made of the model's own greedy continuation scores 1; with its last token changed it scores 0 and loses one digit."""
    chunk, reference = both
    prompt = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(0))
    continued = reference.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 60:]
    key = tuple(continued.tolist())
    wrong = (*key[:-1], (key[-1] + 1) % 512)
    for answer, exact, digits in ((key, 1.0, 1.0), (wrong, 0.0, 0.8)):
        trial = NeedleTrial(65, 0.5, tuple(prompt[0].tolist()), answer, 5)
        scored = score_trials(chunk, [trial], device=torch.device("cpu"), label="test")["65"]
        assert (scored["exact_match"], scored["trials"]) == (exact, 1)
        assert scored["digit_accuracy"] == pytest.approx(digits)
        logits = reference(torch.tensor([trial.prompt + answer]), use_cache=False).logits[0, 59:-1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert scored["key_log_probability"] == pytest.approx(float(expected), abs=1e-4)


def test_perplexity_is_exp_of_transformers_loss(both):
    chunk, reference = both
    blocks = np.random.default_rng(0).integers(0, 512, (2, 64))
    lengths = [16, 24, 32, 64]  # 24 leaves 16 tokens of each block out, and shares no window but the first
    found = perplexity_by_window(chunk, blocks, lengths, device=torch.device("cpu"), label="test")
    for length in lengths:
        windows = torch.from_numpy(blocks[:, : 64 // length * length].reshape(-1, length))
        loss = float(reference(windows, labels=windows, use_cache=False).loss)
        assert found[str(length)] == pytest.approx(math.exp(loss), rel=1e-5)


def test_held_out_blocks_come_from_long_documents_only(encode):
    texts = ["short. ", "one two three four five. " * 40, "six seven eight. " * 60]
    blocks = held_out_blocks(texts, encode, block_length=50, num_tokens=80)
    assert blocks.shape == (2, 50)
    assert blocks[0].tolist() == encode(texts[1])[:50]
    with pytest.raises(DataError, match="no held-out document has 5000 tokens"):
        held_out_blocks(texts, encode, block_length=5000, num_tokens=80)
