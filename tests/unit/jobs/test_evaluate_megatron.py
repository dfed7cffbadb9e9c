"""An evaluation on Megatron-Core from its settings to its files, by models that know everything or nothing. Apart from test_evaluate.py and
test_generation_tasks.py because it starts Megatron-Core itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from endprompt_megatron.comparison.paired_evaluations import read_evaluation
from endprompt_megatron.config.schema import TextSource
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.ruler import generation_tasks
from endprompt_megatron.evaluation.ruler.samples import FORMS, QA_TASKS
from endprompt_megatron.evaluation.suite import EvaluateConfig, PerplexityConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.jobs.evaluate import evaluate
from endprompt_megatron.report.suite_comparison import write_suite_comparison

PROSE = [
    "It was a quiet morning in the valley. The miller opened his window; nobody passed. ",
    "They built a second bridge! It stood on seven arches. ",
]


def _sources(folder: Path, *names: str) -> SourcesConfig:
    """Local files in the forms of the data sets; prose in each of the three forms that are read."""
    houses = [("house", "eleven"), ("tower", "two"), ("barn", "six"), ("mill", "nine")]
    contexts = [f"The {name} has {count} rooms." for name, count in houses]
    answers = [[{"text": count}, {"text": f"{count} rooms"}] for _, count in houses]
    paragraphs = [
        {"context": context, "qas": [{"question": f"How many rooms has the {name}?", "answers": given}]}
        for (name, _), context, given in zip(houses, contexts, answers, strict=True)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    asked = [
        {"question": f"Rooms of the {name}?", "answer": count, "context": [[name, [f"The {name} has {count} rooms."]]]}
        for name, count in houses
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(asked))
    prose = folder / "prose"
    prose.mkdir()
    (prose / "a.txt").write_text(PROSE[0] * 40)
    (prose / "b.jsonl").write_text(json.dumps({"text": PROSE[1] * 40}) + "\n")
    paths = {"squad": folder / "squad.json", "hotpotqa": folder / "hotpotqa.json", "essays": prose, "haystack_stand_in": prose}
    return SourcesConfig(**{name: str(paths[name]) for name in names})


@pytest.fixture
def asked(monkeypatch, tiny_model_dir):
    """The samples of the last task; `knows` says whether the model answers right or not at all."""
    tokenizer, last = AutoTokenizer.from_pretrained(tiny_model_dir), {"knows": True, "prompts": {}}

    def remember(make):
        def remembering(*arguments, **options):
            last["samples"] = make(*arguments, **options)
            last["prompts"] |= {sample.task: sample.prompt for sample in last["samples"]}
            return last["samples"]

        return remembering

    def write(model, prompts, **_):
        answers = [sample.references[-1:] if sample.task in QA_TASKS else sample.references for sample in last["samples"]]
        return [tokenizer(" ".join(answer), add_special_tokens=False)["input_ids"] if last["knows"] else [] for answer in answers]

    for name in ("make_samples", "make_qa_samples"):
        monkeypatch.setattr(generation_tasks, name, remember(getattr(generation_tasks, name)))
    monkeypatch.setattr(generation_tasks, "greedy_generate", write)
    return last


def _evaluate(model: Path, directory: Path, **suite) -> dict:
    suite = SuiteConfig(**{"name": "ruler_offline", "tasks": ["ruler_offline"], "lengths": [8192], "samples": 1} | suite)
    config = EvaluateConfig(model=str(model), backend="megatron", dtype="float32", device="cpu", output_dir=str(directory), suite=suite)
    assert evaluate(config, command="c")
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize(("knows", "score"), [(True, 100.0), (False, 0.0)])
def test_who_knows_everything_gets_100_and_who_says_nothing_0(tiny_model_dir, tmp_path, asked, knows, score):
    """Of a question's accepted answers the last alone is enough."""
    asked["knows"] = knows
    results = _evaluate(tiny_model_dir, tmp_path / "out", sources=_sources(tmp_path, "squad", "hotpotqa"))
    assert {entry["task"]: entry["score"] for entry in results["scores"]} == {f"offline_{task}": score for task in (*FORMS, *QA_TASKS)}
    assert results["not_run"] == [] and results["conditions"]["dtype"] == "float32"
    assert f"| offline_niah_single | {score:.1f} | {score:.1f} |" in (tmp_path / "out" / "evaluation.md").read_text()
    assert "several accepted answers, one of them is enough" in (tmp_path / "out" / "evaluation.md").read_text()


def test_tasks_without_their_data_are_named_with_the_way_out(tiny_model_dir, tmp_path, asked, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # with a network too: Megatron-Core's tasks fetch nothing
    results = _evaluate(tiny_model_dir, tmp_path, tasks=["offline_frequent_words", "offline_qa_squad", "offline_qa_hotpotqa"])
    assert [entry["task"] for entry in results["scores"]] == ["offline_frequent_words"]
    reasons = {entry["task"]: entry["reason"] for entry in results["not_run"]}
    assert "set suite.sources.squad to the file dev-v2.0.json" in reasons["offline_qa_squad"]
    assert "set suite.sources.hotpotqa to the file hotpot_dev_distractor_v1.json" in reasons["offline_qa_hotpotqa"]


@pytest.mark.parametrize(("source", "mark"), [("haystack_stand_in", "stand-in haystack"), ("essays", "essays")])
def test_local_prose_hides_the_facts_and_is_named(tiny_model_dir, tmp_path, asked, source, mark):
    tasks = ["offline_niah_single", "offline_variable_tracking", "offline_common_words"]
    results = _evaluate(tiny_model_dir, tmp_path / "out", tasks=tasks, sources=_sources(tmp_path, source))
    named = [f"offline_niah_single ({mark})", f"offline_variable_tracking ({mark})", "offline_common_words"]  # the last is made of words
    assert {entry["task"] for entry in results["scores"]} == set(named)
    assert all(entry["score"] == 100.0 for entry in results["scores"])
    assert PROSE[0] in asked["prompts"]["niah_single"] and "The grass is green." not in asked["prompts"]["niah_single"]
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert all(f"| {name} | 100.0 |" in page for name in named)
    assert results["conditions"]["local_sources"] == {source: str(tmp_path / "prose")}


def test_suites_share_a_directory_and_a_comparison(tiny_model_dir, tmp_path):
    """Asked one after the other, in one directory or in several; each on the page with its own conditions."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": PROSE[0] * 40}) + "\n")
    text = PerplexityConfig(text=[TextSource(path=str(held_out))])
    for directory in ("together", "apart/one"):
        _evaluate(tiny_model_dir, tmp_path / directory, tasks=["perplexity"], lengths=[512], perplexity=text)
    for directory in ("together", "apart/another"):
        results = _evaluate(tiny_model_dir, tmp_path / directory, tasks=["needle_single"], lengths=[512])
    page = (tmp_path / "together" / "evaluation.md").read_text()
    assert "Windows do not overlap." in page and f"text ['{held_out}']" in page and "depths" in page
    assert "perplexity" not in results["conditions"], "that directory has none"
    models = {name: {1: read_evaluation(tmp_path / name)} for name in ("apart", "together")}
    page = write_suite_comparison(tmp_path, "c", models, reference="together", commands=["c"]).read_text()
    assert "| needle_single at 512 | apart | 1 | 0.0 | +0.0 |" in page and "| log_perplexity at 512 | apart |" in page


def test_another_held_out_text_of_the_same_name_is_refused(tiny_model_dir, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    asked = dict(tasks=["perplexity"], lengths=[512], perplexity=PerplexityConfig(text=[TextSource(path=str(held_out))]))
    held_out.write_text(json.dumps({"text": PROSE[0] * 40}) + "\n")
    _evaluate(tiny_model_dir, tmp_path / "out", **asked)
    held_out.write_text(json.dumps({"text": PROSE[1] * 60}) + "\n")
    with pytest.raises(ConfigError, match="evaluated under other conditions .*sources was"):
        _evaluate(tiny_model_dir, tmp_path / "out", **asked)


def test_lm_evals_tasks_run_on_the_same_model(word_model_dir, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e .[eval]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = SuiteConfig(name="ruler", tasks=["ruler_fwe"], lengths=[512], samples=1)
    options = dict(model=str(word_model_dir), backend="megatron", dtype="float32", device="cpu", suite=suite)
    assert evaluate(EvaluateConfig(output_dir=str(tmp_path), **options), command="c")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["task"] for entry in results["scores"]] == ["ruler_fwe"] and results["not_run"] == []
    conditions = results["conditions"]
    assert (conditions["harness"], conditions["backend"]) == ("lm-eval 0.4.13", "Megatron-Core, SDPA attention")
    assert "512 tokens beyond the length" in conditions["room_for_answers"] and conditions["bos"] == "one, <|im_start|>"
    (record,) = [json.loads(line) for line in (tmp_path / "records" / "ruler_fwe_512.jsonl").read_text().splitlines()]
    assert record["output"] and 200 < record["prompt_tokens"] < 600
