"""Overrides with nonsensical values for three recipes. Each raises a user error or is accepted, and accepted values are within the ranges of
the schema.

The tests compose, convert and check the values in this process as the recipes do. If that succeeds, they also compute the plan.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import hypothesis
import pytest
from _entry import ROOT, to_run_config  # recipes/_entry.py
from _entry import compose as compose_of_recipe
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies
from omegaconf import DictConfig, OmegaConf
from plan import to_configs  # recipes/plan.py

from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.ranges import OneOf, Range, limits_of
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.errors import USER_ERRORS, ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.jobs.dry_run import dry_run
from endprompt_megatron.jobs.evaluate import prepare
from endprompt_megatron.jobs.plan import plan_cluster
from endprompt_megatron.launch.launcher import planned_world_size
from tests.support.compose import compose

NASTY = (
    "nan", "inf", "-inf", "-1", "0", "1", "1e300", "-1e300", "1e20", "1e-320", "0.5", str(10**13), str(2**31), str(2**63), str(2**70),
    "9" * 400, "9" * 5000, '""', '" "', "null", "[]", "{}", "[{}]", "[null]", "[[]]", "[nan]", "[-1]", '[""]', "[1e20]", f"[{2**70}]",
    "[x,x]", "{x:1}", "true", "false", "x", '"\\t"', "/", "..", "x" * 300, "x" * 5000, "FILE", "FILE/below", "[FILE]", "'${name}'",
    "'${nowhere}'", "'${output_dir}'", "???", "'a\\0b'", "[{path:x,weight:nan}]", '[{path:""}]', "[", "a,b", "ä", "\udcff",
)  # fmt: skip


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a schema, including its groups."""
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{name}.")


RECIPES = {
    "extend": (sorted(keys_of(RunConfig)), ["+experiment=tiny_random", "trainer.max_steps=3", "name=x"]),
    "evaluate": (sorted(keys_of(EvaluateConfig)), ["+suite=needle", "suite.lengths=[512]", "device=cpu", "dtype=float32"]),
    "plan": (
        [f"plan.{key}" for key in keys_of(ClusterConfig)] + sorted(keys_of(RunConfig)),
        ["+experiment=tiny_random", "precision=bf16", "plan.num_gpus=2", "plan.lengths=[512]"],
    ),
}


def _composed(recipe: str) -> DictConfig:
    return compose(*RECIPES[recipe][1], config=recipe)


def _override(recipe: str, text: str) -> DictConfig:
    """Return the composed values with one more override, which Hydra's grammar parses. Composing with the override would take a fifth of a
    second."""
    composed = _composed(recipe)
    try:
        parsed = OverridesParser.create().parse_override(text)
        OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True)
    except Exception as error:  # as in the recipe: see test_errors_of_hydra_are_one_line
        raise ConfigError(str(error)) from error
    return composed


@cache
def _to_evaluation() -> Callable[..., EvaluateConfig]:
    """Return to_evaluation of recipes/evaluate.py, imported under another name: lm-eval imports a package with the name evaluate."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.to_evaluation


def run(recipe: str, composed: DictConfig, model: Path) -> list[Any]:
    """Do what a recipe does without training, and return its configs."""
    if recipe == "evaluate":
        config = _to_evaluation()(composed, str(model) if OmegaConf.is_missing(composed, "model") else None)
        prepare(config)
        return [config]
    if recipe == "extend":
        config = to_run_config(composed)
        list(dry_run(config, world_size=planned_world_size(config)))
        return [config]
    config, options = to_configs(composed)
    plan_cluster(config, options, command="x")
    return [config, options]


def _values(config: Any, key: str) -> list[Any]:
    """Return the values of a dotted key, with the contents of lists and dictionaries."""
    found = [config]
    for name in key.split("."):
        found = [getattr(one, name) for one in found]
        while any(isinstance(one, list | dict) for one in found):
            found = [item for one in found for item in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else [one])]
    return [one for one in found if one is not None]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "file").write_text("")
    return directory


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_accepts_its_values_without_a_nasty_one(recipe, workplace, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(workplace)
    assert run(recipe, _composed(recipe), tiny_model_dir)


CASES = strategies.sampled_from(sorted(RECIPES)).flatmap(
    lambda recipe: strategies.tuples(strategies.just(recipe), strategies.sampled_from(RECIPES[recipe][0]), strategies.sampled_from(NASTY))
)


@hypothesis.settings(
    max_examples=300, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck), database=None
)
@hypothesis.given(CASES)
def test_a_nasty_value_is_refused_or_within_its_range(workplace, tiny_model_dir, case):
    _check(workplace, tiny_model_dir, *case)


def _check(workplace: Path, model: Path, recipe: str, key: str, value: str) -> None:
    text = f"{key}={value.replace('FILE', str(workplace / 'file'))}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        refusal, configs = _outcome(recipe, text, model)
    assert len(refusal) < 3000, "a message quotes a long value in part"
    for config in configs:
        for name, constraint in limits_of(type(config)).items():
            for found in _values(config, name):
                if isinstance(constraint, Range):
                    assert not math.isnan(found) and constraint.least <= found <= constraint.most, f"{recipe} {text}"
                elif isinstance(constraint, OneOf):
                    assert found in constraint.choices, f"{recipe} {text}"
                else:
                    assert (found.strip() and len(found) < 5000) or name == "method.end_prompts", f"{recipe} {text}"


def _outcome(recipe: str, text: str, model: Path) -> tuple[str, list[Any]]:
    """Return (message of the user error, []) or ("", configs that the recipe accepts)."""
    try:
        return "", run(recipe, _override(recipe, text), model)
    except USER_ERRORS as error:
        return str(error), []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer=null", "trainer=null: trainer is a group of files in conf/. Choose one of paper, or leave trainer=null out."),
        ("length=null", "length=null: length is a group of files in conf/. Choose one of 128k, 16k, 256k, 32k, 64k, 96k, tiny"),
        ("optim=[]", "optim=[]: optim is a group of files in conf/"),
        ("optim={}", "optim={}: optim is a group of files in conf/. Choose one of paper, or leave optim={} out."),
        ("~optim", "~optim: optim is a group of files in conf/"),
        ("model=no_such", "Could not find 'model/no_such' Available options in 'model': llama2_7b"),
        ("+experiment=no_such", "no_such"),
        ("hydra=null", "Config group override must be a string or a list"),
        ("trainer.max_stepz=3", "trainer.max_stepz"),
        ("trainer.max_steps=[", "no viable alternative at input '['"),
        ("optim.lr", "missing EQUAL"),
        ("optim.lr=1,2", "Ambiguous value for argument 'optim.lr=1,2'"),
        (f"seed={'9' * 5000}", "integer string conversion"),
    ],
)
def test_errors_of_hydra_are_one_line(argument, words):
    with pytest.raises(ConfigError) as caught:
        compose_of_recipe("extend", ["+experiment=tiny_random", argument])
    message = str(caught.value)
    assert words in message and len(message.splitlines()) == 1 and "hydra.cc" not in message


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("name=${nowhere}", "name: Interpolation key 'nowhere' not found"),
        ("~trainer.max_steps", "trainer.max_steps: "),
    ],
)
def test_errors_of_the_conversion_are_one_line(argument, words):
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose("+experiment=tiny_random", argument))
    message = str(caught.value)
    assert words in message and len(message.splitlines()) == 1


REFUSED = {
    "extend": (
        "optim.adam_beta1=1", "optim.adam_beta2=1.5", "optim.adam_eps=0", "optim.adam_eps=-1e-8", f"seed={2**64}", f"seed={2**32}",
        "cpu_threads=-1", "optim.weight_decay=nan", "optim.clip_grad=inf", "optim.lr=1e300", "optim.lr=nan", "trainer.max_steps=1e20",
        f"trainer.max_steps={10**20}", "rope.original_context_length=0", f"rope.target_context_length={10**13}", "control=5", "control=on",
        "data.train=[{path: \"\"}]", "model.hf_path=\"\"", "data.directory=FILE", "output_dir=FILE", "output_dir=FILE/below",
        "launch.nproc_per_node=0", "launch.num_nodes=100000", "launch.hang_timeout_minutes=-1", "parallel.sequence_parallel=2",
        "probes.needle_depths=[nan]", "data.split=x", "adapter.target_modules=[x]", "data.train='${name}'", "data.train='${nowhere}'", "rope='${name}'",
    ),
    "evaluate": (
        "launch.nproc_per_node=0", "launch.hang_timeout_minutes=-1", f"seed={2**64}", "output_dir=\"\"", "output_dir=FILE", "device=x",
        "device=xla", "overwrite=5", "suite=null", "suite.needle.depths=[nan]", "suite.samples=0", "parallel.recompute_granularity=x",
        "parallel.tensor_model_parallel_size=0", "launch=[]", "suite='${nowhere}'", "suite.name='${nowhere}'",
    ),
    "plan": (
        "plan.tokens=inf", "plan.tokens=nan", "plan.hardware=\"\"", "plan.hardware=x", "plan.num_gpus=0", "plan.gpus_per_node=0",
        f"plan.num_gpus={10**13}", "plan.rows=0", f"plan.lengths=[{10**13}]", "plan=null", "plan.output_dir=FILE", "plan.output_dir=\"\"",
        "optim.adam_eps=0", "parallel.recompute_granularity=x", "accelerator=x", "plan='${nowhere}'", "plan.rows='${name}'", "plan.output_dir='${nowhere}'",
        f"parallel.context_parallel_size={2**63}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "text"), [(recipe, text) for recipe, texts in REFUSED.items() for text in texts])
def test_invalid_values_are_refused(recipe, text, workplace, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(workplace)
    key, _, value = text.partition("=")
    with pytest.raises(USER_ERRORS) as caught:
        run(recipe, _override(recipe, f"{key}={value.replace('FILE', str(workplace / 'file'))}"), tiny_model_dir)
    assert key.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adapter.type=lora", "adapter.rank=65"], "adapter.rank=65: must be at most the model's hidden size of 64"),
        (["method.position_scheme=pose", "method.num_chunks=65"], "method.num_chunks=65: pose divides a sample of 64 tokens"),
        (
            ["method.position_scheme=endprompt_pose", "method.end_prompt_length=3", "method.num_chunks=4"],
            "method.num_chunks=4: endprompt_pose divides an end prompt of 3 tokens. Set method.num_chunks=2.",
        ),
        (["launch.num_nodes=1000", "launch.nproc_per_node=1000"], "these are 1000000 ranks, and a job has between 1 and 65536"),
    ],
)
def test_invalid_combinations_are_refused(arguments, words, workplace, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(workplace)
    composed = _composed("extend")
    for argument in arguments:
        key, _, value = argument.partition("=")
        OmegaConf.update(composed, key, int(value) if value.isdigit() else value)
    with pytest.raises(ConfigError, match=words):
        run("extend", composed, tiny_model_dir)
