"""Text sources of the evaluation tasks: local paths, the network, fingerprints."""

from __future__ import annotations

import json

from endprompt_megatron.evaluation.task_sources import (
    fingerprint,
    haystack_of,
    is_offline,
    missing_offline,
    path_problems,
    uses_stand_in,
)
from endprompt_megatron.evaluation.tasks import TASKS, tasks_of


def test_what_runs_without_a_network():
    ready = [task.id for task in tasks_of(["ruler"]) if missing_offline(task, {}, has_punkt=False) is None]
    assert ready == ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    assert "suite.sources.squad to the file dev-v2.0.json" in missing_offline(TASKS["ruler_qa_squad"], {}, has_punkt=True)
    reason = missing_offline(TASKS["niah_single_2"], {}, has_punkt=False)
    assert "suite.sources.punkt" in reason and "suite.sources.essays" in reason
    assert missing_offline(TASKS["niah_single_2"], {"punkt": "a", "haystack_stand_in": "b"}, has_punkt=False) is None
    assert missing_offline(TASKS["longbench_qasper"], {}, has_punkt=False) is None  # the cache of the datasets library may have it


def test_a_stand_in_marks_the_tasks_that_use_it_and_no_others():
    paths = {"haystack_stand_in": "DIR"}
    assert [task.id for task in tasks_of(["ruler"]) if uses_stand_in(task, paths)] == [
        "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery",
    ]  # fmt: skip


def test_offline_is_read_as_hugging_face_reads_it():
    assert is_offline({"HF_HUB_OFFLINE": "1"}) and is_offline({"HF_DATASETS_OFFLINE": "true"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"}) and not is_offline({})


def test_paths_that_are_right_pass(tmp_path):
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("A text.")
    (tmp_path / "dev.json").write_text("{}")
    right = {"punkt": str(tmp_path), "essays": str(tmp_path / "essays"), "squad": str(tmp_path / "dev.json"), "gsm8k": None}
    assert path_problems(right) == []
    (tmp_path / "empty").mkdir()
    assert "no data files" in path_problems({"longbench": str(tmp_path / "empty")})[0]


def test_fingerprint_sees_contents_and_not_places(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    before = fingerprint(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("words")
    assert fingerprint(tmp_path / "a") == before
    (tmp_path / "big").write_bytes(b"x" * (3 << 20))
    first = fingerprint(tmp_path / "big")
    (tmp_path / "big").write_bytes(b"x" * ((3 << 20) - 1) + b"y")
    assert fingerprint(tmp_path / "big") != first


def test_haystack_of_a_task():
    assert haystack_of(TASKS["niah_single_2"], {}) == haystack_of(TASKS["niah_single_2"], {"essays": "DIR"}) == "benchmark"
    assert haystack_of(TASKS["niah_single_2"], {"haystack_stand_in": "DIR"}) == "stand_in"
    assert haystack_of(TASKS["offline_niah_single"], {"essays": "DIR"}) == "essays"
    assert haystack_of(TASKS["offline_common_words"], {"essays": "DIR"}) == "benchmark"


def test_the_environment_is_read_when_the_function_is_called(monkeypatch):
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not is_offline()
