"""Planted facts and held-out documents as samples: right and wrong models, against transformers, and the distances that training showed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt_megatron.config.probe_rules import RETRIEVAL_TASKS
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.probes import needle
from endprompt_megatron.evaluation.probes.gap import ANCHOR, GAP, NEAR
from endprompt_megatron.evaluation.probes.log_probability_tasks import (
    LogProbabilityTasks,
    TrainedSegments,
    log_probability_details,
    trained_segments,
)
from endprompt_megatron.evaluation.ruler.generation_tasks import GenerationTasks
from endprompt_megatron.evaluation.sample import DocumentSample, RetrievalSample, Sample
from endprompt_megatron.evaluation.suite import EvaluateConfig, NeedleConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import GAP_TASK, LOG_PERPLEXITY, NEEDLE, NEEDLE_PREFIX, TASKS
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.model import backends

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")
TRAINED = TrainedSegments(num_context_tokens=400, num_prompt_tokens=200, target_context_length=1600)
TEXTS = ["A text of words that say little, and go on. " * 200, "Another one, of other words; as long as it has to be. " * 200]
NEEDLES = [name for name in TASKS if TASKS[name].suite == NEEDLE]


def config_of(model_dir, **suite) -> EvaluateConfig:
    suite = {"name": "s", "tasks": ["needle"], "samples": 3} | suite
    return EvaluateConfig(model=str(model_dir), dtype="float32", suite=SuiteConfig(**suite))


@pytest.fixture(scope="module")
def make_tasks(tiny_model_dir, single_process):
    def make(config: EvaluateConfig, *, lengths=(512,), trained=TRAINED) -> LogProbabilityTasks:
        chunks = load_model(tiny_model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU)
        tokenizer = GenerationTasks(config, chunks, device=CPU)
        return LogProbabilityTasks(
            config,
            chunks,
            encode=tokenizer.encode,
            prefix=tokenizer.prefix,
            texts=lambda: TEXTS,
            lengths=list(lengths),
            trained=trained,
            device=CPU,
        )

    return make


def _answer_with(monkeypatch, *, right: bool) -> None:
    def logits(forward, trunk, questions, *, prefill_chunk):
        vocabulary = forward.chunks[-1].num_real_tokens
        wanted = [torch.tensor(answer) if right else (torch.tensor(answer) + 1) % vocabulary for _, answer in questions]
        return [50.0 * torch.nn.functional.one_hot(tokens, vocabulary).float() for tokens in wanted]

    monkeypatch.setattr(needle, "answer_logits", logits)


def test_the_suite_has_every_form_of_retrieval_and_the_gap():
    assert [*(NEEDLE_PREFIX + name for name in RETRIEVAL_TASKS), GAP_TASK] == NEEDLES


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize(("right", "score"), [(True, 100.0), (False, 0.0)])
def test_who_knows_everything_gets_100_and_who_knows_nothing_0(make_tasks, tiny_model_dir, monkeypatch, name, right, score):
    _answer_with(monkeypatch, right=right)
    length = None if name == GAP_TASK else 1600
    samples = make_tasks(config_of(tiny_model_dir)).run(TASKS[name], length=length, label="t")
    assert {sample.score for sample in samples} == {score} and [sample.index for sample in samples] == list(range(len(samples)))
    details = log_probability_details(samples, TRAINED)
    assert (details["parts_right"] == 1.0) if right else (details["parts_right"] < 0.2)
    assert (details["log_probability"] > -0.1) == right


def test_a_key_at_every_depth_is_a_question_of_one_haystack(make_tasks, tiny_model_dir, monkeypatch):
    _answer_with(monkeypatch, right=True)
    config = config_of(tiny_model_dir, needle=NeedleConfig(depths=[0.0, 0.5, 1.0]), samples=2)
    samples = make_tasks(config).run(TASKS["needle_multi_key"], length=1600, label="t")
    assert [(sample.haystack, sample.depth) for sample in samples] == [(0, 0.0), (0, 0.5), (0, 1.0), (1, 0.0), (1, 0.5), (1, 1.0)]
    assert len({sample.references for sample in samples}) == 6, "every key is another"
    assert all(0 < sample.distance < sample.prompt_tokens < 1600 for sample in samples)
    details = log_probability_details(samples, TRAINED)
    assert list(details["by_depth"]) == ["0.0", "0.5", "1.0"] and details["by_depth"]["0.5"]["trials"] == 2
    assert log_probability_details(samples, None)["by_region"] == {}


def test_several_keys_of_one_name_are_expected_in_the_order_of_the_text(tiny_model_dir, make_tasks):
    config = config_of(tiny_model_dir, needle=NeedleConfig(depths=[0.9, 0.1], digits=3), samples=1)
    tasks = make_tasks(config)
    (haystack,) = tasks._haystacks(TASKS["needle_multi_value"], 1600)
    (question,) = haystack.questions
    assert len(question.units) == 2 and question.units[0][1] == question.units[1][0] and question.depth is None
    keys = [tuple(question.answer[first:past]) for first, past in question.units]
    found = [_find(haystack.tokens, [token for token in key if token != tasks.encode(" ")[0]]) for key in keys]
    assert None not in found and found == sorted(found)


def _find(tokens, part):
    return next((place for place in range(len(tokens) - len(part) + 1) if list(tokens[place : place + len(part)]) == list(part)), None)


def test_the_gap_probe_places_questions_in_every_region_and_reports_them_by_region(make_tasks, tiny_model_dir, monkeypatch):
    _answer_with(monkeypatch, right=True)
    samples = make_tasks(config_of(tiny_model_dir)).run(TASKS[GAP_TASK], length=None, label="t")
    assert len(samples) == 9 and {sample.haystack for sample in samples} == set(range(9))
    regions = log_probability_details(samples, TRAINED)["by_region"]
    assert {name: figures["trials"] for name, figures in regions.items()} == {NEAR: 3, GAP: 3, ANCHOR: 3}
    assert (
        regions[NEAR]["distances"][1] < 400 <= regions[GAP]["distances"][0]
        and regions[GAP]["distances"][1] <= 1000 < regions[ANCHOR]["distances"][0]
    )


def test_which_distances_were_trained_comes_from_the_settings_or_the_model(tiny_model_dir):
    provenance = {"position_scheme": "endprompt", "end_prompt_lengths": [9, 11], "seq_length": 512, "target_context_length": 16384}
    assert trained_segments(config_of(tiny_model_dir), provenance) == TrainedSegments(501, 11, 16384)
    named = config_of(tiny_model_dir, needle=NeedleConfig(num_context_tokens=10, num_prompt_tokens=2, target_context_length=99))
    assert trained_segments(named, provenance) == TrainedSegments(10, 2, 99)
    assert trained_segments(config_of(tiny_model_dir), {"end_prompt_lengths": []}) is None
    for other in ({"position_scheme": "endprompt_random"}, {"target_context_length": 768}):  # the prompt moved; every distance was seen
        assert trained_segments(config_of(tiny_model_dir), provenance | other) is None, other
    half = config_of(tiny_model_dir, needle=NeedleConfig(num_context_tokens=10))
    with pytest.raises(ConfigError, match="name all three"):
        half.validate()


def test_the_same_key_at_another_place_is_another_question(make_tasks, tiny_model_dir, monkeypatch):
    """What pairs the samples of two models must not pair two depths, or two distances of the gap probe."""
    _answer_with(monkeypatch, right=True)
    by_depths = [
        make_tasks(config_of(tiny_model_dir, needle=NeedleConfig(depths=depths), samples=1)).run(
            TASKS["needle_single"], length=512, label="t"
        )[0]
        for depths in ([0.0], [1.0], [1.0])
    ]
    assert by_depths[0].references != by_depths[1].references == by_depths[2].references
    placed = make_tasks(config_of(tiny_model_dir, samples=1)).run(TASKS[GAP_TASK], length=None, label="t")
    assert len({sample.references for sample in placed}) == 3, "one key, in three regions"


def test_without_them_the_gap_probe_says_what_to_set(make_tasks, tiny_model_dir):
    with pytest.raises(ConfigError, match="suite.needle.num_context_tokens"):
        make_tasks(config_of(tiny_model_dir), trained=None).run(TASKS[GAP_TASK], length=None, label="t")


def test_a_document_scores_what_transformers_finds(make_tasks, tiny_model_dir):
    config = config_of(tiny_model_dir, tasks=["perplexity"], samples=2)
    tasks = make_tasks(config, lengths=[512, 1024])
    long, short = (tasks.run(TASKS[LOG_PERPLEXITY], length=length, label="t") for length in (1024, 512))
    assert [type(sample) for sample in long] == [DocumentSample, DocumentSample]
    assert [sample.references for sample in long] == [sample.references for sample in short], "the same documents at every length"
    assert [sample.tokens for sample in long] == [1023] * 2 and [sample.tokens for sample in short] == [1022] * 2
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    for text, whole, halves in zip(TEXTS, long, short, strict=True):
        ids = torch.tensor([tasks.encode(text)[:1024]])
        with torch.no_grad():
            assert whole.score == pytest.approx(float(reference(ids, labels=ids).loss), rel=1e-5)
            parts = [float(reference(part, labels=part).loss) for part in ids.split(512, dim=1)]
        assert halves.score == pytest.approx(np.mean(parts), rel=1e-5)
        assert float(whole.output.split()[-1]) == pytest.approx(math.exp(whole.score), rel=1e-4)


def test_lengths_that_cannot_be_are_refused_in_words(make_tasks, tiny_model_dir):
    with pytest.raises(DataError, match="leave no room for noise"):
        make_tasks(config_of(tiny_model_dir)).run(TASKS["needle_multi_key"], length=150, label="t")
    with pytest.raises(DataError, match="no held-out document has 99999 tokens"):
        make_tasks(config_of(tiny_model_dir, tasks=["perplexity"]), lengths=[99999]).run(TASKS[LOG_PERPLEXITY], length=512, label="t")


def test_generated_samples_have_no_details():
    assert log_probability_details([Sample(0, 1.0, "", [])], TRAINED) is None
    assert isinstance(RetrievalSample(0, 1.0, "", []), Sample)
