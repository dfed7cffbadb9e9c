"""Scores of recipes/evaluate.py, read back and compared, against numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest

from endprompt_megatron.comparison.paired_evaluations import Key, read_evaluation
from endprompt_megatron.comparison.paired_suites import compare_evaluations
from endprompt_megatron.comparison.results import fault_of, read_run
from endprompt_megatron.errors import DataError
from tests.support.studies import write_run, write_suite

VT, CWE = Key("ruler", "vt", 4096), Key("ruler", "cwe", 8192)


def _read(directory, scores, **options):
    return read_evaluation(write_suite(directory, scores, **options))


def test_what_was_written_is_read(tmp_path):
    write_suite(tmp_path / "ruler", {("vt", 4096): [0.0, 100.0], ("cwe", 8192): [50.0]})
    write_suite(tmp_path / "short", {("gsm8k", None): [100.0, 0.0, 0.0]}, dtype="bfloat16")
    found = read_evaluation(tmp_path)
    assert set(found) == {VT, CWE, Key("ruler", "gsm8k", 0)}
    assert found[VT].score == 50.0 and list(found[VT].samples.values()) == [0.0, 100.0]
    assert found[Key("ruler", "gsm8k")].conditions["dtype"] == "bfloat16"
    assert read_evaluation(tmp_path / "nothing") == {}
    write_suite(tmp_path / "again", {("vt", 4096): [0.0]})
    with pytest.raises(DataError, match="is scored elsewhere"):
        read_evaluation(tmp_path)


def test_damaged_files_are_named(tmp_path):
    write_suite(tmp_path, {("vt", 4096): [0.0]})
    (tmp_path / "records" / "vt_4096.jsonl").unlink()
    with pytest.raises(DataError, match="results.json or the records it names cannot be read .FileNotFoundError"):
        read_evaluation(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["scores"][0]["records"] = "/dev/zero"
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match="names the records '/dev/zero', which are not in its directory"):
        read_evaluation(tmp_path)
    (tmp_path / "results.json").write_text('{"scores": [{}]}')
    with pytest.raises(DataError, match="KeyError"):
        read_evaluation(tmp_path)


def test_one_seed_is_paired_by_sample(tmp_path):
    """Differences 40, 20, 60, 20: mean 35, all of one sign, so that 2 of the 16 sign patterns are as large."""
    reference = _read(tmp_path / "a", {("vt", 4096): [0.0, 40.0, 20.0, 60.0, 100.0], ("cwe", 8192): [10.0, 10.0]})
    model = _read(tmp_path / "b", {("vt", 4096): [40.0, 60.0, 80.0, 80.0]})
    found = compare_evaluations({"model": {1: model}, "reference": {1: reference}}, "reference")
    (vt,) = found["model"]
    assert (vt.key, vt.seeds, vt.differing) == (VT, 1, ())
    assert (vt.difference.difference, vt.difference.samples, vt.difference.left_out) == (35.0, 4, 1)
    assert vt.difference.p == pytest.approx(2 / 16) and vt.difference.interval[0] > 0
    assert vt.score.mean == 65.0 and math.isnan(vt.score.deviation)
    assert [task.key for task in found["reference"]] == [CWE, VT] and found["reference"][0].difference is None


def test_seeds_are_averaged_by_sample_and_counted_in_the_score(tmp_path):
    """Seeds 1 and 2 are common: differences of sample 0 are 10 and 30, of sample 1 they are -10 and 10, so 20 and 0 remain."""
    model = {seed: _read(tmp_path / f"m{seed}", {("vt", 4096): [base, 50.0]}) for seed, base in ((1, 10.0), (2, 30.0), (3, 90.0))}
    reference = {seed: _read(tmp_path / f"r{seed}", {("vt", 4096): [0.0, other]}) for seed, other in ((1, 60.0), (2, 40.0))}
    (found,) = compare_evaluations({"model": model, "reference": reference}, "reference")["model"]
    assert (found.seeds, found.difference.difference, found.difference.samples) == (2, 10.0, 2)
    assert (found.score.seeds, found.score.mean) == (3, pytest.approx((30 + 40 + 70) / 3))
    assert found.score.interval[0] < found.score.mean < found.score.interval[1]


def test_other_questions_are_not_compared(tmp_path):
    reference = _read(tmp_path / "a", {("vt", 4096): [0.0, 40.0]})
    model = _read(tmp_path / "b", {("vt", 4096): [40.0, 60.0]}, shifted=7)
    (found,) = compare_evaluations({"model": {1: model}, "reference": {1: reference}}, "reference")["model"]
    assert found.difference is None and found.score.mean == 50.0
    overlapping = _read(tmp_path / "c", {("vt", 4096): [40.0, 60.0]}, dtype="bfloat16", hardware="another machine")
    (found,) = compare_evaluations({"model": {1: overlapping}, "reference": {1: reference}}, "reference")["model"]
    assert found.differing == ("dtype",) and found.difference.difference == 30.0


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        ({"num_fewshot": {"vt": 5}}, {"num_fewshot": {}}, ("num_fewshot.vt",)),
        ({"num_fewshot": {"cwe": 5}}, {"num_fewshot": {}}, ()),
        ({"perplexity": {"stride": 256}}, {"perplexity": {"stride": 0}}, ("perplexity.stride",)),
    ],
)
def test_settings_of_a_task_under_which_scores_differ_are_named(tmp_path, own, other, told):
    suite = "perplexity" if "perplexity" in own else "ruler"
    found = [
        {
            Key(suite, key.task, key.length): score
            for key, score in _read(tmp_path / str(index), {("vt", 4096): [1.0]}, **conditions).items()
        }
        for index, conditions in enumerate((own, other))
    ]
    (compared,) = compare_evaluations({"model": {1: found[0]}, "reference": {1: found[1]}}, "reference")["model"]
    assert compared.differing == told


def test_a_model_without_the_reference_has_scores_alone(tmp_path):
    model = _read(tmp_path / "b", {("vt", 4096): [40.0, 60.0]})
    (found,) = compare_evaluations({"model": {1: model}}, "reference")["model"]
    assert (found.difference, found.seeds, found.score.mean) == (None, 0, 50.0)


def test_a_run_brings_its_suites(tmp_path):
    directory = write_run(tmp_path / "run", method="endprompt", seed=1, base=True)
    assert read_run(directory)[0].suites == {}
    write_suite(directory / "evaluation_suites", {("vt", 4096): [0.0, 100.0]})
    own, base = read_run(directory)
    assert own.suites[VT].score == 50.0 and base.suites == {}
    (directory / "evaluation_suites" / "results.json").write_text("{")
    assert fault_of(directory) is None  # the run itself is sound: another start would change nothing
    with pytest.raises(DataError, match="Run recipes/evaluate.py on it again"):
        read_run(directory)
