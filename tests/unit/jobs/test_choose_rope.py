"""RoPE scalings of an untrained base: which are compared, with which frequencies, what the page recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endprompt_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ProbesConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs.choose_rope import candidates, compare_ropes
from endprompt_megatron.report.rope_advice import recommend, usable_untrained
from endprompt_megatron.rope.scaling import RopeScaling


def _config(hf_path: Path, directory: Path, **groups) -> RunConfig:
    text = directory / "text.jsonl"
    prose = " ".join(f"The owner of house {number} was seen. Nobody spoke!" for number in range(300))
    text.write_text(json.dumps({"text": prose}) + "\n")
    return RunConfig(
        name="tiny",
        output_dir=str(directory / "outputs" / "tiny"),
        accelerator="cpu",
        **{
            "model": ModelConfig("tiny", str(hf_path)),
            "rope": RopeConfig("pi", None, 1024),
            "data": DataConfig(directory=str(directory), seq_length=64, train=[TextSource(str(text))]),
            "trainer": TrainerConfig(max_steps=1),
            "probes": ProbesConfig(lengths=[128], planted_words=4, planted_numbers=4, text=[TextSource(str(text))]),
            **groups,
        },
    )


def test_every_scaling_is_measured_on_the_same_text_inside_and_beyond_the_window(tiny_model_dir, tmp_path):
    lines = compare_ropes(_config(tiny_model_dir, tmp_path), command="python recipes/choose_rope.py")
    folder = tmp_path / "outputs" / "tiny_ropes"
    found = json.loads((folder / "ropes.json").read_text())
    assert list(found["systems"]) == ["base", "pi", "ntk", "yarn", "abf"]
    for system in found["systems"].values():
        assert list(system["perplexity"]) == ["128", "576", "1024"]  # native window, halfway, target; no length under 128
        assert list(system["number"]) == ["576", "1024"]  # no fact and its question fit into 128 of these tokens
    assert len({json.dumps(system["perplexity_blocks"]) for system in found["systems"].values()}) == 5
    page = (folder / "ropes.md").read_text()
    assert all(line in page for line in lines if line.startswith("|")) and "Recommended: rope=" in page and "Rule: " in page
    assert (folder / "ropes.png").is_file() and "python recipes/choose_rope.py" in page
    again = compare_ropes(_config(tiny_model_dir, tmp_path), command="python recipes/choose_rope.py")
    without_seconds = [line.rpartition("|")[0].rpartition("|")[0] for line in lines]
    assert [line.rpartition("|")[0].rpartition("|")[0] for line in again] == without_seconds


def test_the_frequencies_are_those_that_a_run_would_train_with(tiny_model_dir, tmp_path):
    base = RopeScaling("none", 10000.0, 16)
    found = candidates(_config(tiny_model_dir, tmp_path, rope=RopeConfig("abf", 8.0, 1024, theta=70000.0)), base, 128)
    assert [rope for _, rope in found.values()] == [
        base,
        RopeScaling("pi", 10000.0, 16, factor=8.0),
        RopeScaling("ntk", 10000.0, 16, factor=8.0),
        RopeScaling("yarn", 10000.0, 16, factor=8.0, original_context_length=128),
        RopeScaling("abf", 10000.0, 16, factor=8.0, theta=70000.0),
    ]
    generous = candidates(_config(tiny_model_dir, tmp_path), base, 128)["abf"][1]
    assert generous.effective_theta == RopeScaling("ntk", 10000.0, 16, factor=16.0).effective_theta


def test_context_parallelism_is_refused(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = _config(tiny_model_dir, tmp_path, parallel=ParallelConfig(context_parallel_size=2))
    with pytest.raises(ConfigError, match="parallel.context_parallel_size=2"):
        compare_ropes(config, command="")


def _system(inside: int, beyond: int, perplexity: float, perplexity_beyond: float = 30.0) -> dict:
    return {
        "number": {"100": {"exact_match": inside / 20, "trials": 20}, "200": {"exact_match": beyond / 20, "trials": 20}},
        "perplexity": {"100": perplexity, "200": perplexity_beyond},
    }


def test_the_recommendation_follows_its_rule():
    base = _system(20, 2, 20.0, 70.0)
    systems = {"base": base, "pi": _system(2, 1, 40.0), "ntk": _system(19, 17, 20.9, 31.0), "yarn": _system(19, 17, 20.8, 29.0)}
    best, sentences = recommend(systems, native=100)
    assert best == "yarn" and "17 of 20 questions beyond 100 tokens (base 2)" in sentences[0] and "without training" in sentences[1]
    assert usable_untrained(systems["yarn"], base, native=100) and not usable_untrained(systems["pi"], base, native=100)
    for short in (_system(17, 20, 20.0), _system(20, 15, 20.0), _system(20, 20, 21.1)):  # inside, beyond, perplexity
        assert not usable_untrained(short, base, native=100)
    assert "Train it" in recommend({"base": base, "pi": systems["pi"]}, native=100)[1][1]
