"""A study: carry out the runs that are missing, collect those made elsewhere, and write the page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from endprompt_megatron.comparison.results import RunResult, by_label, equal_time_steps, read_outcomes, read_run
from endprompt_megatron.comparison.runner import Runner, RunOutcome
from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.log import get_logger
from endprompt_megatron.report.comparison import Section, write_comparison

_STUDY_FILE = "study.json"


def compare(study: StudyConfig, *, command: list[str], known_methods: tuple[str, ...], told: list[str]) -> bool:
    """Carry a study out, or on; the page is written anew after every run, its pictures at the end.

    Args:
        study: what to compare.
        command: of recipes/extend.py.
        known_methods: names in conf/method.
        told: commands that the page names as its own.
    Returns:
        Whether every run that was asked for is finished.
    Raises:
        ConfigError: the study, or what is in its output directory, cannot be.
        DataError: a directory of `collect` holds no finished run.
        RunInterrupted: a signal asked to stop.
    """
    study.validate(known_methods)
    output_dir = Path(study.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / _STUDY_FILE).is_file():
        raise ConfigError(f"output_dir={output_dir} holds files but no {_STUDY_FILE} of a study. Set output_dir to another directory.")
    collected = [result for directory in study.collect for result in read_run(Path(directory))]
    runner = Runner(command, output_dir / "runs", keep=study.keep)
    requests = study.runs()
    runner.check(requests)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / _STUDY_FILE).write_text(json.dumps(asdict(study), indent=2) + "\n")

    def write(extra: list[RunRequest], *, draw: bool = False) -> tuple[list[RunResult], list[RunOutcome]]:
        found = [outcome for outcome in map(runner.outcome, requests) if outcome is not None]
        results, failed = read_outcomes(found)
        results = collected + results
        sections = [Section("The same number of tokens" if requests else "Runs", "tokens", results)]
        more = [outcome for outcome in map(runner.outcome, extra) if outcome is not None]
        if "seconds" in study.budgets:
            replaced, also_failed = read_outcomes(more)
            failed += also_failed
            sections.append(_same_time(study, results, extra, replaced))
        pending = len(requests) + len(extra) - len(found) - len(more)
        page = write_comparison(output_dir, study, sections, failed, pending=pending, commands=told, draw=draw)
        if draw:
            get_logger().info(f"page {page}")
        return results, failed

    extra: list[RunRequest] = []
    if not study.write_only:
        runner.run_all(requests, jobs=study.jobs, after=lambda: write(extra))
    results, failed = write(extra)
    if "seconds" in study.budgets and requests:
        extra = _requests_of_same_time(study, results, requests, runner)
        runner.check(extra)
        if extra and not study.write_only:
            runner.run_all(extra, jobs=study.jobs, after=lambda: write(extra))
    results, failed = write(extra, draw=True)
    return not failed and all(runner.outcome(request) is not None for request in [*requests, *extra])


def _requests_of_same_time(
    study: StudyConfig, results: list[RunResult], requests: list[RunRequest], runner: Runner
) -> list[RunRequest]:
    """Stand-ins for the runs of methods whose time is not the reference's. Once a method has one, all its seeds get as many steps, however
    the measured times move afterwards."""
    groups = by_label(results)
    reference = groups.get(study.reference)
    found = []
    for label in study.methods if reference else []:
        mine = [replace(request, budget="seconds") for request in requests if request.label == label]
        steps = next((told for told in map(runner.steps_of, mine) if told is not None), None)
        if steps is None and label in groups:
            steps = equal_time_steps(groups[label], reference, within=study.same_time_within)
        if steps is not None:
            found += [request.with_steps(steps) for request in mine]
    return found


def _same_time(study: StudyConfig, results: list[RunResult], extra: list[RunRequest], replaced: list[RunResult]) -> Section:
    """Runs whose time is the reference's: those of the token budget, or their stand-ins with more or fewer steps."""
    if not any(result.label == study.reference for result in results):
        return Section("The same time", "seconds", [])
    unlike, stand_ins = {request.label for request in extra}, {result.label for result in replaced}
    note = (
        f"Runs whose training takes the reference's time (`{study.reference}`) to within {study.same_time_within:.0%}, by the fastest step "
        f"of each; "
        + (f"trained again with other numbers of steps: {', '.join(sorted(stand_ins))}." if stand_ins else "none was trained again.")
        + (f" Left out, because that is still to be done: {', '.join(sorted(unlike - stand_ins))}." if unlike - stand_ins else "")
    )
    return Section("The same time", "seconds", [result for result in results if result.label not in unlike] + replaced, note)
