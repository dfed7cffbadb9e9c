"""The configuration of an evaluation and its validation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig, NeedleConfig, PerplexityConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import SUITES
from tests.support.compose import compose
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
    return compose(*overrides, config="evaluate")


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


def test_a_typo_and_a_missing_suite_are_refused(to_evaluation):
    with pytest.raises(ConfigError, match="suite.lenghts"):
        to_evaluation(_compose("+suite=ruler", "+suite.lenghts=[4096]"), "DIR")
    with pytest.raises(ConfigError, match="add \\+suite=NAME, one of all, "):
        to_evaluation(_compose(), "DIR")


def test_every_problem_is_reported_at_once(tmp_path):
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
    message = "\n".join(caught.value.problems)
    for part in (
        "niah_single_9 is neither", "each once", "suite.lengths=100", "samples=0", "num_fewshot.niah_single_1=3", "sources.essays=", "sources.squad=",
        "sources.punkt=", "haystack_stand_in", "both set", "no config.json", "backend=onnx", "dtype=fp8", "bos=two", "batch_size=0", "seed=-1",
        "tensor_parallel_size=0",
    ):  # fmt: skip
        assert part in message, part


@pytest.mark.parametrize(
    ("keys", "message"),
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
def test_settings_that_give_wrong_scores_are_refused(keys, message):
    assert message in "\n".join(SuiteConfig(name="mine", **keys).problems())


@pytest.mark.parametrize(
    ("former", "message"),
    [
        ("probes", "suite.tasks: probes is called ruler_offline now. Write suite.tasks=[ruler_offline]."),
        ("probe_niah_single", "probe_niah_single is called offline_niah_single now. Write suite.tasks=[offline_niah_single]."),
        ("probe_vt", "there is no probe_vt; the tasks probe_* are called offline_* now. Choose from offline_niah_single, "),
    ],
)
def test_names_of_earlier_releases_are_refused_with_the_present_ones(former, message):
    (problem,) = SuiteConfig(name="mine", tasks=[former]).problems()
    assert message in problem


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
