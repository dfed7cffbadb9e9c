"""An evaluation on Megatron-Core from its settings to its files, by models that know everything or nothing. Apart from test_evaluate.py and
test_megatron_probes.py because it starts Megatron-Core itself."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from endprompt_megatron.evaluate import evaluate
from endprompt_megatron.evaluation import megatron_probes
from endprompt_megatron.evaluation.ruler import TASKS, make_samples
from endprompt_megatron.evaluation.suite import EvaluateConfig, SuiteConfig


@pytest.mark.parametrize(("knows", "score"), [(True, 100.0), (False, 0.0)])
def test_who_knows_everything_gets_100_and_who_says_nothing_0(tiny_model_dir, tmp_path, monkeypatch, knows, score):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    answers = []

    def remember(*arguments, **options):
        samples = make_samples(*arguments, **options)
        answers[:] = [" ".join(sample.references) for sample in samples]
        return samples

    def write(model, prompts, **_):
        return [tokenizer(answer, add_special_tokens=False)["input_ids"] if knows else [] for answer in answers]

    monkeypatch.setattr(megatron_probes, "make_samples", remember)
    monkeypatch.setattr(megatron_probes, "greedy_generate", write)
    suite = SuiteConfig(name="probes", tasks=["probes"], lengths=[8192], samples=1)
    config = EvaluateConfig(
        model=str(tiny_model_dir), backend="megatron", dtype="float32", device="cpu", output_dir=str(tmp_path), suite=suite
    )
    assert evaluate(config, command="c")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["task"]: entry["score"] for entry in results["scores"]} == {f"probe_{task}": score for task in TASKS}
    assert results["not_run"] == [] and results["conditions"]["dtype"] == "float32"
    assert f"| probe_niah_single | {score:.1f} | {score:.1f} |" in (tmp_path / "evaluation.md").read_text()
