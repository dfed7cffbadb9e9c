"""The table of evaluation tasks. Each row is one task, which either lm-eval or Megatron-Core runs. To add a task, add a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from endprompt_megatron.config.probe_rules import RETRIEVAL_TASKS
from endprompt_megatron.evaluation.ruler.samples import FORMS, QA_TASKS

RULER, LONGBENCH, SHORT = "ruler", "longbench", "short"
RULER_OFFLINE, NEEDLE, PERPLEXITY = "ruler_offline", "needle", "perplexity"
MEGATRON_SUITES = (RULER_OFFLINE, NEEDLE, PERPLEXITY)
SUITES = (RULER, LONGBENCH, SHORT, *MEGATRON_SUITES)
LM_EVAL, MEGATRON = "lm_eval", "megatron"
GENERATION, LOG_PROBABILITY = "generation", "log-probability"
OFFLINE_PREFIX = "offline_"  # without this prefix, some tasks of ruler_offline would have the id of a task of lm-eval
NEEDLE_PREFIX = "needle_"
GAP_TASK = NEEDLE_PREFIX + "gap"
LOG_PERPLEXITY = "log_perplexity"
# names of text sources, see task_sources.SOURCES
ESSAYS, HAYSTACK_STAND_IN, PUNKT = "essays", "haystack_stand_in", "punkt"
# The text that hides the facts of a task: the benchmark's own text, other prose in place of the essays, or the essays in place of the
# benchmark's own noise sentences.
BENCHMARK_HAYSTACK, STAND_IN_HAYSTACK, ESSAYS_HAYSTACK = "benchmark", "stand_in", "essays"
HAYSTACK_MARKS = {BENCHMARK_HAYSTACK: "", ESSAYS_HAYSTACK: " (essays)", STAND_IN_HAYSTACK: " (stand-in haystack)"}


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        id: identifier of the task in configs and results. For tasks of lm-eval, it is lm-eval's name.
        title: display name, for tables only.
        suite: suite of the task, one of SUITES.
        group: category within the suite, as the benchmark defines it.
        runner: LM_EVAL, or MEGATRON if Megatron-Core runs the task without lm-eval.
        scored_by: GENERATION (greedy output is compared with references) or LOG_PROBABILITY (given answers or texts are scored).
        metric: metric of one sample. For tasks of lm-eval, it is the key of the score in lm-eval's sample, except that RULER's samples use
            the length as the key.
        unit: unit of the score.
        needs: names of the text sources that the task requires, from task_sources.SOURCES.
        optional_sources: names of the text sources that the task uses if they are given. The task also runs without them.
        filter: name of the lm-eval filter whose samples are used.
        runs_code: whether scoring executes code that the model wrote.
        has_lengths: whether the task is evaluated at chosen lengths. The gap task, for example, uses only the target window.
        form: name of the task's form in the module that makes its samples (ruler.samples, ruler.qa or probes.needle); None for other tasks.
    """

    id: str
    title: str
    suite: str
    group: str
    runner: str
    scored_by: str
    metric: str
    unit: str = "of 100"
    needs: tuple[str, ...] = ()
    optional_sources: tuple[str, ...] = ()
    filter: str = "none"
    runs_code: bool = False
    has_lengths: bool = True
    form: str | None = None


def _ruler(group: str, **needs: tuple[str, ...]) -> list[Task]:
    return [Task(name, name, RULER, group, LM_EVAL, GENERATION, "string match", needs=sources) for name, sources in needs.items()]


def _longbench(group: str, *names: str) -> list[Task]:
    ids = [f"longbench_{name}" for name in names]
    return [Task(one, one, LONGBENCH, group, LM_EVAL, GENERATION, "score", needs=("longbench",), has_lengths=False) for one in ids]


def _short(name: str, group: str, scored_by: str, metric: str, **options: Any) -> Task:
    return Task(name, name, SHORT, group, LM_EVAL, scored_by, metric, needs=(name,), has_lengths=False, **options)


def _offline(form: str, *, needs: tuple[str, ...] = (), optional_sources: tuple[str, ...] = ()) -> Task:
    name, group = OFFLINE_PREFIX + form, "in RULER's form"
    return Task(
        name, name, RULER_OFFLINE, group, MEGATRON, GENERATION, "string match", needs=needs, optional_sources=optional_sources, form=form
    )


def _needle(form: str) -> Task:
    name, group = NEEDLE_PREFIX + form, "planted facts, scored by log-probability"
    return Task(name, form, NEEDLE, group, MEGATRON, LOG_PROBABILITY, "exact match", has_lengths=name != GAP_TASK, form=form)


_ESSAY_SOURCES = (PUNKT, ESSAYS)
# The tasks of lm-eval are RULER's 13 tasks (arXiv 2404.06654, section 3), LongBench's English and code tasks in its six groups (arXiv
# 2308.14508, table 1, without the Chinese tasks), and the paper's four short tasks.
TASKS: dict[str, Task] = {
    task.id: task
    for task in (
        *_ruler(
            "retrieval",
            niah_single_1=(),
            niah_single_2=_ESSAY_SOURCES,
            niah_single_3=_ESSAY_SOURCES,
            niah_multikey_1=_ESSAY_SOURCES,
            niah_multikey_2=(),
            niah_multikey_3=(),
            niah_multivalue=_ESSAY_SOURCES,
            niah_multiquery=_ESSAY_SOURCES,
        ),
        *_ruler("multi-hop tracing", ruler_vt=()),
        *_ruler("aggregation", ruler_cwe=(), ruler_fwe=()),
        *_ruler("question answering", ruler_qa_squad=("squad",), ruler_qa_hotpot=("hotpotqa",)),
        *_longbench("single-document QA", "narrativeqa", "qasper", "multifieldqa_en"),
        *_longbench("multi-document QA", "hotpotqa", "2wikimqa", "musique"),
        *_longbench("summarization", "gov_report", "qmsum", "multi_news"),
        *_longbench("few-shot learning", "trec", "triviaqa", "samsum"),
        *_longbench("synthetic tasks", "passage_count", "passage_retrieval_en"),
        *_longbench("code completion", "lcc", "repobench-p"),
        _short("mmlu", "knowledge", LOG_PROBABILITY, "acc"),
        _short("gsm8k", "mathematics", GENERATION, "exact_match", filter="strict-match"),
        _short("hellaswag", "common sense", LOG_PROBABILITY, "acc_norm"),
        _short("humaneval", "code", GENERATION, "pass@1", filter="create_test", runs_code=True),
        *(_offline(name, optional_sources=(ESSAYS, HAYSTACK_STAND_IN) if form.made_of is None else ()) for name, form in FORMS.items()),
        *(_offline(name, needs=(name.removeprefix("qa_"),)) for name in QA_TASKS),
        *(_needle(name) for name in (*RETRIEVAL_TASKS, "gap")),
        Task(
            LOG_PERPLEXITY,
            LOG_PERPLEXITY,
            PERPLEXITY,
            "held-out documents",
            MEGATRON,
            LOG_PROBABILITY,
            "nats a token (lower is better)",
            unit="nats a token",
        ),
    )
}


def tasks_of(names: list[str]) -> list[Task]:
    """Return the tasks that a list of task ids and suites selects. A suite selects all of its tasks. No task appears twice.

    Raises:
        KeyError: a name is neither a task id nor a suite.
    """
    found = {}
    for name in names:
        for task in [task for task in TASKS.values() if task.suite == name] or [TASKS[name]]:
            found[task.id] = task
    return list(found.values())


def name_in_results(task: Task, haystack: str) -> str:
    """Return the display name of a task's scores: the id, with a mark if the haystack is not the benchmark's. Only earlier_results.py
    parses display names.

    Args:
        haystack: one of HAYSTACK_MARKS.
    """
    return task.id + HAYSTACK_MARKS[haystack]


def current_name(former: str) -> str | None:
    """Return the current name of a suite or task that an earlier release called `former`; None if `former` is not such a name.

    The suite `ruler_offline` was called `probes`, and its tasks `probe_*`. For any other `probe_*`, the returned task does not exist.
    """
    if former == "probes":
        return RULER_OFFLINE
    return OFFLINE_PREFIX + former.removeprefix("probe_") if former.startswith("probe_") else None
