"""The rules of a study, and which runs it asks for in which order."""

from __future__ import annotations

import pytest

from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.errors import ConfigError

METHODS = ("control_short_pi", "endprompt", "pose")


def _study(**changes) -> StudyConfig:
    return StudyConfig(**{"name": "s", "experiment": "tiny_random", "methods": ["endprompt", "control_short_pi"], **changes})


def test_runs_go_seed_by_seed_so_that_early_results_compare_everything():
    study = _study(seeds=[1], seeds_of={"endprompt": [1, 2, 3], "control_short_pi": [1, 2]}, overrides=["optim.lr=1e-3"])
    study.validate(METHODS)
    assert [run.name for run in study.runs()] == [
        "endprompt_seed1", "control_short_pi_seed1", "endprompt_seed2", "control_short_pi_seed2", "endprompt_seed3",
    ]  # fmt: skip
    assert study.runs()[0].overrides == ("+experiment=tiny_random", "method=endprompt", "optim.lr=1e-3")


def test_a_variant_names_its_method():
    study = _study(methods=["endprompt_b64", "control_short_pi"], overrides_of={"endprompt_b64": ["method=endprompt", "x=1"]})
    study.validate(METHODS)
    assert study.runs()[0].overrides == ("+experiment=tiny_random", "method=endprompt", "x=1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "name at least one method"),
        ({"experiment": None}, "start from an experiment"),
        ({"methods": ["endpromt", "control_short_pi"]}, "endpromt is none of control_short_pi, endprompt, pose"),
        ({"methods": ["endprompt", "endprompt", "control_short_pi"]}, "each label once"),
        ({"seeds": []}, "seeds of endprompt: name at least one"),
        ({"seeds_of": {"pose": [1]}}, "seeds_of.pose: pose is not in methods"),
        ({"overrides_of": {"pose": []}}, "overrides_of.pose"),
        ({"reference": "pose"}, "reference=pose: must be one of methods"),
        ({"budgets": ["minutes"]}, "choose from tokens, seconds"),
        ({"keep": "nothing"}, "keep=nothing"),
        ({"jobs": 0}, "jobs=0"),
        ({"same_time_within": 1.0}, "between 0 and 1"),
        ({"overrides": ["seed=3"]}, "the study sets seed itself"),
        ({"overrides_of": {"endprompt": ["output_dir=x"]}}, "the study sets output_dir itself"),
    ],
)
def test_wrong_studies_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _study(**changes).validate(METHODS)
