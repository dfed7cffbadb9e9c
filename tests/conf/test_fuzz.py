"""Overrides that nobody means, on three recipes: each is refused in words or works, and what works is within the ranges of the schema.

In process, as the recipes do it: compose, convert, check; where that passes, the plan itself is made.
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
from _entry import ROOT, compose, to_run_config  # recipes/_entry.py
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies
from omegaconf import DictConfig, OmegaConf
from plan import to_cluster, without_plan  # recipes/plan.py

from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.ranges import OneOf, Range, limits_of
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.errors import USER_ERRORS, ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.jobs.dry_run import dry_run
from endprompt_megatron.jobs.evaluate import prepare
from endprompt_megatron.jobs.plan import plan_cluster
from endprompt_megatron.launch.launcher import planned_world_size

NASTY = (
    "nan", "inf", "-inf", "-1", "0", "1", "1e300", "-1e300", "1e20", "1e-320", "0.5", str(10**13), str(2**31), str(2**63), str(2**70),
    "9" * 400, "9" * 5000, '""', '" "', "null", "[]", "{}", "[{}]", "[null]", "[[]]", "[nan]", "[-1]", '[""]', "[1e20]", f"[{2**70}]",
    "[x,x]", "{x:1}", "true", "false", "x", '"\\t"', "/", "..", "x" * 300, "x" * 5000, "FILE", "FILE/below", "[FILE]", "'${name}'",
    "'${nowhere}'", "'${output_dir}'", "???", "'a\\0b'", "[{path:x,weight:nan}]", '[{path:""}]', "[", "a,b", "ä", "\udcff",
)  # fmt: skip


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema, groups included."""
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


@cache
def _composed(recipe: str) -> DictConfig:
    return compose(recipe, RECIPES[recipe][1])


def _override(recipe: str, text: str) -> DictConfig:
    """What Hydra makes of a value of a key that the files hold: parsed by its grammar, merged into the composed values. Composing anew
    would take a quarter of a second."""
    composed = _composed(recipe).copy()
    try:
        parsed = OverridesParser.create().parse_override(text)
        OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True)
    except Exception as error:  # as compose: see test_what_hydra_cannot_read
        raise ConfigError(str(error)) from error
    return composed


@cache
def _to_evaluation() -> Callable[..., EvaluateConfig]:
    """Of recipes/evaluate.py, under another name: lm-eval imports a package that is called evaluate."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.to_evaluation


def run(recipe: str, composed: DictConfig, model: Path) -> list[Any]:
    """What a recipe does without training; its configs."""
    if recipe == "evaluate":
        config = _to_evaluation()(composed, str(model) if composed.get("model", "???") == "???" else None)
        prepare(config)
        return [config]
    if recipe == "extend":
        config = to_run_config(composed)
        list(dry_run(config, world_size=planned_world_size(config)))
        return [config]
    options = to_cluster(composed)
    config = to_run_config(without_plan(composed))
    plan_cluster(config, options, command="x")
    return [config, options]


def _values(config: Any, key: str) -> list[Any]:
    """Numbers of a dotted key; through lists and dictionaries."""
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
def test_each_recipe_accepts_what_the_nasty_values_are_put_into(recipe, workplace, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(workplace)
    assert run(recipe, _composed(recipe), tiny_model_dir)


CASES = strategies.sampled_from(sorted(RECIPES)).flatmap(
    lambda recipe: strategies.tuples(strategies.just(recipe), strategies.sampled_from(RECIPES[recipe][0]), strategies.sampled_from(NASTY))
)


@hypothesis.settings(
    max_examples=300, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck), database=None
)
@hypothesis.given(CASES)
def test_nasty_values(workplace, tiny_model_dir, case):
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
    """(words of the refusal, []) or ("", configs that the recipe accepts)."""
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
def test_what_hydra_cannot_compose_is_refused_in_a_line(argument, words):
    with pytest.raises(ConfigError) as caught:
        compose("extend", ["+experiment=tiny_random", argument])
    message = str(caught.value)
    assert words in message and len(message.splitlines()) == 1 and "hydra.cc" not in message


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("name=${nowhere}", "name: Interpolation key 'nowhere' not found"),
        ("~trainer.max_steps", "trainer.max_steps: "),
    ],
)
def test_what_is_composed_and_no_config_is_refused_in_a_line(argument, words):
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose("extend", ["+experiment=tiny_random", argument]))
    message = str(caught.value)
    assert words in message and len(message.splitlines()) == 1


REFUSED = {
    "extend": (
        "optim.adam_beta1=1", "optim.adam_beta2=1.5", "optim.adam_eps=0", "optim.adam_eps=-1e-8", f"seed={2**64}", f"seed={2**32}",
        "cpu_threads=-1", "optim.weight_decay=nan", "optim.clip_grad=inf", "optim.lr=1e300", "optim.lr=nan", "trainer.max_steps=1e20",
        f"trainer.max_steps={10**20}", "rope.original_context_length=0", f"rope.target_context_length={10**13}", "control=5", "control=on",
        "data.train=[{path: \"\"}]", "model.hf_path=\"\"", "data.directory=FILE", "output_dir=FILE", "output_dir=FILE/below",
        "launch.nproc_per_node=0", "launch.num_nodes=100000", "launch.hang_timeout_minutes=-1", "parallel.sequence_parallel=2",
        "probes.needle_depths=[nan]", "data.split=x", "adapter.target_modules=[x]",
    ),
    "evaluate": (
        "launch.nproc_per_node=0", "launch.hang_timeout_minutes=-1", f"seed={2**64}", "output_dir=\"\"", "output_dir=FILE", "device=x",
        "device=xla", "overwrite=5", "suite=null", "suite.needle.depths=[nan]", "suite.samples=0", "parallel.recompute_granularity=x",
        "parallel.tensor_model_parallel_size=0", "launch=[]",
    ),
    "plan": (
        "plan.tokens=inf", "plan.tokens=nan", "plan.hardware=\"\"", "plan.hardware=x", "plan.num_gpus=0", "plan.gpus_per_node=0",
        f"plan.num_gpus={10**13}", "plan.rows=0", f"plan.lengths=[{10**13}]", "plan=null", "plan.output_dir=FILE", "plan.output_dir=\"\"",
        "optim.adam_eps=0", "parallel.recompute_granularity=x", "accelerator=x", f"parallel.context_parallel_size={2**63}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "text"), [(recipe, text) for recipe, texts in REFUSED.items() for text in texts])
def test_values_that_no_run_can_have(recipe, text, workplace, tiny_model_dir, monkeypatch):
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
def test_values_that_no_run_can_have_together(arguments, words, workplace, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(workplace)
    composed = _composed("extend").copy()
    for argument in arguments:
        key, _, value = argument.partition("=")
        OmegaConf.update(composed, key, int(value) if value.isdigit() else value)
    with pytest.raises(ConfigError, match=words):
        run("extend", composed, tiny_model_dir)
