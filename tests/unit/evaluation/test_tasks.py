"""The table of evaluation tasks."""

from __future__ import annotations

import pytest

from endprompt_megatron.evaluation.suite import SourcesConfig
from endprompt_megatron.evaluation.task_sources import SOURCES
from endprompt_megatron.evaluation.tasks import HAYSTACK_MARKS, MEGATRON, MEGATRON_SUITES, TASKS, current_name, name_in_results, tasks_of


def test_numbers_of_tasks_are_the_benchmarks():
    assert [len(tasks_of([suite])) for suite in ("ruler", "longbench", "short", "ruler_offline")] == [13, 16, 4, 12]
    assert len({task.group for task in tasks_of(["longbench"])}) == 6
    assert len(tasks_of(["ruler", "niah_single_1", "ruler"])) == 13
    assert {name for task in TASKS.values() for name in task.needs} <= set(SOURCES)
    assert set(vars(SourcesConfig())) == set(SOURCES)


def test_every_task_has_its_runner_and_its_form():
    for task in TASKS.values():
        assert (task.runner == MEGATRON) == (task.suite in MEGATRON_SUITES)
        assert (task.form is not None) == (task.suite in ("ruler_offline", "needle"))
    assert TASKS["needle_multi_value"].title == TASKS["needle_multi_value"].form == "multi_value"
    with pytest.raises(KeyError):
        tasks_of(["niah"])


def test_scores_of_one_task_on_several_haystacks_have_different_names():
    assert len({name_in_results(TASKS["offline_niah_single"], haystack) for haystack in HAYSTACK_MARKS}) == 3
    assert name_in_results(TASKS["ruler_vt"], "benchmark") == "ruler_vt"


def test_names_of_earlier_releases():
    assert current_name("probes") == "ruler_offline" and current_name("probe_qa_squad") == "offline_qa_squad"
    assert current_name("needle") is None
