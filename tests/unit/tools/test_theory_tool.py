"""tools/theory.py as a user calls it, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny import ROOT
from tests.support.tools import tool_caller

TOOL = ROOT / "tools" / "theory.py"
COVERAGE = ("coverage", "--seq-length", 32, "--end-prompt-length", 4, "--target-context-length", 256, "--samples", 20)
SMOOTHNESS = ("smoothness", "--seq-length", 32, "--end-prompt-length", 4, "--target-context-length", 256, "--tokens", 24, "--pairs", 3)


@pytest.fixture
def theory(monkeypatch, capsys):
    """Call the tool in this process: (exit status, what it printed, its errors)."""
    return tool_caller(TOOL, monkeypatch, capsys)


def test_coverage(theory, tmp_path):
    status, out, _ = theory(*COVERAGE, "--output-dir", tmp_path / "new" / "folder")
    assert status == 0
    assert "gap of eq. 9: 28 to 224, 77.0% of all distances" in out
    record = json.loads((tmp_path / "new" / "folder" / "coverage.json").read_text())
    assert record["gap"] == [28, 224] and record["schemes"]["endprompt"]["gaps"] == [[28, 224]]
    assert {scheme["pairs_a_sample"] for scheme in record["schemes"].values()} == {32 * 33 / 2}
    assert record["arguments"]["seed"] == 1234 and record["commit"]
    for name, scheme in record["schemes"].items():
        assert f"{name} " in out and f"{scheme['distances_seen']:.2%}" in out
    assert (tmp_path / "new" / "folder" / "coverage.png").is_file()


def test_what_is_there_is_kept(theory, tmp_path):
    (tmp_path / "coverage.json").write_text("mine")
    status, _, err = theory(*COVERAGE, "--output-dir", tmp_path)
    assert status == 2 and "coverage.json exists already" in err and "--overwrite" in err
    assert (tmp_path / "coverage.json").read_text() == "mine" and not (tmp_path / "coverage.png").exists()
    status, _, _ = theory(*COVERAGE, "--output-dir", tmp_path, "--overwrite")
    assert status == 0 and json.loads((tmp_path / "coverage.json").read_text())


def test_smoothness(theory, tiny_model_dir, tmp_path):
    """Built-in text, one layer of two; the model's own window of 128 stretched by 2."""
    status, out, _ = theory(*SMOOTHNESS, "--hf-path", tiny_model_dir, "--layers", 1, "--output-dir", tmp_path, "--factor", 2)
    assert status == 0
    record = json.loads((tmp_path / "smoothness.json").read_text())
    assert record["tokens_used"] == 24 and record["rope"]["rope_scaling"]["factor"] == 2.0
    assert record["highest_frequency"] == 0.5 and record["reach_of_bound"] == 4
    assert {head["layer"] for head in record["heads"]} == {1} and len(record["heads"]) == 4
    steepest = record["quantiles"]["sup|S'| / (theta_0/s sup|S|), eq. 3"]["max"]
    assert steepest == pytest.approx(max(head["ratio_of_steepest_pair"] for head in record["heads"]))
    assert f"{steepest:.3g}" in out and "The bound constrains scores up to 4 positions from a known one" in out
    assert (tmp_path / "smoothness.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*COVERAGE, "--end-prompt-length", 32), ["--end-prompt-length=32", "less than --seq-length=32"]),
        ((*COVERAGE, "--seq-length", 257), ["--seq-length=257", "--target-context-length=256"]),
        ((*COVERAGE, "--samples", 0), ["--samples", "'0' must be a whole number"]),
        ((*COVERAGE, "--samples", "many"), ["'many' must be a whole number"]),
        ((*COVERAGE, "--output-dir", "{file}"), ["cannot be created"]),
        ((*COVERAGE, "--seed", -1), ["'-1' must be a whole number of at least 0"]),
        (("coverage",), ["--target-context-length"]),
        ((*SMOOTHNESS, "--hf-path", "{here}"), ["no config.json"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--factor", 4), ["--factor=4", "256 / 128 = 2", "--target-context-length=512"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--factor", "nan"), ["--factor=nan"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--target-context-length", 64), ["--target-context-length=64", "window of 128"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--seq-length", 256), ["--seq-length=256", "so there is no gap"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--text", "{here}/absent.txt"), ["absent.txt", "cannot be read"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--layers", "0,9"), ["layers=[9]", "0 to 1"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--layers", "5-1"), ["'5-1' is not a list of layers"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--tokens", 1), ["text of 1 tokens"]),
        ((*SMOOTHNESS, "--hf-path", "{model}", "--rope-type", "linear"), ["invalid choice: 'linear'"]),
    ],
)
def test_wrong_input(theory, tiny_model_dir, tmp_path, arguments, words):
    (tmp_path / "a_file").write_text("")
    places = {"file": tmp_path / "a_file", "here": tmp_path, "model": tiny_model_dir}
    given = [str(argument).format(**places) for argument in arguments]
    if "--output-dir" not in given and len(given) > 1:
        given += ["--output-dir", str(tmp_path / "out")]
    status, _, err = theory(*given)
    assert status == 2, err
    for word in words:
        assert word in err
    assert not list(Path(tmp_path).rglob("*.json")) and not list(Path(tmp_path).rglob("*.png"))
