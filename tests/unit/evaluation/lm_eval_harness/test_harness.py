"""lm-eval itself, with models of ours: one that is always right, one that says nothing. Skipped where lm-eval is not installed."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.suite import EvaluateConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import TASKS

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install -e .[eval]", allow_module_level=True)

from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from endprompt_megatron.evaluation.lm_eval_harness.harness import Harness

OFFLINE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
SAMPLES = 2


class Answers(LM):
    """A model that answers by a function of the request."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.prompts = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def _right(doc) -> str:
    return " and ".join(doc.get("outputs") or doc["answers"])


def _silent(doc) -> str:
    return ""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _harness(model: Path, answer, *, samples: int = SAMPLES, **sources: str) -> Harness:
    suite = SuiteConfig(name="test", tasks=["ruler"], samples=samples, sources=SourcesConfig(**sources))
    return Harness(EvaluateConfig(model=str(model), suite=suite), max_length=2048, lm=Answers(answer))


def _run(harness: Harness, task: str, directory: Path, length: int | None = 1024):
    return harness.run(TASKS[task], length=length, window=8192, label=task, log_file=directory / "harness.log")


def test_right_answers_score_100_and_silence_0_on_every_offline_task(word_model_dir, tmp_path):
    right, silent = _harness(word_model_dir, _right), _harness(word_model_dir, _silent)
    for task in OFFLINE:
        found = _run(right, task, tmp_path)
        assert [(sample.index, sample.score) for sample in found] == [(0, 100.0), (1, 100.0)], task
        assert found[0].references and found[0].output == " and ".join(found[0].references)
        assert [sample.score for sample in _run(silent, task, tmp_path)] == [0.0, 0.0], task


def test_half_an_answer_scores_half(word_model_dir, tmp_path):
    half = _harness(word_model_dir, lambda doc: " ".join(doc["outputs"][: len(doc["outputs"]) // 2]))
    assert [sample.score for sample in _run(half, "ruler_cwe", tmp_path)] == [50.0, 50.0]


@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe", "niah_multikey_2"])
def test_samples_are_the_first_of_the_500_that_lm_eval_makes(task, word_model_dir, tmp_path):
    from lm_eval.tasks import TaskManager

    harness = _harness(word_model_dir, _right)
    _run(harness, "ruler_cwe", tmp_path)  # what ran before must not matter
    harness.lm.prompts.clear()
    _run(harness, task, tmp_path)
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ruler"
    harness._ruler_module("cwe_utils")  # lm-eval's own generator of common words, at its start
    random.seed(42)
    np.random.seed(42)
    manager = TaskManager(
        include_defaults=False, include_path=str(folder), metadata={"tokenizer": str(word_model_dir), "max_seq_lengths": [1024]}
    )
    documents = manager.load([task])["tasks"][task].dataset["test"]
    assert len(documents) == 500
    for prompt, document in zip(harness.lm.prompts, documents, strict=False):
        assert prompt.startswith(document["input"]) and prompt.endswith(document["gen_prefix"])


def test_where_lm_eval_would_not_end_it_is_refused(tiny_model_dir, tmp_path):
    harness = _harness(tiny_model_dir, _right)  # 512 tokens of vocabulary: words take several times as many
    for task in ("ruler_vt", "ruler_cwe"):
        with pytest.raises(DataError, match="would not end"):
            _run(harness, task, tmp_path, length=512)


def _squad(path: Path) -> Path:
    """Two questions in SQuAD's form."""
    paragraphs = [
        {"context": f"The {name} has {count} rooms. " * 3, "qas": [
            {"question": f"How many rooms has the {name}?", "answers": [{"text": str(count)}], "is_impossible": False}
        ]}
        for name, count in (("house", 11), ("tower", 23), ("barn", 37), ("mill", 41))
    ]  # fmt: skip
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def test_a_local_squad_takes_the_place_of_the_download(word_model_dir, tmp_path):
    harness = _harness(word_model_dir, _right, squad=str(_squad(tmp_path / "dev.json")))
    found = _run(harness, "ruler_qa_squad", tmp_path)
    assert [(sample.references, sample.score) for sample in found] == [(["11"], 100.0), (["23"], 100.0)]
    assert "The house has 11 rooms." in harness.lm.prompts[0]


def test_a_local_longbench_takes_the_place_of_the_hubs(word_model_dir, tmp_path):
    copy = tmp_path / "longbench"
    (copy / "qasper").mkdir(parents=True)
    rows = [{"context": f"The answer is {n}.", "question": "Which?", "answers": [f"number {n}"], "all_classes": None} for n in range(3)]
    (copy / "qasper" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: qasper\n  data_files:\n  - split: test\n    path: qasper/test.jsonl\n---\n"
    )
    found = _run(_harness(word_model_dir, _right, longbench=str(copy)), "longbench_qasper", tmp_path, length=None)
    assert [(sample.index, sample.score) for sample in found] == [(0, 100.0), (1, 100.0)]
    assert [
        sample.score for sample in _run(_harness(word_model_dir, _silent, longbench=str(copy)), "longbench_qasper", tmp_path, length=None)
    ] == [0, 0]


def test_local_prose_takes_the_place_of_the_essays(word_model_dir, tmp_path):
    from endprompt_megatron.evaluation.lm_eval_harness.harness import has_punkt

    if not has_punkt():
        pytest.skip("NLTK's punkt_tab is not there: python -m nltk.downloader punkt_tab, or set NLTK_DATA")
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("A sentence about gardens stands here. " * 2000)
    harness = _harness(word_model_dir, _right, haystack_stand_in=str(tmp_path / "prose"))
    for task in ("niah_single_2", "niah_multivalue"):
        assert [sample.score for sample in _run(harness, task, tmp_path, length=4096)] == [100.0, 100.0]
    assert all("A sentence about gardens" in prompt for prompt in harness.lm.prompts)


def _hf(model: Path, **changes) -> HFLM:
    suite = SuiteConfig(name="test", tasks=["niah_single_1"], samples=1)
    config = EvaluateConfig(model=str(model), suite=suite, device="cpu", dtype="float32", **changes)
    return Harness(config, max_length=256).lm


def test_one_bos_stands_before_a_prompt_or_none(tiny_model_dir):
    lm = _hf(tiny_model_dir)
    bos = lm.tokenizer.bos_token_id
    assert bos is not None and lm.tok_encode("The grass")[0] == bos and lm.tok_encode("The grass").count(bos) == 1
    assert lm.tok_batch_encode(["The grass"])[0][0].tolist().count(bos) == 1
    assert lm.tok_encode(lm.tokenizer.bos_token + "The grass").count(bos) == 1  # a chat template brings its own
    assert bos not in _hf(tiny_model_dir, bos="none").tok_encode("The grass")
    assert lm.model.config._attn_implementation == "sdpa"


def test_a_tokenizer_that_gives_other_than_one_bos_is_refused(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(HFLM, "tok_encode", lambda self, text, **options: [self.tokenizer.bos_token_id] * 2 + [5])
    with pytest.raises(DataError, match="a prompt needs 1 BOS tokens, and 2 were found"):
        _hf(tiny_model_dir)
