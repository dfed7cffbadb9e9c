"""Every rule of the table is broken by some test, and every key that a rule names is one of the schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from endprompt_megatron.config.rule import Facts, Rule
from endprompt_megatron.config.schema import PrecisionConfig, RopeConfig, RunConfig
from endprompt_megatron.config.validation import RULES, find_problems
from endprompt_megatron.rope.scaling import RopeScaling
from tests.unit.config import test_precision, test_schema, test_validation

SCHEMES = ("contiguous", "endprompt")
PI, YARN = (RopeScaling(kind, 10000.0, 8, factor=2.0, original_context_length=4096) for kind in ("pi", "yarn"))
# of rules that no other file of this folder breaks: (changes, frequencies of the base)
MORE: tuple[tuple[dict[str, Any], RopeScaling | None], ...] = (
    ({"rope__existing_scaling": "keep"}, None),
    ({"rope__existing_scaling": "replace"}, None),
    ({}, YARN),
    ({}, PI),
    ({"rope__existing_scaling": "multiply"}, YARN),
    ({"rope__ntk_dynamic_factor": 2.0}, None),
    ({"rope__beta_slow": 64.0}, None),
    ({"rope__low_freq_factor": 8.0}, None),
    ({"parallel__tensor_model_parallel_size": 3}, None),
    ({"launch__num_nodes": 0}, None),
    ({"parallel__sequence_parallel": True, "parallel__tensor_model_parallel_size": 2, "data__seq_length": 511}, None),
    ({"parallel__overlap_param_gather": True}, None),
    ({"trainer__grad_spike_factor": 0.5}, None),
    ({"trainer__bad_step": "ignore"}, None),
    ({"probes__systems": ["student"]}, None),
    ({"probes__tasks": []}, None),
    ({"probes__needle_depths": []}, None),
    ({"method__position_scheme": "pose", "method__num_chunks": 513}, None),
)


def _changes_of(function: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(ranks, changes) of each case of a parametrised test."""
    for mark in function.pytestmark:
        for case in mark.args[1] if mark.name == "parametrize" else ():
            values = getattr(case, "values", case)
            found = next((value for value in values if isinstance(value, dict)), None)
            if found is not None:
                yield next((value for value in values if isinstance(value, int)), 1), found


def _facts() -> Iterator[Facts]:
    for world_size, changes in _changes_of(test_schema.test_each_rule):
        yield test_schema.facts_of(changes, world_size=world_size)
    for function in ("test_settings_that_cannot_work_are_refused", "test_adapters_and_attention", "test_messages_quote_the_value"):
        for world_size, changes in _changes_of(getattr(test_validation, function)):
            yield test_validation.facts_of(world_size, **changes)
    for _, changes in _changes_of(test_precision.test_each_rule):
        yield Facts(test_precision.config_of(**changes), 8, test_precision.LLAMA3_8B, SCHEMES)
    for architecture, precision in ((test_precision.SMOLLM2, "fp8_attention"), (test_precision.SMOLLM2, "fp8_blockwise")):
        config = test_precision.config_of(precision=PrecisionConfig(precision), rope=RopeConfig("pi", 8.0, 65536))
        yield Facts(config, 8, architecture, SCHEMES)
    yield test_validation.facts_of(2, method__attention="s2", parallel__context_parallel_size=2)
    for changes, base_rope in MORE:
        world_size = 0 if "launch__num_nodes" in changes else 8
        yield dataclasses.replace(test_validation.facts_of(world_size, **changes), base_rope=base_rope)


def test_every_rule_is_broken_by_some_test():
    unbroken = list(RULES)
    for facts in _facts():
        unbroken = [rule for rule in unbroken if not rule.broken(facts)]
    assert [rule.keys for rule in unbroken] == []


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        nested = field.default_factory
        if dataclasses.is_dataclass(nested):
            yield from _keys(nested, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule.keys))
def test_a_rule_names_keys_of_the_schema(rule: Rule):
    assert rule.keys and set(rule.keys) <= set(_keys(RunConfig))


def test_a_good_config_breaks_none():
    assert find_problems(test_validation.facts_of()) == []
