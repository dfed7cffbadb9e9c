"""Contexts read in chunks against contexts read whole; generation and log-probabilities against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.probes.needle import Haystack, Question, score_haystacks
from endprompt_megatron.evaluation.probes.perplexity import perplexity_by_window
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.inference.generation import greedy_generate, sequence_log_probabilities
from endprompt_megatron.model import sdpa
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.tiny import load_model, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

CPU = torch.device("cpu")
LENGTH = 96
# divide LENGTH, do not, one token at a time, everything at once
CHUNKS = [32, 37, 95, 1, 96, 500]


@pytest.fixture(scope="module")
def model(single_process, tiny_model_dir):
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def prompts_of(*sizes: int) -> list[list[int]]:
    return [tokens_of(size, seed=size, vocab_size=512)[0].tolist() for size in sizes]


class TestCache:
    @pytest.mark.parametrize("kind", ["pi", "yarn"])
    @pytest.mark.parametrize("mask_elements", [2**24, 200], ids=["one mask", "masks in blocks"])
    def test_chunks_give_the_logits_of_the_whole(self, model, kind, mask_elements, monkeypatch):
        monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", mask_elements)
        own = model.rotary_pos_emb.scaling
        model.set_rope(RopeScaling(kind, own.rope_theta, own.head_dim, factor=2.0, original_context_length=128))
        try:
            tokens = tokens_of(LENGTH)
            positions = torch.arange(LENGTH)
            with torch.no_grad():
                whole = model(tokens, positions)
                for chunk in CHUNKS:
                    with model.cached(LENGTH):
                        parts = [model(tokens[:, at : at + chunk], positions[at : at + chunk]) for at in range(0, LENGTH, chunk)]
                    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
                torch.testing.assert_close(model(tokens, positions), whole, rtol=0, atol=0)  # nothing is left behind
        finally:
            model.set_rope(own)

    def test_branches_see_the_cache_and_themselves_and_are_not_kept(self, model):
        trunk, branches = tokens_of(40), [tokens_of(size, seed=size) for size in (5, 1, 9)]
        sizes = [branch.shape[1] for branch in branches]
        with torch.no_grad():
            alone = [
                model(torch.cat([trunk, branch], dim=1), torch.arange(40 + size))[0, 40:]
                for branch, size in zip(branches, sizes, strict=True)
            ]
            for own_trunk in (0, 7):  # tokens of the trunk that come with the branches
                early = 40 - own_trunk
                with model.cached(40 + max(sizes)):
                    model(trunk[:, :early], torch.arange(early))
                    positions = torch.cat([torch.arange(early, 40), *(torch.arange(40, 40 + size) for size in sizes)])
                    with model.branches_after(40, sizes):
                        together = model(torch.cat([trunk[:, early:], *branches], dim=1), positions)[0, own_trunk:]
                    after = model(branches[0], torch.arange(40, 45))[0]
                for found, expected in zip(together.split(sizes), alone, strict=True):
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
                torch.testing.assert_close(after, alone[0], rtol=0, atol=1e-5)

    def test_more_tokens_than_room_are_refused(self, model):
        with torch.no_grad(), model.cached(10), pytest.raises(AssertionError, match="11 tokens do not fit into a key/value cache of 10"):
            model(tokens_of(11), torch.arange(11))
        assert model(tokens_of(11), torch.arange(11)).shape[1] == 11  # the block has ended


class TestGreedyGenerate:
    @pytest.mark.parametrize("chunk", [0, 1, 7, 200])
    def test_is_what_transformers_generates(self, model, reference, chunk):
        prompts = prompts_of(1, 20, 70)
        expected = [
            reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
        found = greedy_generate(model, prompts, max_new_tokens=20, prefill_chunk=chunk, device=CPU)
        assert found == expected and len({token for text in found for token in text}) > 5

    def test_ends_with_the_first_stop_token(self, model):
        prompts = prompts_of(20, 33)
        free = greedy_generate(model, prompts, max_new_tokens=10, device=CPU)
        stop = free[0][3]
        stopped = greedy_generate(model, prompts, max_new_tokens=10, stop_tokens={stop}, device=CPU)
        assert stopped[0] == free[0][: free[0].index(stop) + 1]
        assert stopped[1] == (free[1][: free[1].index(stop) + 1] if stop in free[1] else free[1])

    def test_never_writes_a_row_that_pads_the_vocabulary(self, untied_model_dir):
        model = load_model(untied_model_dir)
        prompts = prompts_of(20)
        prompts = [[token % 300 for token in prompt] for prompt in prompts]
        clean = greedy_generate(model, prompts, max_new_tokens=8, device=CPU)
        with torch.no_grad():
            model.output_layer.weight[300:] = 100.0 * model.output_layer.weight[:84]
            assert model(torch.tensor(prompts), torch.arange(20))[0, -1].argmax() >= 300
        assert greedy_generate(model, prompts, max_new_tokens=8, device=CPU) == clean

    def test_an_empty_prompt_is_refused(self, model):
        with pytest.raises(DataError, match="prompt 1 has no tokens"):
            greedy_generate(model, [[1], []], max_new_tokens=2, device=CPU)


@pytest.mark.parametrize("chunk", [0, 7])
def test_log_probabilities_are_transformers(model, reference, chunk):
    context, one, _ = prompts_of(20, 1, 3)
    greedy = reference.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    requests = [(context, greedy), (context, [3, 4]), (context, greedy[:1]), (one, [5, 6]), (one, [7]), ([1, 2, 3], [4])]
    found = sequence_log_probabilities(model, requests, prefill_chunk=chunk, device=CPU)
    assert [is_greedy for _, is_greedy in found[:3]] == [True, False, True]
    for (before, after), (log_probability, _) in zip(requests, found, strict=True):
        logits = reference(torch.tensor([before + after]), use_cache=False).logits[0, len(before) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(after)[:, None]).sum()
        assert log_probability == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(DataError, match="continuation 0 has no tokens"):
        sequence_log_probabilities(model, [([1], [])], device=CPU)


class TestProbesInChunks:
    def test_scores_of_haystacks_are_the_same(self, model):
        random = np.random.default_rng(0)

        def draw(size: int) -> tuple[int, ...]:
            return tuple(random.integers(0, 512, size).tolist())

        questions = tuple(Question("multi_key", draw(size), draw(4), ((0, 2), (2, 4)), 0.5, 9) for size in (3, 9, 5))
        haystacks = [Haystack(90, draw(70), questions), Haystack(90, draw(70), questions[:1])]
        whole = score_haystacks(model, haystacks, device=CPU, label="test")
        for chunk in (1, 16, 35, 70, 500):
            found = score_haystacks(model, haystacks, device=CPU, label="test", prefill_chunk=chunk)
            pairs = zip(found["multi_key"]["90"]["records"], whole["multi_key"]["90"]["records"], strict=True)
            for mine, expected in pairs:
                assert mine[:3] == expected[:3] and mine[4] == expected[4]
                assert mine[3] == pytest.approx(expected[3], abs=1e-4)

    def test_perplexities_are_the_same(self, model):
        blocks = np.random.default_rng(0).integers(0, 512, (2, 64))
        for stride in (0, 10):
            whole = perplexity_by_window(model, blocks, [16, 64], device=CPU, label="test", stride=stride)
            for chunk in (1, 21, 32, 63, 64):
                found = perplexity_by_window(model, blocks, [16, 64], device=CPU, label="test", stride=stride, prefill_chunk=chunk)
                assert found == pytest.approx(whole, rel=1e-5)

    def test_a_chunk_bounds_what_is_read_at_once(self, model, monkeypatch):
        read = []
        forward = ForwardModel._forward
        monkeypatch.setattr(
            ForwardModel, "_forward", lambda self, tokens, **more: read.append(len(tokens)) or forward(self, tokens, **more)
        )
        perplexity_by_window(model, np.zeros((1, 65), dtype=np.int64), [65], device=CPU, label="test", prefill_chunk=30)
        greedy_generate(model, prompts_of(65), max_new_tokens=2, prefill_chunk=30, device=CPU)
        assert read == [30, 30, 4, 30, 30, 5, 1]
