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
    """Carry a study out, or on; the page is written anew after every run.

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

    def write(extra: list[RunRequest]) -> tuple[list[RunResult], list[RunOutcome]]:
        found = [outcome for outcome in map(runner.outcome, requests) if outcome is not None]
        results, failed = read_outcomes(found)
        results = collected + results
        sections = [Section("The same number of tokens" if requests else "Runs", "tokens", results)]
        more = [outcome for outcome in map(runner.outcome, extra) if outcome is not None]
        if "seconds" in study.budgets:
            replaced, also_failed = read_outcomes(more)
            failed += also_failed
            sections.append(_same_time(study, results, replaced))
        pending = len(requests) + len(extra) - len(found) - len(more)
        page = write_comparison(output_dir, study, sections, failed, pending=pending, commands=told)
        get_logger().info(f"page {page}")
        return results, failed

    extra: list[RunRequest] = []
    if not study.write_only:
        runner.run_all(requests, jobs=study.jobs, after=lambda: write(extra))
    results, failed = write(extra)
    if "seconds" in study.budgets:
        extra = _requests_of_same_time(study, results, requests)
        runner.check(extra)
        if extra and not study.write_only:
            runner.run_all(extra, jobs=study.jobs, after=lambda: write(extra))
        results, failed = write(extra)
    return not failed and all(runner.outcome(request) is not None for request in [*requests, *extra])


def _requests_of_same_time(study: StudyConfig, results: list[RunResult], requests: list[RunRequest]) -> list[RunRequest]:
    groups = by_label(results)
    found = []
    for request in requests:
        runs, reference = groups.get(request.label), groups.get(study.reference)
        steps = equal_time_steps(runs, reference, within=study.same_time_within) if runs and reference else None
        if steps is not None:
            kept = tuple(text for text in request.overrides if not text.startswith("trainer.max_steps="))
            found.append(replace(request, overrides=(*kept, f"trainer.max_steps={steps}"), budget="seconds"))
    return found


def _same_time(study: StudyConfig, results: list[RunResult], replaced: list[RunResult]) -> Section:
    """Runs whose time is the reference's: those of the token budget, or their stand-ins with more or fewer steps."""
    groups = by_label(results)
    reference = groups.get(study.reference)
    if not reference:
        return Section("The same time", "seconds", [])
    stand_ins = {result.label for result in replaced}
    unlike = {
        label for label, runs in groups.items() if equal_time_steps(runs, reference, within=study.same_time_within) is not None
    }
    kept = [result for result in results if result.label not in unlike]
    note = (
        f"Runs whose training takes the reference's time (`{study.reference}`) to within {study.same_time_within:.0%}, by the fastest step "
        f"of each; "
        + (f"trained again with other numbers of steps: {', '.join(sorted(stand_ins))}." if stand_ins else "none had to be trained again.")
        + (f" Left out until then: {', '.join(sorted(unlike - stand_ins))}." if unlike - stand_ins else "")
    )
    return Section("The same time", "seconds", kept + replaced, note)
