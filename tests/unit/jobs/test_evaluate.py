"""An evaluation from its settings to its files, with a harness of ours in lm-eval's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from endprompt_megatron.config.schema import LaunchConfig, ParallelConfig, TextSource
from endprompt_megatron.errors import USER_ERRORS, BackendUnavailableError, ConfigError
from endprompt_megatron.evaluation import conditions
from endprompt_megatron.evaluation.lm_eval_harness.harness import VERSION
from endprompt_megatron.evaluation.sample import Sample
from endprompt_megatron.evaluation.suite import EvaluateConfig, NeedleConfig, PerplexityConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.jobs import evaluate as module
from endprompt_megatron.jobs.evaluate import evaluate
from tests.support.disk_faults import OF_NOTHING, DiskFault, operations_of
from tests.support.tiny import copy_model, edit_config

OFFLINE_TASKS = ["niah_single_1", "ruler_vt"]


class FakeHarness:
    """Answers every second sample correctly. Raises the exception in `failing` for a task listed there."""

    asked: list[tuple[str, int | None]] = []
    failing: dict[str, Exception] = {}

    def __init__(self, config, *, max_length, lm=None):
        self.config, FakeHarness.max_length = config, max_length

    def run(self, task, *, length, window, label, log_file):
        FakeHarness.asked.append((task.id, length))
        if task.id in FakeHarness.failing:
            raise FakeHarness.failing[task.id]
        return [Sample(index, 100.0 * (index % 2), f"answer {index} ü", ["answer"], 7) for index in range(self.config.suite.samples or 4)]


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    monkeypatch.setattr(FakeHarness, "asked", [])
    monkeypatch.setattr(FakeHarness, "failing", {})
    monkeypatch.setattr(module, "Harness", FakeHarness)
    monkeypatch.setattr(conditions, "harness_version", lambda: VERSION)
    monkeypatch.setattr(module, "has_punkt", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return FakeHarness


def _config(model: Path, directory: Path, **changes) -> EvaluateConfig:
    suite = {"name": "mine", "tasks": OFFLINE_TASKS, "lengths": [512, 1024], "samples": 4} | changes.pop("suite", {})
    return EvaluateConfig(model=str(model), output_dir=str(directory), suite=SuiteConfig(**suite), **changes)


def _results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def test_results_name_every_score_with_its_conditions_and_samples(tiny_model_dir, tmp_path, harness):
    assert evaluate(_config(tiny_model_dir, tmp_path), command="the command")
    results = _results(tmp_path)
    assert results["model"] == str(tiny_model_dir) and results["not_run"] == []
    assert [(score["task"], score["length"]) for score in results["scores"]] == [
        ("niah_single_1", 1024), ("niah_single_1", 512), ("ruler_vt", 1024), ("ruler_vt", 512),
    ]  # fmt: skip
    assert harness.asked == [("niah_single_1", 512), ("niah_single_1", 1024), ("ruler_vt", 512), ("ruler_vt", 1024)]
    assert harness.max_length == 1024 + 512
    first = results["scores"][0]
    keys = "suite task task_id haystack group length metric score samples interval seconds records"
    assert list(first) == keys.split()
    assert (first["suite"], first["group"], first["score"], first["samples"]) == ("ruler", "retrieval", 50.0, 4)
    assert 0 <= first["interval"][0] < 50 < first["interval"][1] <= 100
    lines = [json.loads(line) for line in (tmp_path / first["records"]).read_text().splitlines()]
    assert lines[1] == {"index": 1, "score": 100.0, "output": "answer 1 ü", "references": ["answer"], "prompt_tokens": 7}
    conditions = results["conditions"]
    assert conditions["harness"] == f"lm-eval {VERSION}" and conditions["command"] == "the command"
    for name in ("backend", "dtype", "bos", "chat_template", "samples", "seed", "window", "torch", "transformers", "hardware", "model"):
        assert name in conditions
    assert "| niah_single_1 | 50.0 | 50.0 | 50.0 |" in (tmp_path / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("lasting", "every"),
    [(False, 5), pytest.param(False, 1, marks=pytest.mark.repeated), pytest.param(True, 1, marks=pytest.mark.repeated)],
)
def test_a_disk_that_refuses_a_write_ends_the_evaluation_and_loses_no_score(tiny_model_dir, tmp_path, harness, lasting, every):
    """Whichever write it is: a full disk is no failure of a task, and the same command asks what is missing alone."""
    root = tmp_path / "out"
    config = _config(tiny_model_dir, root, suite={"lengths": [512]})
    operations = operations_of(lambda: evaluate(config, command=""), root)
    assert len(operations) > 20
    for number, (operation, kind) in list(enumerate(operations))[::every]:
        if operation in OF_NOTHING:
            continue
        shutil.rmtree(root)
        with DiskFault(root, number, lasting=lasting), pytest.raises(USER_ERRORS, match=f"{root}.*(No space left|Read-only)"):
            evaluate(config, command="")
        finished = len(list((root / "records").glob("*.json")))
        harness.asked.clear()
        assert evaluate(config, command=""), (operation, kind)
        assert len(harness.asked) == 2 - finished and len(_results(root)["scores"]) == 2, (operation, kind)


def test_a_second_start_runs_only_what_is_missing(tiny_model_dir, tmp_path, harness):
    harness.failing = {"ruler_vt": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        evaluate(_config(tiny_model_dir, tmp_path), command="")
    assert len(_results(tmp_path)["scores"]) == 2 and "**2 are not finished" in (tmp_path / "evaluation.md").read_text()
    harness.failing, harness.asked[:] = {}, []
    assert evaluate(_config(tiny_model_dir, tmp_path), command="")
    assert harness.asked == [("ruler_vt", 512), ("ruler_vt", 1024)] and len(_results(tmp_path)["scores"]) == 4
    assert "are not finished" not in (tmp_path / "evaluation.md").read_text()
    harness.asked[:] = []
    assert evaluate(_config(tiny_model_dir, tmp_path, suite={"tasks": ["ruler_cwe"], "lengths": [512]}), command="")
    assert harness.asked == [("ruler_cwe", 512)] and len(_results(tmp_path)["scores"]) == 5  # earlier scores stay


def test_a_score_without_its_end_mark_is_computed_again(tiny_model_dir, tmp_path, harness):
    evaluate(_config(tiny_model_dir, tmp_path), command="")
    (tmp_path / "records" / "ruler_vt_512.json").unlink()
    harness.asked[:] = []
    evaluate(_config(tiny_model_dir, tmp_path), command="")
    assert harness.asked == [("ruler_vt", 512)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": {"samples": 6}}, "samples was 4, is 6"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"dtype": "float32"}, "dtype was 'auto', is 'float32'"),
        ({"suite": {"apply_chat_template": True}}, "chat_template was False, is True"),
    ],
)
def test_other_conditions_are_refused_and_overwrite_replaces_the_results(tiny_model_dir, tmp_path, harness, changes, words):
    evaluate(_config(tiny_model_dir, tmp_path), command="")
    with pytest.raises(ConfigError, match=words):
        evaluate(_config(tiny_model_dir, tmp_path, **changes), command="")
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in changes.items()}
    changed["suite"] = {"tasks": ["ruler_vt"]} | changed.get("suite", {})
    harness.asked[:] = []
    assert evaluate(_config(tiny_model_dir, tmp_path, overwrite=True, **changed), command="")
    assert harness.asked == [("ruler_vt", 512), ("ruler_vt", 1024)]
    assert {score["task"] for score in _results(tmp_path)["scores"]} == {"ruler_vt"}  # niah_single_1 was evaluated under other conditions


def test_another_model_in_the_same_place_is_another_condition(tiny_model_dir, tmp_path):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    evaluate(_config(model, tmp_path / "out"), command="")
    edit_config(model, rope_theta=20000.0)
    with pytest.raises(ConfigError, match="model was"):
        evaluate(_config(model, tmp_path / "out"), command="")


def test_a_task_that_fails_is_named_and_the_others_go_on(tiny_model_dir, tmp_path, harness):
    harness.failing = {"niah_single_1": MemoryError("64 GiB asked for\nand more words")}
    assert not evaluate(_config(tiny_model_dir, tmp_path), command="")
    results = _results(tmp_path)
    assert [score["task"] for score in results["scores"]] == ["ruler_vt", "ruler_vt"]
    identity = {"task": "niah_single_1", "task_id": "niah_single_1", "haystack": "benchmark"}
    assert results["not_run"][0] == {**identity, "length": 512, "reason": "MemoryError: 64 GiB asked for"}
    assert "MemoryError: 64 GiB asked for" in (tmp_path / "evaluation.md").read_text()


def test_what_cannot_run_is_named_and_is_no_failure(tiny_model_dir, tmp_path, harness):
    tasks = ["ruler_qa_squad", "niah_single_2", "humaneval", "ruler_vt"]
    assert evaluate(_config(tiny_model_dir, tmp_path, suite={"tasks": tasks, "lengths": [512]}), command="")
    reasons = {entry["task"]: entry["reason"] for entry in _results(tmp_path)["not_run"]}
    assert set(reasons) == {"ruler_qa_squad", "niah_single_2", "humaneval"} and harness.asked == [("ruler_vt", 512)]
    assert "suite.sources.squad" in reasons["ruler_qa_squad"] and "suite.allow_code_execution=true" in reasons["humaneval"]


def test_a_dataset_that_cannot_be_fetched_says_what_to_provide(tiny_model_dir, tmp_path, harness):
    harness.failing = {"gsm8k": ConnectionError("no route")}
    assert not evaluate(_config(tiny_model_dir, tmp_path, suite={"tasks": ["gsm8k"]}), command="")
    assert "suite.sources.gsm8k" in _results(tmp_path)["not_run"][0]["reason"]


def test_a_stand_in_haystack_is_marked_everywhere(tiny_model_dir, tmp_path):
    (tmp_path / "prose" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    (tmp_path / "prose" / "a.txt").write_text("Some prose.")
    sources = SourcesConfig(haystack_stand_in=str(tmp_path / "prose"), punkt=str(tmp_path / "prose"))
    suite = {"tasks": ["niah_single_2", "ruler_vt"], "lengths": [512], "sources": sources}
    evaluate(_config(tiny_model_dir, tmp_path / "out", suite=suite), command="")
    results, page = _results(tmp_path / "out"), (tmp_path / "out" / "evaluation.md").read_text()
    assert [score["task"] for score in results["scores"]] == ["niah_single_2 (stand-in haystack)", "ruler_vt"]
    assert [score["task_id"] for score in results["scores"]] == ["niah_single_2", "ruler_vt"]
    assert [score["haystack"] for score in results["scores"]] == ["stand_in", "benchmark"]
    assert results["scores"][0]["records"] == "records/niah_single_2_stand_in_512.jsonl"
    assert str(tmp_path / "prose") == results["conditions"]["local_sources"]["haystack_stand_in"]
    assert "| **mean over tasks, of those that ran** | 50.0 (1 of 13) |" in page and "They are no RULER scores" in page


def test_a_window_below_the_default_lengths_requires_lengths(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="Name the lengths"):
        evaluate(_config(tiny_model_dir, tmp_path, suite={"lengths": None}), command="")


def test_a_directory_in_use_is_refused(tiny_model_dir, tmp_path):
    with module.claimed(tmp_path, doing="writes there"), pytest.raises(ConfigError, match="another process"):
        evaluate(_config(tiny_model_dir, tmp_path), command="")


def test_missing_backends_say_how_to_install_them(tiny_model_dir, tmp_path, monkeypatch):
    import importlib.metadata

    from endprompt_megatron.evaluation.lm_eval_harness import harness

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(BackendUnavailableError, match=r"pip install -e '\.\[eval\]'"):
        harness.harness_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9")
    with pytest.raises(BackendUnavailableError, match="only 0.4.13 is supported"):
        harness.harness_version()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="vLLM is not installed"):
        evaluate(_config(tiny_model_dir, tmp_path, backend="vllm"), command="")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": ParallelConfig(tensor_model_parallel_size=3), "launch": LaunchConfig(nproc_per_node=3)}, "must divide the model's"),
        ({"parallel": ParallelConfig(pipeline_model_parallel_size=2)}, "must be a multiple of TP x PP x CP"),
        ({"suite": {"needle": NeedleConfig(depths=[2.0])}}, "suite.needle.depths=2.0: must be between 0 and 1"),
        ({"suite": {"tasks": ["needle", "ruler"]}, "launch": LaunchConfig(nproc_per_node=2)}, "run in one process"),
        (
            {"suite": {"tasks": ["perplexity"], "perplexity": PerplexityConfig(stride=512)}},
            "must be less than the shortest of suite.lengths",
        ),
        ({"model": "nowhere"}, "model=nowhere: no config.json there"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tiny_model_dir, tmp_path, changes, words):
    suite = {"tasks": ["needle"]} | changes.pop("suite", {})
    config = _config(changes.pop("model", tiny_model_dir), tmp_path / "out", suite=suite, **changes)
    with pytest.raises(ConfigError, match=words):
        evaluate(config, command="")
    assert not (tmp_path / "out").exists()


def test_lm_evals_own_models_run_in_one_process_however_many_gpus_there_are(tiny_model_dir, tmp_path):
    assert _config(tiny_model_dir, tmp_path).launch.nproc_per_node == 1
    assert _config(tiny_model_dir, tmp_path, suite={"tasks": ["needle"]}).launch.nproc_per_node is None
    assert _config(tiny_model_dir, tmp_path, backend="megatron").launch.nproc_per_node is None


def test_held_out_text_that_is_missing_is_named_and_the_others_go_on(tiny_model_dir, tmp_path, harness):
    text = PerplexityConfig(text=[TextSource(path=str(tmp_path / "none.jsonl"))])
    suite = {"tasks": ["ruler_vt", "perplexity"], "lengths": [512], "perplexity": text}
    assert evaluate(_config(tiny_model_dir, tmp_path / "out", suite=suite), command="")
    (missing,) = _results(tmp_path / "out")["not_run"]
    assert missing["task"] == "log_perplexity" and "suite.perplexity.text" in missing["reason"] and "none.jsonl" in missing["reason"]
    assert harness.asked == [("ruler_vt", 512)]
