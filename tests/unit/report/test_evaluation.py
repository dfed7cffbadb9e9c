"""The page of an evaluation, from results that were made up."""

from __future__ import annotations

from statistics import fmean

from endprompt_megatron.evaluation.tasks import TASKS, tasks_of
from endprompt_megatron.report.evaluation import write_evaluation

CONDITIONS = {
    "harness": "lm-eval 0.4.13", "backend": "hf", "dtype": "auto", "bos": "none", "chat_template": False, "command": "python recipes/evaluate.py",
    "samples": 10, "local_sources": {}, "window": 65536, "native_window": 8192,
}  # fmt: skip


def _score(task: str, score: float, length: int | None = None) -> dict:
    known = TASKS[task]
    return {
        "suite": known.suite, "task": task, "task_id": task, "haystack": "benchmark", "group": known.group, "length": length, "metric": known.metric, "score": score, "samples": 10,
        "interval": [score - 1, score + 1], "seconds": 12.0, "records": f"records/{task}.jsonl",
    }  # fmt: skip


def _page(tmp_path, scores, not_run=()) -> str:
    results = {"model": "outputs/run/hf", "conditions": CONDITIONS, "scores": scores, "not_run": list(not_run)}
    return write_evaluation(tmp_path, results).read_text()


def _cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_are_over_tasks_and_lengths_and_say_when_they_are_whole(tmp_path):
    tasks = tasks_of(["ruler"])
    scores = [_score(task.id, 10.0 * index / length * 4096, length) for index, task in enumerate(tasks) for length in (8192, 4096)]
    page = _page(tmp_path, scores)
    assert _cells(page, "task")[1:] == ["4K", "8K", "mean over lengths"]
    assert _cells(page, "**mean over tasks, all**")[1:] == ["60.0", "30.0", "45.0"]
    assert _cells(page, "niah_single_2 ")[1:] == ["10.0", "5.0", "7.5"]


def test_a_mean_of_fewer_tasks_says_of_how_many(tmp_path):
    page = _page(tmp_path, [_score("ruler_vt", 40.0, 4096), _score("ruler_vt", 20.0, 8192), _score("ruler_cwe", 60.0, 4096)])
    assert _cells(page, "**mean over tasks, of those that ran**")[1:] == ["50.0 (2 of 13)", "20.0 (1 of 13)", "35.0"]
    assert _cells(page, "ruler_cwe ")[2] == "–"


def test_the_papers_numbers_stand_beside_ours_with_their_source(tmp_path):
    page = _page(tmp_path, [_score("ruler_vt", 40.0, 4096), _score("longbench_lcc", 30.0), _score("mmlu", 50.0)])
    assert "arXiv 2605.14589: Llama-3-8B" in page
    assert _cells(page, "*paper*, EndPrompt, 13 tasks")[1:] == ["90.92", "76.03 (4K to 64K)"]
    assert "| *paper*, EndPrompt | – | – | – | – | – | – | 38.30 |" in page and "| *paper*, EndPrompt | – | – | – | – | 52.41 |" in page


def test_longbench_is_reported_by_its_six_groups(tmp_path):
    scores = [_score(task.id, float(index)) for index, task in enumerate(tasks_of(["longbench"]))]
    cells = _cells(_page(tmp_path, scores), "this model")
    assert cells[1:7] == ["1.0", "4.0", "7.0", "10.0", "12.5", "14.5"] and cells[7] == f"{fmean([1, 4, 7, 10, 12.5, 14.5]):.1f}"
    assert _cells(_page(tmp_path, scores[:2]), "this model")[1] == "0.5 (2 of 3)"


def test_what_did_not_run_is_listed_with_its_reason(tmp_path):
    page = _page(tmp_path, [], [{"task": "ruler_qa_squad", "length": 4096, "reason": "SQuAD | missing"}])
    assert "| ruler_qa_squad | 4K | SQuAD / missing |" in page and "## RULER" not in page and "0 tasks and lengths ran, 1 did not" in page


def test_every_score_has_its_interval_and_its_samples(tmp_path):
    page = _page(tmp_path, [_score("mmlu", 50.0)])
    assert "| mmlu | – | acc | 50.0 | 49.0 to 51.0 | 10 | 12 | [samples](records/mmlu.jsonl) |" in page
