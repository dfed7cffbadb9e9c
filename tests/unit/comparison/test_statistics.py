"""Paired tests against numbers worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from endprompt_megatron.comparison.results import by_label, equal_time_steps, read_run
from endprompt_megatron.comparison.statistics import paired_tests, summarize
from tests.support.studies import write_run


def _groups(tmp_path, gains: dict[str, list[float]]):
    return by_label(
        result
        for label, values in gains.items()
        for seed, gain in enumerate(values, 1)
        for result in read_run(write_run(tmp_path / f"{label}{seed}", method=label, seed=seed, gain=gain))
    )


def test_mean_and_deviation():
    found = summarize([1.0, 2.0, 6.0, math.nan])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.deviation == pytest.approx(math.sqrt(7.0))  # ((-2)^2 + (-1)^2 + 3^2) / 2
    assert math.isnan(summarize([4.0]).deviation) and math.isnan(summarize([]).mean)


def test_paired_t_test_over_seeds(tmp_path):
    """Differences 1, 2, 3 against 0: t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom; p = 1 - t / sqrt(t^2 + 2) = 0.0742."""
    groups = _groups(tmp_path, {"reference": [0.0, 0.0, 0.0], "method": [1.0, 2.0, 3.0]})
    tests = {test.measure: test for test in paired_tests(groups, "reference")}
    t = 2 * math.sqrt(3)
    for measure in ("needle", "multi_key", "variable_tracking"):
        assert tests[measure].p_seeds == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-9)
        assert (tests[measure].difference, tests[measure].seeds) == (pytest.approx(2.0), 3)
    assert tests["log_perplexity"].difference == pytest.approx(-2.0)
    assert tests["log_perplexity"].haystacks == 0 and math.isnan(tests["log_perplexity"].p_haystacks)


def test_sign_flips_over_haystacks(tmp_path):
    """One seed, two lengths, one haystack each: two differences of one sign are 2 of the 4 sign patterns, however many keys are in one."""
    tests = {test.measure: test for test in paired_tests(_groups(tmp_path, {"reference": [0.0], "method": [1.0]}), "reference")}
    for measure in ("multi_key", "variable_tracking"):
        assert (tests[measure].haystacks, tests[measure].p_haystacks) == (2, pytest.approx(0.5))
    assert (tests["needle"].haystacks, tests["needle"].p_haystacks) == (4, pytest.approx(2 / 16))
    assert math.isnan(tests["needle"].p_seeds)


def test_the_difference_and_its_test_weigh_lengths_alike(tmp_path):
    """Three haystacks that lose 1 nat at 512 tokens, one that wins 2 at 2048: +0.5 over lengths, although most haystacks lose. Of the 16
    sign patterns of (1/6, 1/6, 1/6, 1) half have a sum of at least 0.5 in size: those with the signs of the first three alike or not."""
    runs = {}
    for label, records in (("reference", ([0, 0, 0], [0])), ("method", ([-1, -1, -1], [2]))):
        (result,) = read_run(write_run(tmp_path / label, method=label, seed=1))
        result.system["needle"] = {
            length: {"key_log_probability": sum(values) / len(values), "records": [[0.5, 0.0, 0.0, float(value), 9] for value in values]}
            for length, values in zip(("512", "2048"), records, strict=True)
        }
        runs[label] = [result]
    found = next(test for test in paired_tests(runs, "reference") if test.measure == "needle")
    assert found.difference == pytest.approx(0.5) and found.haystacks == 4
    weighed = [-1 / 6, -1 / 6, -1 / 6, 1.0]
    patterns = [
        abs(sum(sign * value for sign, value in zip(signs, weighed, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(value >= 0.5 - 1e-9 for value in patterns) / 16
    assert found.p_haystacks == pytest.approx(expected)


def test_only_common_questions_count(tmp_path):
    runs = _groups(tmp_path, {"reference": [0.0], "method": [1.0]})
    del runs["method"][0].system["needle"]["2048"], runs["method"][0].system["perplexity"]["512"]
    tests = {test.measure: test for test in paired_tests(runs, "reference")}
    assert tests["needle"].difference == pytest.approx(1.0) and tests["needle"].haystacks == 2
    assert tests["log_perplexity"].difference == pytest.approx(-1.0)


def test_equal_runs_differ_by_nothing(tmp_path):
    tests = paired_tests(_groups(tmp_path, {"reference": [0.3, 0.4], "method": [0.3, 0.4]}), "reference")
    assert {test.difference for test in tests} == {0.0}
    assert all(test.p_seeds == 1.0 for test in tests)
    assert all(test.p_haystacks == pytest.approx(1.0) for test in tests if test.haystacks)


def test_seeds_without_a_partner_do_not_count(tmp_path):
    tests = paired_tests(_groups(tmp_path, {"reference": [0.0], "method": [1.0, 5.0]}), "reference")
    assert {test.seeds for test in tests} == {1}
    assert all(abs(test.difference) == pytest.approx(1.0) for test in tests)


def test_steps_for_the_same_time(tmp_path):
    def runs(name: str, seconds: float, steps: int = 10):
        return read_run(write_run(tmp_path / name, method=name, seed=1, steps=steps, step_seconds=seconds))

    reference = runs("reference", 2.0)
    assert equal_time_steps(runs("slow", 4.0), reference, within=0.1) == 5
    assert equal_time_steps(runs("alike", 2.1), reference, within=0.1) is None
    assert equal_time_steps(runs("glacial", 90.0), reference, within=0.1) == 1
    assert equal_time_steps(runs("untrained", 1.0, steps=0), reference, within=0.1) is None
