"""What an evaluation may be, and where its tasks get their texts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import hydra
import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig, NeedleConfig, PerplexityConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import (
    SOURCES,
    SUITES,
    TASKS,
    fingerprint,
    is_offline,
    missing_offline,
    path_problems,
    tasks_of,
    uses_stand_in,
)
from tests.support.run_recipe import ROOT

SUITE_FILES = sorted(path.stem for path in (ROOT / "conf" / "suite").glob("*.yaml"))


@pytest.fixture(scope="module")
def to_evaluation():
    """Of recipes/evaluate.py, under another name: lm-eval imports a package that is called evaluate."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.to_evaluation


def _compose(*overrides: str):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("evaluate", overrides=list(overrides))


@pytest.mark.parametrize("name", SUITE_FILES)
def test_suite_composes_and_is_valid(name, to_evaluation, tiny_model_dir):
    config = to_evaluation(_compose(f"+suite={name}"), str(tiny_model_dir))
    config.validate()
    assert config.suite.name == name
    assert {task.suite for task in config.suite.chosen()} == (set(SUITES) if name == "all" else {name})
    assert "recipes/evaluate.py +suite=" + name in (ROOT / "conf" / "suite" / f"{name}.yaml").read_text()


def test_the_skeleton_has_the_defaults_of_the_schema(to_evaluation, tiny_model_dir):
    """Hydra overrides only keys that are there."""
    config = to_evaluation(_compose("+suite=ruler"), str(tiny_model_dir))
    fresh = EvaluateConfig(model=str(tiny_model_dir), suite=SuiteConfig(name="ruler", tasks=["ruler"], samples=500))
    assert config == fresh
    sources = to_evaluation(_compose("+suite=ruler", f"suite.sources.squad={tiny_model_dir}"), str(tiny_model_dir)).suite.sources
    assert sources.squad == str(tiny_model_dir)


def test_numbers_of_tasks_are_the_benchmarks():
    assert [len(tasks_of([suite])) for suite in ("ruler", "longbench", "short", "probes")] == [13, 16, 4, 12]
    assert len({task.group for task in tasks_of(["longbench"])}) == 6
    assert len(tasks_of(["ruler", "niah_single_1", "ruler"])) == 13
    assert {name for task in TASKS.values() for name in task.needs} <= set(SOURCES)
    assert set(vars(SourcesConfig())) == set(SOURCES)


def test_a_typo_and_a_missing_suite_are_told(to_evaluation):
    with pytest.raises(ConfigError, match="suite.lenghts"):
        to_evaluation(_compose("+suite=ruler", "+suite.lenghts=[4096]"), "DIR")
    with pytest.raises(ConfigError, match="add \\+suite=NAME, one of all, "):
        to_evaluation(_compose(), "DIR")


def test_every_problem_is_told_at_once(tmp_path):
    suite = SuiteConfig(
        name="mine",
        tasks=["niah_single_9"],
        lengths=[100, 100],
        samples=0,
        num_fewshot={"niah_single_1": 3},
        sources=SourcesConfig(essays=str(tmp_path / "none"), squad=str(tmp_path), punkt=str(tmp_path), haystack_stand_in=str(tmp_path)),
    )
    config = EvaluateConfig(
        model=str(tmp_path), suite=suite, backend="onnx", dtype="fp8", bos="two", batch_size=0, seed=-1, tensor_parallel_size=0
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    told = "\n".join(caught.value.problems)
    for part in (
        "niah_single_9 is neither", "each once", "100 tokens", "samples=0", "num_fewshot.niah_single_1=3", "sources.essays=", "sources.squad=",
        "sources.punkt=", "haystack_stand_in", "both set", "no config.json", "backend=onnx", "dtype=fp8", "bos=two", "batch_size=0", "seed=-1",
        "tensor_parallel_size=0",
    ):  # fmt: skip
        assert part in told, part


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (dict(tasks=["perplexity"], lengths=[768, 1024]), "windows of 768 tokens that do not overlap end before 1024"),
        (dict(tasks=["needle"], needle=NeedleConfig(num_context_tokens=500, num_prompt_tokens=20, target_context_length=510)), "exceed"),
        (
            dict(tasks=["needle"], needle=NeedleConfig(num_context_tokens=500, num_prompt_tokens=20, target_context_length=768)),
            "every distance",
        ),
        (dict(tasks=["needle"], needle=NeedleConfig(depths=[0.5, 0.5])), "each once"),
    ],
)
def test_what_would_be_asked_wrongly_is_refused(keys, told):
    assert told in "\n".join(SuiteConfig(name="mine", **keys).problems())


def test_sliding_windows_reach_the_end_at_any_length():
    config = SuiteConfig(name="mine", tasks=["perplexity"], lengths=[768, 1024], perplexity=PerplexityConfig(stride=256))
    assert config.problems() == []


def test_lengths_end_at_the_window():
    assert SuiteConfig().lengths_for(16384) == [4096, 8192, 16384]
    assert SuiteConfig().lengths_for(20000) == [4096, 8192, 16384]
    assert SuiteConfig().lengths_for(2048) == []
    assert SuiteConfig().lengths_for(1 << 20)[-1] == 131072
    assert SuiteConfig(lengths=[8192, 1024]).lengths_for(4096) == [1024, 8192]


def test_output_directory_names_model_and_suite(tmp_path):
    suite = SuiteConfig(name="ruler")
    assert EvaluateConfig(model=str(tmp_path / "run" / "hf"), suite=suite).directory() == Path("outputs/evaluate/run_ruler")
    assert EvaluateConfig(model=str(tmp_path / "llama"), suite=suite).directory() == Path("outputs/evaluate/llama_ruler")


def test_what_runs_without_a_network():
    ready = [task.name for task in tasks_of(["ruler"]) if missing_offline(task, {}, has_punkt=False) is None]
    assert ready == ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    assert "suite.sources.squad to the file dev-v2.0.json" in missing_offline(TASKS["ruler_qa_squad"], {}, has_punkt=True)
    reason = missing_offline(TASKS["niah_single_2"], {}, has_punkt=False)
    assert "suite.sources.punkt" in reason and "suite.sources.essays" in reason
    assert missing_offline(TASKS["niah_single_2"], {"punkt": "a", "haystack_stand_in": "b"}, has_punkt=False) is None
    assert missing_offline(TASKS["longbench_qasper"], {}, has_punkt=False) is None  # the cache of the datasets library may have it


def test_a_stand_in_marks_the_tasks_that_use_it_and_no_others():
    paths = {"haystack_stand_in": "DIR"}
    assert [task.name for task in tasks_of(["ruler"]) if uses_stand_in(task, paths)] == [
        "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery",
    ]  # fmt: skip


def test_offline_is_read_as_hugging_face_reads_it():
    assert is_offline({"HF_HUB_OFFLINE": "1"}) and is_offline({"HF_DATASETS_OFFLINE": "true"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"}) and not is_offline({})


def test_paths_that_are_right_pass(tmp_path):
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("A text.")
    (tmp_path / "dev.json").write_text("{}")
    right = {"punkt": str(tmp_path), "essays": str(tmp_path / "essays"), "squad": str(tmp_path / "dev.json"), "gsm8k": None}
    assert path_problems(right) == []
    (tmp_path / "empty").mkdir()
    assert "no data files" in path_problems({"longbench": str(tmp_path / "empty")})[0]


def test_fingerprint_sees_contents_and_not_places(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    before = fingerprint(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("words")
    assert fingerprint(tmp_path / "a") == before
    (tmp_path / "big").write_bytes(b"x" * (3 << 20))
    first = fingerprint(tmp_path / "big")
    (tmp_path / "big").write_bytes(b"x" * ((3 << 20) - 1) + b"y")
    assert fingerprint(tmp_path / "big") != first
