"""Carry out a study: start the missing runs, read runs that were made elsewhere, and write the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from endprompt_megatron.comparison.paired_evaluations import read_evaluation
from endprompt_megatron.comparison.results import RunResult, by_label, distinct, equal_time_steps, fault_of, read_outcomes, read_run
from endprompt_megatron.comparison.runner import Runner, RunOutcome
from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import claimed, foreign_files, replace_text
from endprompt_megatron.report.comparison import Section, write_comparison
from endprompt_megatron.report.suite_comparison import write_suite_comparison

_STUDY_FILE = "study.json"


def compare(
    study: StudyConfig, *, command: list[str], known_methods: tuple[str, ...], commands: list[str], check: Callable[[RunRequest], None]
) -> bool:
    """Carry out or resume a study. The page is rewritten after every run, its figures at the end.

    Args:
        study: configuration of the study.
        command: command line of recipes/extend.py.
        known_methods: names in conf/method.
        commands: command lines that reproduce the page, for the page.
        check: raises ConfigError if a run is invalid. It is called before the first run starts.
    Returns:
        Whether every run of the study has finished.
    Raises:
        ConfigError: the study is invalid, its output directory contains something else, or another process carries the study out.
        DataError: a directory in `collect` contains no finished run.
        OutputError: the page, a record or a log cannot be written.
        RunInterrupted: a signal stopped the study.
    """
    study.validate(known_methods)
    for note in study.unused():
        get_logger().info(note)
    output_dir = Path(study.output_dir)
    if study.evaluations:
        return _compare_evaluations(study, output_dir, commands)
    collected = [result for entry in study.collect for result in _collected(entry)]
    if study.reference not in {*study.methods, *(result.label for result in collected)}:
        labels = ", ".join(dict.fromkeys(result.label for result in collected))
        raise ConfigError(f"reference={study.reference}: no run has this label. Choose one of {labels}.")
    requests = study.runs()
    for label in study.methods:
        check(next(request for request in requests if request.label == label))
    runner = Runner(command, output_dir / "runs", keep=study.keep, fault_of=fault_of)
    if not study.write_only:
        runner.check(requests)
    _refuse_other_files(output_dir)
    with claimed(output_dir, doing="carries this study out"):
        replace_text(output_dir / _STUDY_FILE, json.dumps(asdict(study), indent=2) + "\n")
        return _Comparison(study, runner, collected, requests, commands).carry_out()


def _compare_evaluations(study: StudyConfig, output_dir: Path, commands: list[str]) -> bool:
    models = {
        label: {seed: read_evaluation(Path(directory)) for seed, directory in enumerate(directories, 1)}
        for label, directories in study.evaluated().items()
    }
    for label, seeds in models.items():
        for seed, found in seeds.items():
            if not found:
                directory = study.evaluated()[label][seed - 1]
                raise DataError(f"evaluations: {label}={directory} holds no results.json of recipes/evaluate.py with a score.")
    _refuse_other_files(output_dir)
    with claimed(output_dir, doing="carries this study out"):
        replace_text(output_dir / _STUDY_FILE, json.dumps(asdict(study), indent=2) + "\n")
        page = write_suite_comparison(output_dir, study.name, models, reference=study.reference, commands=commands)
    get_logger().info(f"page {page}")
    return True


def _refuse_other_files(output_dir: Path) -> None:
    """Check that the output directory contains no files, or a study.

    Raises:
        ConfigError: the directory contains files of something else, or cannot be read.
    """
    try:
        holds_files = output_dir.is_dir() and bool(foreign_files(output_dir))
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be read ({error}). Set output_dir to a writable directory.") from error
    if holds_files and not (output_dir / _STUDY_FILE).is_file():
        raise ConfigError(f"output_dir={output_dir} holds files but no {_STUDY_FILE} of a study. Set output_dir to another directory.")


def _collected(entry: str) -> list[RunResult]:
    label, _, directory = entry.rpartition("=")
    return read_run(Path(directory), label=label or None)


@dataclass
class _Comparison:
    """State of a study while it is carried out.

    Attributes:
        study: configuration of the study.
        runner: starts the runs.
        collected: results of runs that were made elsewhere.
        requests: runs of the token budget.
        commands: command lines that reproduce the page.
        stand_ins: runs of the time budget. Their number of steps is chosen so that training takes the reference's time.
    """

    study: StudyConfig
    runner: Runner
    collected: list[RunResult]
    requests: list[RunRequest]
    commands: list[str]
    stand_ins: list[RunRequest] = field(default_factory=list)

    def carry_out(self) -> bool:
        """Carry out the study; see `compare`."""
        if not self.study.write_only:
            self.runner.run_all(self.requests, jobs=self.study.jobs, after=self.write)
        if "seconds" in self.study.budgets and not self.pending(self.requests):
            results, _ = self.results()
            self.stand_ins = _requests_of_same_time(self.study, results, self.requests, self.runner)
            if not self.study.write_only:
                self.runner.run_all(self.stand_ins, jobs=self.study.jobs, after=self.write)
        self.write(draw=True)
        outcomes = [self.runner.outcome(request) for request in [*self.requests, *self.stand_ins]]
        return all(outcome is not None and outcome.failure is None for outcome in outcomes)

    def results(self) -> tuple[list[RunResult], list[RunOutcome]]:
        """Return (results of collected and finished runs, failed runs) for the token budget."""
        results, failed = read_outcomes(outcome for outcome in map(self.runner.outcome, self.requests) if outcome)
        return distinct(self.collected + results), failed

    def pending(self, requests: list[RunRequest]) -> int:
        """Return the number of runs that have neither finished nor failed."""
        return sum(self.runner.outcome(request) is None for request in requests)

    def write(self, *, draw: bool = False) -> None:
        """Write the page from the runs that have ended so far."""
        results, failed = self.results()
        sections = [_same_tokens(results)]
        pending = self.pending([*self.requests, *self.stand_ins])
        if "seconds" in self.study.budgets and self.requests and not self.pending(self.requests):
            replaced, also_failed = read_outcomes(outcome for outcome in map(self.runner.outcome, self.stand_ins) if outcome)
            failed += also_failed
            sections.append(_same_time(self.study, results, self.stand_ins, replaced))
        output_dir = Path(self.study.output_dir)
        page = write_comparison(output_dir, self.study, sections, failed, pending=pending, commands=self.commands, draw=draw)
        if draw:
            get_logger().info(f"page {page}")


def _same_tokens(results: list[RunResult]) -> Section:
    trained = sorted({result.summary["tokens"] for result in results if result.summary["steps"]})
    if len(trained) < 2:
        return Section("The same number of tokens", "tokens", results)
    note = f"The numbers of tokens differ: {trained[0]:,} to {trained[-1]:,}. The table of costs lists the tokens of each run."
    return Section("As configured", "tokens", results, note)


def _requests_of_same_time(study: StudyConfig, results: list[RunResult], requests: list[RunRequest], runner: Runner) -> list[RunRequest]:
    """Return the stand-ins: runs with another number of steps, for each method whose training time differs from the reference's. If a
    stand-in of a method already has a record, all seeds of the method use its number of steps, even if the measured times have changed."""
    groups = by_label(results)
    reference = groups.get(study.reference)
    found = []
    if reference is None:
        return []
    for label in study.methods:
        mine = [replace(request, budget="seconds") for request in requests if request.label == label]
        steps = next((found for found in map(runner.steps_of, mine) if found is not None), None)
        if steps is None and label in groups:
            steps = equal_time_steps(groups[label], reference, within=study.same_time_within)
        if steps is not None:
            found += [request.with_steps(steps) for request in mine]
    return found


def _same_time(study: StudyConfig, results: list[RunResult], extra: list[RunRequest], replaced: list[RunResult]) -> Section:
    """Return the section that compares runs with the reference's training time: runs of the token budget, or their stand-ins with more or
    fewer steps."""
    if not any(result.label == study.reference for result in results):
        return Section("The same time", "seconds", [])
    unlike, stand_ins = {request.label for request in extra}, {result.label for result in replaced}
    compared = [result for result in results if result.label not in unlike] + replaced
    seconds = {label: min(run.train_seconds for run in runs) for label, runs in by_label(compared).items() if runs[0].summary["steps"]}
    shares = {label: value / seconds[study.reference] for label, value in seconds.items() if label != study.reference}
    outside = [f"{label} {share:.2f}x" for label, share in shares.items() if abs(share - 1) > study.same_time_within]
    note = (
        f"Training takes the reference's time (`{study.reference}`) to within {study.same_time_within:.0%}, measured by the fastest step "
        f"of each run"
        + (f", except for {', '.join(outside)}, because the number of steps is an integer" if outside else "")
        + ". "
        + (f"Trained again with other numbers of steps: {', '.join(sorted(stand_ins))}." if stand_ins else "No method was trained again.")
        + (f" Left out, because their training is not finished: {', '.join(sorted(unlike - stand_ins))}." if unlike - stand_ins else "")
    )
    return Section("The same time", "seconds", compared, note)
