"""Every number and text of every schema has a range, and what is outside is refused with its key, its value and the range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.ranges import FilePath, OneOf, Range, Text, check_ranges, limits_of, quoted, range_problems
from endprompt_megatron.config.schema import RunConfig, TextSource
from endprompt_megatron.config.validation import find_problems
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig, SuiteConfig
from tests.unit.config.test_validation import facts_of

SCHEMAS = (RunConfig, ClusterConfig, EvaluateConfig, StudyConfig)
HUGE = 10**400  # more than a float holds


def outside(constraint: Any) -> list[Any]:
    """Values next to a constraint, and far from it."""
    if isinstance(constraint, Range):
        ends = [constraint.least if constraint.excludes_least else math.nextafter(constraint.least, -math.inf)]
        ends += [constraint.most if constraint.excludes_most else math.nextafter(constraint.most, math.inf)]
        return [*ends, math.nan, math.inf, -math.inf, HUGE, -HUGE, "x"]
    if isinstance(constraint, Text):
        return ["", "x" * (constraint.most + 1), "\udcff", 1, *([] if constraint.can_be_blank else [" "])]
    if isinstance(constraint, OneOf):
        return ["", "x", constraint.choices[0].upper()]
    return ["", " \t", "a\0b", "\udcff", "x" * 256, "x/" * 2048, 1]


CASES = [(schema, key, value) for schema in SCHEMAS for key, constraint in limits_of(schema).items() for value in outside(constraint)]


def put(config: Any, key: str, value: Any) -> None:
    """Set a dotted key: of a list or a dictionary, its only value."""
    *path, last = key.split(".")
    for name in path:
        found = getattr(config, name)
        if isinstance(found, list):
            found[:] = [TextSource("x")]
            found = found[0]
        config = found
    was = getattr(config, last)
    hint = get_type_hints(type(config))[last]
    kind = next((kind for kind in (dict, list) if kind in (getattr(one, "__origin__", None) for one in (hint, *get_args(hint)))), None)
    assert was is None or isinstance(was, kind or object)
    setattr(config, last, {"key": value} if kind is dict else [value] if kind is list else value)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_is_outside_is_named(schema):
    for _, key, value in (case for case in CASES if case[0] is schema):
        config = schema()
        put(config, key, value)
        problems = [words for found in range_problems(config, "at.").values() for words in found]
        last = key.rpartition(".")[2]
        (problem,) = [words for words in problems if f".{last}={quoted(value)}: " in words]
        assert problem.startswith(f"at.{key.partition('.')[0]}") and len(problem) < 300
        with pytest.raises(ConfigError):
            check_ranges(config)


@pytest.mark.parametrize("key", limits_of(RunConfig))
def test_a_run_is_refused_once_for_a_value_outside_its_range(key):
    """Rules that read the key would divide by it, or say the same again."""
    constraint = limits_of(RunConfig)[key]
    for value in (value for value in outside(constraint) if isinstance(value, str) != isinstance(constraint, Range)):
        facts = facts_of()
        assert facts.config.rope.factor is not None
        put(facts.config, key, value)
        assert any(f"{key.rpartition('.')[2]}={quoted(value)}: " in problem for problem in find_problems(facts))


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(schema).items():
        inner = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)]
        for one in inner:
            yield from _leaves(one, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", hint


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_and_text_has_a_range(schema):
    unlimited = {key for key, hint in _leaves(schema) if hint is not bool} - set(limits_of(schema))
    assert unlimited <= {"model.hf_config"}, "config.json's fields, which checkpoint/hf/config.py reads"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_defaults_are_within_their_ranges(schema):
    config = schema()
    missing = {key for key, value in ((key, _value(config, key)) for key in limits_of(schema)) if value == "???"}
    assert set(range_problems(config)) <= missing


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[0] if isinstance(config, list) and config else config
        config = getattr(config, name, None)
    return config


@pytest.mark.parametrize(
    ("constraint", "value", "rule"),
    [
        (Range(1, 24), 99, "must be between 1 and 24"),
        (Range(0, 1, excludes_most=True), 1.0, "must be at least 0 and less than 1"),
        (Range(0, 1e9, excludes_least=True), 0.0, "must be greater than 0 and at most 1e+09"),
        (OneOf(("a", "b", "c")), "d", "choose a, b or c"),
        (Text(3), "word", "has 4 characters, but may have at most 3"),
        (Text(3), " ", "must not be empty"),
        (FilePath(), "x" * 256, "is too long: a path has at most 4095 bytes, and each name in it at most 255"),
    ],
)
def test_rules_in_words(constraint, value, rule):
    assert constraint.broken_by(value) == rule


def test_ends_that_belong_to_a_range():
    assert [Range(0, 1).broken_by(value) for value in (0, 1, 0.5)] == [None] * 3
    assert Text(1, can_be_blank=True).broken_by(" ") is None and FilePath().broken_by("a b/ä") is None


def test_values_are_quoted_in_short():
    assert quoted("") == "''" and quoted(" a") == "' a'" and quoted("a") == "a" and quoted(None) == "None"
    assert quoted("x" * 100) == "x" * 60 + "... (100 characters)"
    assert quoted(HUGE) == f"(an integer of {HUGE.bit_length()} bits)" and quoted(2**70) == str(2**70)


def test_a_list_names_the_one_that_is_wrong():
    config = RunConfig()
    config.data.train = [TextSource("a"), TextSource("", weight=math.nan)]
    assert range_problems(config)["data.train"] == [
        "data.train[1].path='': must not be empty.",
        "data.train[1].weight=nan: must be between 1e-06 and 1000000. The default is 1.0.",
    ]
    suite = SuiteConfig(num_fewshot={"mmlu": -1})
    assert range_problems(suite, "suite.")["suite.num_fewshot"] == ["suite.num_fewshot=-1: must be between 0 and 1000."]
