"""The rules of a study, and the runs that it requests, in order."""

from __future__ import annotations

import pytest

from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.errors import ConfigError

METHODS = ("control_short_pi", "endprompt", "pose")


def _study(**changes) -> StudyConfig:
    return StudyConfig(**{"name": "s", "base_experiment": "tiny_random", "methods": ["endprompt", "control_short_pi"], **changes})


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
        ({"methods": []}, "set at least one method"),
        ({"base_experiment": None}, "need an experiment"),
        ({"methods": ["endpromt", "control_short_pi"]}, "endpromt is none of control_short_pi, endprompt, pose"),
        ({"methods": ["endprompt", "endprompt", "control_short_pi"]}, "labels must be unique"),
        ({"seeds": []}, "seeds of endprompt: .*Set at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [-1]}, "seeds=-1: must be between 0 and"),
        ({"methods": ["a/b", "control_short_pi"], "overrides_of": {"a/b": ["method=pose"]}}, "the label 'a/b' is the name of a directory"),
        ({"collect": ["outputs/a", "mine=outputs/a"]}, "directories must be unique"),
        ({"overrides": ["probes.enabled=false"]}, "nothing to compare"),
        ({"reference": "pose"}, "reference=pose: must be one of methods"),
        ({"budgets": ["minutes"]}, "choose from tokens, seconds"),
        ({"keep": "nothing"}, "keep=nothing"),
        ({"jobs": 0}, "jobs=0"),
        ({"same_time_within": 1.0}, "less than 1"),
        ({"overrides": ["seed=3"]}, "the study sets seed"),
        ({"overrides_of": {"endprompt": ["output_dir=x"]}}, "the study sets output_dir"),
    ],
)
def test_wrong_studies_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _study(**changes).validate(METHODS)


def test_settings_of_labels_that_do_not_run_give_a_warning():
    study = _study(seeds_of={"pose": [1]}, overrides_of={"pose": ["x=1"]})
    study.validate(METHODS)
    assert study.unused() == ["seeds_of.pose is not used: pose is not in methods", "overrides_of.pose is not used: pose is not in methods"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluations": ["a=x", "b"]}, "write LABEL=DIR"),
        ({"evaluations": ["a=x", "b=x"]}, "directories must be unique"),
        ({"evaluations": ["a=x"], "reference": "c"}, "no evaluation has this label. Choose one of a"),
        ({"evaluations": ["a=x"], "reference": "a", "collect": ["y"]}, "cannot be combined with methods or collect"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        StudyConfig(**({"name": "n", "reference": "a"} | changes)).validate(())
    StudyConfig(name="n", evaluations=["a=x", "b=y", "b=z"], reference="a").validate(())


def test_directories_with_one_label_are_seeds_of_it():
    assert StudyConfig(name="n", evaluations=["a=x", "b=y=1", "a=z"]).evaluated() == {"a": ["x", "z"], "b=y": ["1"]}
