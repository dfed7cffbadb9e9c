"""recipes/evaluate.py as a user starts it: planted facts, perplexity and RULER's forms in one process and in two that share the model, then
recipes/compare.py on what they found."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from tests.support.run_recipe import run_recipe

# the tiny tokenizer has a token for a few letters: lengths are in hundreds of words
SETTINGS = (
    "+suite=needle", "suite.tasks=[needle_multi_key,needle_multi_value,needle_gap,perplexity,offline_frequent_words]",
    "suite.lengths=[1024,2048]", "suite.samples=2", "dtype=float32", "device=cpu", "suite.needle.num_context_tokens=300", "suite.needle.num_prompt_tokens=100", "suite.needle.target_context_length=1200",
    "suite.needle.depths=[0.1,0.9]",
)  # fmt: skip
LAYOUTS = {"one": (), "two": ("launch.nproc_per_node=2", "parallel.tensor_model_parallel_size=2")}


def _run(place: Path, *arguments: str, recipe: str = "evaluate.py") -> subprocess.CompletedProcess[str]:
    return run_recipe(*arguments, recipe=recipe, cwd=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, a held-out text, and evaluations of the model in every layout."""
    directory = tmp_path_factory.mktemp("evaluations")
    build_tiny_random(directory / "model")
    text = "Some words of a document that goes on for long enough, and then a little longer. "
    (directory / "held_out.jsonl").write_text("".join(json.dumps({"text": f"{number}. " + text * 400}) + "\n" for number in range(2)))
    for name, layout in LAYOUTS.items():
        done = _run(directory, *SETTINGS, "model=model", "suite.perplexity.text=[{path: held_out.jsonl}]", f"output_dir={name}", *layout)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory


def _scores(directory: Path) -> dict:
    results = json.loads((directory / "results.json").read_text())
    assert results["not_run"] == []
    return {(score["task"], score["length"]): score for score in results["scores"]}


def test_every_layout_finds_what_one_process_finds(place):
    one = _scores(place / "one")
    assert len(one) == 2 * 2 + 1 + 2 + 2  # two forms of retrieval, the gap, perplexity, a task of ruler_offline
    found = _scores(place / "two")
    assert found.keys() == one.keys()
    for key, score in found.items():
        assert score["score"] == pytest.approx(one[key]["score"], rel=1e-5), key
        if "log_probability" in score.get("graded", {}):
            assert score["graded"]["log_probability"] == pytest.approx(one[key]["graded"]["log_probability"], rel=1e-4), key


def test_the_page_has_tables_maps_regions_and_perplexity(place):
    page = (place / "one" / "evaluation.md").read_text()
    for heading in ("## Planted facts", "### What distance does", "## Perplexity of held-out text", "## In RULER's form", "## Conditions"):
        assert heading in page
    assert "(needle_multi_key_depth_by_length.png)" in page and (place / "one" / "needle_multi_key_depth_by_length.png").is_file()
    assert "| multi_value | " in page and "gap: never seen" in page and "Windows do not overlap." in page


def test_the_same_command_evaluates_nothing_twice_and_another_stride_is_refused(place):
    again = [*SETTINGS, "model=model", "suite.perplexity.text=[{path: held_out.jsonl}]", "output_dir=one"]
    done = _run(place, *again)
    assert done.returncode == 0 and "9 of 9 tasks and lengths are finished already" in done.stderr
    refused = _run(place, *again, "suite.perplexity.stride=256")
    assert refused.returncode == 2 and "was evaluated under other conditions" in refused.stderr


def test_evaluations_compare_with_each_other(place):
    done = _run(place, "evaluations=['one=one','two=two']", "reference=one", "name=mine", "output_dir=compared", recipe="compare.py")
    assert done.returncode == 0, done.stderr[-3000:]
    page = (place / "compared" / "comparison.md").read_text()
    assert "| needle_multi_key at 1K | two | 1 | " in page and "(needle_multi_key_depth_by_length.png)" in page
    numbers = json.loads((place / "compared" / "comparison.json").read_text())["models"]["two"]
    perplexity = next(found for found in numbers if found["key"]["task"] == "log_perplexity")
    assert abs(perplexity["difference"]["difference"]) < 1e-5 and perplexity["difference"]["samples"] == 2
    single = next(found for found in numbers if found["key"]["task"] == "needle_multi_key")
    assert single["difference"]["samples"] == 2, "a text is a sample, however many questions it has"


def test_what_cannot_be_ends_before_anything_is_written(place):
    done = _run(place, *SETTINGS, "model=model", "output_dir=refused", "launch.nproc_per_node=2", "parallel.tensor_model_parallel_size=4")
    assert done.returncode == 2 and "must be a multiple of TP x PP x CP" in done.stderr, done.stderr[-2000:]
    assert not (place / "refused").exists()
