"""The probes against plain transformers: greedy generation and the loss of the same window."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.config.schema import ParallelConfig, ProbesConfig
from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.probes import results
from endprompt_megatron.evaluation.probes.needle import Haystack, Question, make_haystacks, score_haystacks
from endprompt_megatron.evaluation.probes.perplexity import held_out_blocks, perplexity_by_window
from endprompt_megatron.evaluation.probes.results import Probes, probe_system
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.rope.scaling import RopeScaling

TASKS = ["single", "multi_key", "variable_tracking"]


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


def test_haystacks_are_the_same_for_every_model_and_fill_their_length(encode):
    arguments = dict(tasks=TASKS, lengths=[1024, 1536], depths=[0.0, 0.5, 1.0], trials=6, digits=5, seed=3)
    made = make_haystacks(encode, **arguments)
    assert made == make_haystacks(encode, **arguments)
    assert made != make_haystacks(encode, **{**arguments, "seed": 4})
    noise = len(encode("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "))
    for haystack in made:
        longest = max(len(question.prompt) + len(question.answer) for question in haystack.questions)
        assert haystack.length - noise < len(haystack.tokens) + longest <= haystack.length
        assert len({question.answer for question in haystack.questions}) == len(haystack.questions)
        assert [question.task for question in haystack.questions] in (["single"], ["multi_key"] * 3 + ["variable_tracking"])
    assert [haystack.questions[0].depth for haystack in made[:6]] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    assert len(made) == len(set(made)) == 2 * 2 * 6


def test_a_bound_on_tokens_leaves_at_least_one_haystack(encode):
    arguments = dict(tasks=TASKS, lengths=[1024, 2048, 4096], depths=[0.2, 0.8], trials=5, digits=5)
    made = make_haystacks(encode, **arguments, seed=1, max_tokens=2048)
    assert [haystack.length for haystack in made] == [1024, 1024, 2048, 4096] * 2
    depths = [make_haystacks(encode, **arguments, seed=seed, max_tokens=1)[0].questions[0].depth for seed in (0, 1)]
    assert depths == [0.2, 0.8]  # a length with one trial uses another depth with the next seed


def test_the_fact_stands_at_its_depth(encode):
    for haystack in make_haystacks(
        encode, tasks=["single", "multi_key"], lengths=[1024], depths=[0.0, 0.5, 1.0], trials=3, digits=5, seed=0
    ):
        text = list(haystack.tokens)
        for question in haystack.questions:
            key = list(question.answer)
            first = next(i for i in range(len(text)) if text[i : i + len(key) - 1] == key[1:])
            assert abs(first / len(text) - question.depth) < 0.25
            last = max(i for i in range(len(text)) if text[i : i + len(key) - 1] == key[1:])
            behind = len(text) + len(question.prompt) - last  # from the key's last mention; the fact's own words follow it
            assert len(question.prompt) <= question.distance < behind < question.distance + 40


@pytest.mark.parametrize("name", ["tiny", "word pieces"])
def test_what_counts_as_part_of_an_answer(encode, name):
    """Each digit of a key, each name of a chain; not the space of its own that some tokenizers put first."""

    def word_pieces(text: str) -> list[int]:
        """A tokenizer that joins a space with what follows, in pieces of three characters."""
        return [hash(text[i : i + 3]) % 2**31 for i in range(0, len(text), 3)]

    used = encode if name == "tiny" else word_pieces
    for haystack in make_haystacks(used, tasks=TASKS, lengths=[2048], depths=[0.2, 0.8], trials=1, digits=5, seed=0):
        for question in haystack.questions:
            covered = [index for first, past in question.units for index in range(first, past)]
            if question.task == "variable_tracking":
                assert len(question.units) == 5 and covered == list(range(len(question.answer)))
            else:
                assert covered == list(range(len(question.answer)))[name == "tiny" :]


def test_a_chain_of_variables_leads_from_the_value_to_every_name(tiny_model_dir, encode):
    tokenizer = load_tokenizer(tiny_model_dir)
    for haystack in make_haystacks(encode, tasks=["variable_tracking"], lengths=[1024], depths=[0.5], trials=3, digits=5, seed=0):
        text, question = tokenizer.decode(haystack.tokens), haystack.questions[0]
        value = tokenizer.decode(question.prompt).split("assigned the value ")[1].split(" ")[0]
        told = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text))
        names = tokenizer.decode(question.answer).split()
        assert len(told) == len(names) == 5
        assert [told[name] for name in names] == [value, *names[:-1]]


def test_a_length_without_room_is_refused(encode):
    for task in TASKS:
        with pytest.raises(DataError, match=f"{task} with this tokenizer .*Use lengths of at least"):
            make_haystacks(encode, tasks=[task], lengths=[64], depths=[0.5], trials=1, digits=5, seed=0)


def test_exact_match_is_what_greedy_generation_does(both):
    """An answer made of the model's own greedy continuation scores 1; with its last token changed it scores 0 and loses one digit."""
    chunk, reference = both
    prompt = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(0))
    continued = reference.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 60:]
    tokens, key = tuple(prompt[0].tolist()), tuple(continued.tolist())
    wrong = (*key[:-1], (key[-1] + 1) % 512)
    for answer, exact, digits in ((key, 1.0, 1.0), (wrong, 0.0, 0.8)):
        haystack = Haystack(
            65, tokens[:50], (Question("single", tokens[50:], answer, tuple((index, index + 1) for index in range(5)), 0.5, 10),)
        )
        scored = score_haystacks(chunk, [haystack], device=torch.device("cpu"), label="test")["single"]["65"]
        assert (scored["exact_match"], scored["trials"]) == (exact, 1)
        assert scored["digit_accuracy"] == pytest.approx(digits)
        logits = reference(torch.tensor([tokens + answer]), use_cache=False).logits[0, 59:-1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert scored["key_log_probability"] == pytest.approx(float(expected), abs=1e-4)
        assert scored["records"] == [[0.5, exact, scored["digit_accuracy"], scored["key_log_probability"], 10]]


def test_questions_that_share_a_haystack_score_as_they_do_separately(both):
    chunk, reference = both
    random = np.random.default_rng(0)
    tokens = tuple(random.integers(0, 512, 70).tolist())
    questions = tuple(
        Question(
            "multi_key", tuple(random.integers(0, 512, size).tolist()), tuple(random.integers(0, 512, 4).tolist()), ((0, 2), (2, 4)), depth
        )
        for size, depth in ((3, 0.1), (9, 0.5), (5, 0.9))
    )
    scored = score_haystacks(chunk, [Haystack(90, tokens, questions)], device=torch.device("cpu"), label="test")
    records = scored["multi_key"]["90"]["records"]
    for question, (depth, _, _, log_probability, _) in zip(questions, records, strict=True):
        logits = reference(torch.tensor([tokens + question.prompt + question.answer]), use_cache=False).logits[0, -5:-1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(question.answer)[:, None]).sum()
        assert depth == question.depth and log_probability == pytest.approx(float(expected), abs=1e-4)
    assert scored["multi_key"]["90"]["by_depth"].keys() == {"0.1", "0.5", "0.9"}
    again = chunk(torch.tensor([tokens]), torch.arange(70))  # branching ends with the scoring
    torch.testing.assert_close(again, reference(torch.tensor([tokens]), use_cache=False).logits, atol=1e-4, rtol=0)


def test_perplexity_is_exp_of_transformers_loss(both):
    chunk, reference = both
    blocks = np.random.default_rng(0).integers(0, 512, (2, 64))
    lengths = [16, 24, 32, 64]  # 24 leaves 16 tokens of each block out, and shares no window but the first
    found = perplexity_by_window(chunk, blocks, lengths, device=torch.device("cpu"), label="test")
    for length in lengths:
        windows = torch.from_numpy(blocks[:, : 64 // length * length].reshape(-1, length))
        loss = float(reference(windows, labels=windows, use_cache=False).loss)
        assert found[str(length)] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("stride", [5, 8, 15])
def test_sliding_windows_score_each_token_once_with_all_the_context_they_promise(both, stride):
    """Each token with transformers by itself: after at least window - stride tokens, or all that its block has."""
    chunk, reference = both
    blocks = np.random.default_rng(0).integers(0, 512, (2, 64))
    lengths = [16, 24, 64]
    found = perplexity_by_window(chunk, blocks, lengths, device=torch.device("cpu"), label="test", stride=stride)
    for length in lengths:
        losses = []
        for block in blocks:
            ends = [*range(length, 64, stride), 64]
            scored = 1
            for end in ends:
                window = torch.from_numpy(block[end - length : end])[None]
                logits = reference(window, use_cache=False).logits[0].float()
                for token in range(scored, end):
                    at = token - (end - length)
                    assert at >= min(token, length - stride)
                    losses.append(-float(torch.log_softmax(logits[at - 1], -1)[block[token]]))
                scored = end
        assert len(losses) == 2 * 63
        assert found[str(length)] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


class TestStoredResults:
    """What a run finds in its directory when it starts again."""

    @pytest.fixture
    def probes(self):
        return Probes([], np.zeros((1, 32), dtype=np.int64), ProbesConfig(lengths=[32]), 1)

    def _probe(self, both, probes, cache, label="found", **options):
        return probe_system("base", label, both[0], probes, device=torch.device("cpu"), cache=cache, **options)["label"]

    def test_are_read_back_under_the_same_conditions_only(self, both, probes, tmp_path):
        cache = tmp_path / "base.json"
        assert self._probe(both, probes, cache) == "found"
        assert self._probe(both, probes, cache, "again") == "found"
        other = replace(probes, config=ProbesConfig(lengths=[32], perplexity_stride=8))
        assert self._probe(both, other, cache, "slides") == "slides"

    def test_are_of_the_tokens_and_the_weights_that_they_were_made_of(self, both, probes, tmp_path):
        """The name and the settings of a held-out text stay where its content changes."""
        cache = tmp_path / "base.json"
        assert self._probe(both, probes, cache, weights=["a", 1]) == "found"
        assert self._probe(both, probes, cache, "again", weights=["a", 1]) == "found"
        assert self._probe(both, probes, cache, "other weights", weights=["a", 2]) == "other weights"
        other = replace(probes, blocks=np.ones((1, 32), dtype=np.int64))
        assert self._probe(both, other, cache, "other text", weights=["a", 2]) == "other text"
        assert self._probe(both, other, cache, "again", weights=["a", 2]) == "other text"

    def test_of_a_run_before_a_key_existed_count_as_of_its_default(self, both, probes, tmp_path):
        cache = tmp_path / "base.json"
        self._probe(both, probes, cache)
        stored = json.loads(cache.read_text())
        for key in ("perplexity_stride", "prefill_chunk"):
            stored["conditions"]["evaluation"].pop(key, None)
        del stored["made_of"], stored["digest"]  # which that release did not write
        cache.write_text(json.dumps(stored))
        assert self._probe(both, probes, cache, "again") == "found"

    def test_of_an_untrained_base_are_kept_beside_it_for_other_runs(self, both, probes, tmp_path, monkeypatch):
        base = tmp_path / "base"
        base.mkdir()
        (base / "model.safetensors").write_bytes(b"weights")
        asked = []
        real = results._measure
        monkeypatch.setattr(results, "_measure", lambda *arguments: asked.append(1) or real(*arguments))

        def probe(run: str, label: str, questions=probes):
            options = dict(device=torch.device("cpu"), cache=tmp_path / run / "base.json", kept_beside=base)
            return probe_system("base", label, both[0], questions, **options)

        first, second = probe("first", "one"), probe("second", "two")
        assert len(asked) == 1 and {**first, "label": ""} == {**second, "label": ""} and second["label"] == "two"
        probe("third", "other tokens", replace(probes, blocks=np.ones((1, 32), dtype=np.int64)))
        assert len(asked) == 2
        (base / "model.safetensors").write_bytes(b"other weights")
        probe("fourth", "other weights")
        assert len(asked) == 3
        for kept in (tmp_path / "base.probes").iterdir():
            kept.write_text("{damaged")
        probe("fifth", "damaged")
        assert len(asked) == 4

    def test_do_not_depend_on_how_much_is_read_at_once(self, both, probes, tmp_path):
        cache = tmp_path / "base.json"
        self._probe(both, probes, cache)
        in_chunks = replace(probes, config=ProbesConfig(lengths=[32], prefill_chunk=7))
        assert self._probe(both, in_chunks, cache, "again") == "found"


def test_held_out_blocks_come_from_long_documents_only(encode):
    texts = ["short. ", "one two three four five. " * 40, "six seven eight. " * 60]
    blocks = held_out_blocks(texts, encode, block_length=50, num_tokens=80)
    assert blocks.shape == (2, 50)
    assert blocks[0].tolist() == encode(texts[1])[:50]
    with pytest.raises(DataError, match="no held-out document has 5000 tokens"):
        held_out_blocks(texts, encode, block_length=5000, num_tokens=80)


def test_the_cache_beside_a_base_model_depends_on_the_code_of_the_probes():
    """Each package of _CODE is found; a list without files would make every change of the code invisible."""
    files = {"/".join(path.parts[path.parts.index("endprompt_megatron", -5) + 1 :]) for path in results._code_files()}
    assert {"evaluation/probes/needle.py", "inference/forward.py", "model/gpt.py", "rope/scaling.py"} <= files
