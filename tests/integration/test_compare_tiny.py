"""The study of every method on a random model, by its command: what recipes/compare.py +study=smollm2_135m_16k does, in small."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.run_recipe import run_recipe


def _run(*overrides: str, cwd) -> subprocess.CompletedProcess[str]:
    return run_recipe("+study=tiny_random", *overrides, recipe="compare.py", cwd=cwd, timeout=1800)


EVERY = (
    "untrained_pi", "control_short_pi", "endprompt", "endprompt_random", "endprompt_pose", "pose", "full", "lceg_pi", "lceg_ntk",
    "lceg_yarn", "longlora",
)  # fmt: skip
FEW = ("untrained_pi", "control_short_pi", "endprompt")


@pytest.mark.parametrize("methods", [pytest.param(FEW, id="few"), pytest.param(EVERY, id="all", marks=pytest.mark.repeated)])
def test_every_method_is_a_row(tmp_path, methods):
    chosen = f"methods=[{','.join(methods)}]"
    done = _run(chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "outputs" / "compare_tiny_random" / "comparison.md").read_text()
    tokens, same_time = page.split("## The same time")
    assert "## The same number of tokens" in tokens and "Training takes the reference's time" in same_time
    for method in methods:
        assert f"| {method} | {2 if method in ('endprompt', 'control_short_pi') else 1} |" in tokens, method
    assert "failed" not in page
    again = _run(chosen, "write_only=true", cwd=tmp_path)
    assert again.returncode == 0 and "run 1" not in again.stderr


def test_wrong_studies_end_before_anything_starts(tmp_path):
    for overrides, message in (
        (("methods=[endpromt]",), "endpromt is none of"),
        (("jobs=none",), "jobs"),
        (("bugets=[tokens]",), "bugets"),
        (('overrides=["optim.lrr=1"]',), "untrained_pi_seed1 cannot be run"),
        (("base_experiment=huge",), "huge"),
        (('overrides=["data.seq_length=4096"]',), "data.seq_length=4096"),
    ):
        done = _run(*overrides, cwd=tmp_path)
        assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "outputs").exists()
