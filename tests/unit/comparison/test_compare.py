"""A study with a stand-in for recipes/extend.py: runs are made once, failures are rows and are tried again, a stop is passed on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from endprompt_megatron.comparison.runner import _quoted
from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.errors import ConfigError, DataError, RunInterrupted
from endprompt_megatron.jobs.compare import compare
from endprompt_megatron.output_files import claimed
from endprompt_megatron.report.figures import comparison, evaluation
from endprompt_megatron.report.figures import run as run_figures
from tests.support.studies import stand_in_command, write_run, write_suite


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """No pixels, except where the pictures are looked at: a page is written after every run."""

    def quick(figure, path):
        Path(path).write_bytes(b"a picture")
        run_figures.plt.close(figure)
        return Path(path)

    if "pictures" not in request.keywords:
        for module in (comparison, evaluation):
            monkeypatch.setattr(module, "write_figure", quick)


METHODS = ("control_short_pi", "endprompt", "pose", "untrained_pi")


def _compare(tmp_path, check=lambda request: None, **changes) -> tuple[bool, str]:
    study = StudyConfig(
        **{
            "name": "s",
            "output_dir": str(tmp_path / "out"),
            "base_experiment": "tiny",
            "methods": ["endprompt", "control_short_pi"],
            **changes,
        }
    )
    commands = ["python recipes/compare.py +study=s"]
    finished = compare(study, command=stand_in_command(tmp_path), known_methods=METHODS, commands=commands, check=check)
    return finished, (tmp_path / "out" / "comparison.md").read_text()


def _starts(tmp_path, run: str) -> int:
    return len((tmp_path / "out" / "runs" / run / "starts").read_text())


@pytest.mark.pictures
def test_a_study_is_made_once_and_grows(tmp_path):
    finished, page = _compare(tmp_path, seeds=[1, 2], keep="evaluation", jobs=2, overrides_of={"endprompt": ["gain=0.5"]})
    assert finished and "| endprompt | 2 |" in page and "| control_short_pi | 2 |" in page
    assert "+0.500" in page and "−0.500" in page  # log-probabilities, log-perplexity
    assert not (tmp_path / "out" / "runs" / "endprompt_seed1" / "hf").exists()
    for picture in ("tokens_by_length.png", "tokens_by_distance.png", "tokens_cost.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000 and picture in page
    finished, page = _compare(tmp_path, seeds=[1, 2, 3], keep="evaluation", overrides_of={"endprompt": ["gain=0.5"]})
    assert finished and "| endprompt | 3 |" in page
    assert [_starts(tmp_path, f"endprompt_seed{seed}") for seed in (1, 2, 3)] == [1, 1, 1]
    assert "python recipes/compare.py +study=s" in page
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {(run["label"], run["seed"]) for run in numbers["sections"]["The same number of tokens"]["runs"]} == {
        (label, seed) for label in ("endprompt", "control_short_pi") for seed in (1, 2, 3)
    }


def test_a_failed_run_is_a_row_and_is_tried_again(tmp_path):
    options = dict(methods=["endprompt", "pose", "control_short_pi"], overrides_of={"pose": ["fail=once"], "endprompt": ["fail=always"]})
    finished, page = _compare(tmp_path, **options)
    assert not finished and page.count("DataError: the disk is made of cheese") == 2
    assert "| control_short_pi | 1 |" in page
    finished, page = _compare(tmp_path, **options)
    assert not finished and page.count("the disk is made of cheese") == 1 and "| pose | 1 |" in page
    assert [_starts(tmp_path, f"{label}_seed1") for label in ("endprompt", "pose", "control_short_pi")] == [2, 2, 1]


def test_a_stop_reaches_the_run_and_the_next_start_goes_on(tmp_path):
    def stop() -> None:
        while not (tmp_path / "out" / "runs" / "endprompt_seed1" / "waiting").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM; start the same command again"):
        _compare(tmp_path, overrides_of={"endprompt": ["wait=yes"]})
    thread.join()
    assert (tmp_path / "out" / "runs" / "endprompt_seed1" / "stopped").exists()
    finished, _ = _compare(tmp_path, overrides_of={"endprompt": ["wait=yes"]})
    assert finished and _starts(tmp_path, "endprompt_seed1") == 2


def test_other_overrides_are_refused_before_anything_starts(tmp_path):
    _compare(tmp_path)
    with pytest.raises(ConfigError, match="endprompt_seed1 was made with other overrides .differing: optim.lr=1"):
        _compare(tmp_path, overrides=["optim.lr=1"], seeds=[1, 2])
    assert not (tmp_path / "out" / "runs" / "endprompt_seed2").exists()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds files but no study.json"):
        _compare(tmp_path, output_dir=str(tmp_path / "else"))


def test_methods_of_other_cost_get_the_same_time(tmp_path):
    options = dict(
        methods=["endprompt", "pose", "control_short_pi", "untrained_pi"],
        budgets=["tokens", "seconds"],
        overrides=["trainer.max_steps=6"],
        overrides_of={"pose": ["step_seconds=3"], "endprompt": ["step_seconds=1.05"], "untrained_pi": ["trainer.max_steps=0"]},
    )
    finished, page = _compare(tmp_path, **options)
    again = json.loads((tmp_path / "out" / "runs" / "pose_seed1_same_seconds.run.json").read_text())
    assert finished and again["overrides"][-1] == "trainer.max_steps=2"  # 6 steps of 1 s are 2 of 3 s
    assert not (tmp_path / "out" / "runs" / "endprompt_seed1_same_seconds").exists()
    tokens, seconds = page.split("## The same time")
    assert "Trained again with other numbers of steps: pose" in seconds
    assert "| pose | 128 | 6 | 3,072 |" in tokens and "| pose | 128 | 2 | 1,024 |" in seconds
    # a stand-in stays what it is when a faster step of the reference is seen later
    metrics = tmp_path / "out" / "runs" / "control_short_pi_seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step_seconds": 1.0', '"step_seconds": 0.5'))
    finished, page = _compare(tmp_path, **options)
    assert finished and "| pose | 128 | 2 | 1,024 |" in page and _starts(tmp_path, "pose_seed1_same_seconds") == 1


def test_the_same_time_is_one_line_where_nothing_differs(tmp_path):
    _, page = _compare(tmp_path, budgets=["tokens", "seconds"])
    assert page.count("### Cost") == 1 and 'The runs and numbers are those of "The same number of tokens"' in page


def test_a_run_that_leaves_no_probes_is_a_failure_and_keeps_its_weights(tmp_path):
    finished, page = _compare(tmp_path, keep="evaluation", overrides_of={"endprompt": ["probes=none"]})
    assert not finished and "has no finished run with probes" in page
    _compare(tmp_path, keep="evaluation", overrides_of={"endprompt": ["probes=none"]})
    assert _starts(tmp_path, "endprompt_seed1") == 2
    assert (tmp_path / "out" / "runs" / "endprompt_seed1" / "hf").is_dir()


def test_weights_stay_as_they_were_when_keep_changes(tmp_path):
    _compare(tmp_path, keep="all")
    _compare(tmp_path, keep="evaluation")
    assert (tmp_path / "out" / "runs" / "endprompt_seed1" / "checkpoints").is_dir()


def test_a_record_cut_short_is_a_run_to_go_on_with(tmp_path):
    _compare(tmp_path)
    (tmp_path / "out" / "runs" / "endprompt_seed1.run.json").write_text('{"overr')
    finished, _ = _compare(tmp_path)
    assert finished and _starts(tmp_path, "endprompt_seed1") == 2


def test_only_one_job_carries_a_study_out(tmp_path):
    _compare(tmp_path)
    with (
        claimed(tmp_path / "out", doing="carries this study out"),
        pytest.raises(ConfigError, match="another job of this process carries this study out"),
    ):
        _compare(tmp_path)


def test_a_run_that_cannot_be_is_refused_before_any_starts(tmp_path):
    def check(request) -> None:
        if request.label == "control_short_pi":
            raise ConfigError("control_short_pi_seed1 cannot be run: no such key")

    with pytest.raises(ConfigError, match="no such key"):
        _compare(tmp_path, check=check)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_odd_characters_is_quoted_for_hydra(tmp_path):
    odd = tmp_path / "a, 'b' (c)=é"
    with pytest.raises(FileNotFoundError):  # this helper looks for the page where it usually is
        _compare(tmp_path, output_dir=str(odd))
    assert "| endprompt | 1 |" in (odd / "comparison.md").read_text()
    command = json.loads((odd / "study.json").read_text())
    assert command["output_dir"] == str(odd)
    parsed = OverridesParser.create().parse_override(f"output_dir={_quoted(odd)}")
    assert parsed.value() == str(odd)


def test_runs_made_elsewhere_are_collected(tmp_path):
    directories = [
        str(write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, gain=0.1 * seed, base=method == "endprompt"))
        for method in ("control_short_pi", "endprompt")
        for seed in (4, 5)
    ]
    finished, page = _compare(tmp_path, methods=[], base_experiment=None, collect=directories)
    assert finished and "| endprompt | 2 |" in page and "| base, untouched | 2 |" in page
    write_run(tmp_path / "control_short_pi4", method="control_short_pi", seed=4, base=True)  # the same base again is no further seed
    _, page = _compare(tmp_path, methods=[], base_experiment=None, collect=directories)
    assert "| base, untouched | 2 |" in page
    more = [*directories, str(write_run(tmp_path / "hot", method="endprompt", seed=4))]
    with pytest.raises(ConfigError, match="two runs are endprompt with seed 4 .endprompt4 and hot"):
        _compare(tmp_path, methods=[], base_experiment=None, collect=more)
    _, page = _compare(tmp_path, methods=[], base_experiment=None, collect=[*directories, f"hot={more[-1]}"])
    assert "| hot | 1 |" in page and "| endprompt | 2 |" in page
    with pytest.raises(
        ConfigError, match="reference=pose: no run has this label. Choose one of control_short_pi, base, untouched, endprompt"
    ):
        _compare(tmp_path, methods=[], base_experiment=None, collect=[*directories], reference="pose")
    with pytest.raises(DataError, match="has no finished run with probes"):
        _compare(tmp_path, methods=[], base_experiment=None, collect=[str(tmp_path)])


def test_runs_with_other_questions_are_named(tmp_path):
    directories = [write_run(tmp_path / method, method=method, seed=1) for method in ("control_short_pi", "endprompt")]
    evaluation = json.loads((directories[1] / "evaluation.json").read_text())
    evaluation["conditions"]["haystack"] = "numbers"
    (directories[1] / "evaluation.json").write_text(json.dumps(evaluation))
    _, page = _compare(tmp_path, methods=[], base_experiment=None, collect=list(map(str, directories)))
    assert "Not comparable: endprompt seed 1 differs from control_short_pi seed 1 in haystack" in page


def test_scores_of_suites_are_a_table_with_differences_by_sample(tmp_path):
    directories = [write_run(tmp_path / method, method=method, seed=1) for method in ("control_short_pi", "endprompt")]
    options = dict(methods=[], base_experiment=None, collect=list(map(str, directories)))
    _, page = _compare(tmp_path, **options)
    assert "### Suites" not in page
    write_suite(directories[0] / "evaluation_suites", {("vt", 4096): [0.0, 40.0, 20.0, 60.0]})
    write_suite(directories[1] / "evaluation_suites", {("vt", 4096): [40.0, 60.0, 80.0, 80.0], ("gsm8k", None): [100.0]}, dtype="bfloat16")
    _, page = _compare(tmp_path, **options)
    (row,) = [line for line in page.splitlines() if line.startswith("| vt at 4K | endprompt |")]
    assert row.startswith("| vt at 4K | endprompt | 1 | 65.0 | +35.0 | +20.0 to +5") and row.endswith("| 0.125 | 4 |")
    assert "| vt at 4K | control_short_pi | 1 | 30.0 | – | – | – | – |" in page and "| gsm8k | endprompt | 1 | 100.0 | – |" in page
    assert "**Evaluated under other conditions than the reference: endprompt in dtype.**" in page
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())["sections"]["The same number of tokens"]["suites"]
    assert numbers["endprompt"][1]["difference"]["difference"] == 35.0 and numbers["control_short_pi"][0]["difference"] is None
