"""The loss of every step of three short runs, against the curves that tools/golden_losses.py wrote. A change that is not meant to touch the
numbers leaves them; one that is rewrites them with the tool."""

from __future__ import annotations

import json

import pytest

from tests.support.checkout import ROOT
from tests.support.run_recipe import run_recipe
from tests.support.tools import load_tool

tool = load_tool(ROOT / "tools" / "golden_losses.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", tool.RUNS)
def test_losses_are_the_golden_ones(directory, name):
    done = run_recipe(*tool.overrides(name, directory), cwd=directory)
    assert done.returncode == 0, done.stderr
    golden = json.loads((tool.CURVES / f"{name}.json").read_text())
    found = tool.curve(directory / name)
    assert len(golden["loss"]) == tool.STEPS and golden.keys() == found.keys()
    assert found["loss"] == pytest.approx(golden["loss"], rel=1e-6), (
        "the numbers changed; if they were meant to: python tools/golden_losses.py"
    )
    assert found["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-4)


def test_a_change_of_the_numbers_is_seen(directory):
    """The tolerance is far below what a change of the maths does: here a learning rate that is 0.2 % higher."""
    done = run_recipe(*tool.overrides("endprompt", directory / "changed"), "optim.lr=0.001002", cwd=directory)
    assert done.returncode == 0, done.stderr
    golden = json.loads((tool.CURVES / "endprompt.json").read_text())
    found = tool.curve(directory / "changed" / "endprompt")
    assert found["loss"] != pytest.approx(golden["loss"], rel=1e-6)
