"""Execute the runs of a study, each in its own process. Finished runs are kept. Failed runs are recorded with a reason, and the next start
repeats them. A stop signal is forwarded to the active runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from endprompt_megatron.comparison.study import RunRequest
from endprompt_megatron.errors import EXIT_RESUME, ConfigError, RunInterrupted
from endprompt_megatron.launch.processes import STOP_SIGNALS, end_with_parent
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import read_or_set_aside, replace_text, writing

_RECORD_SUFFIX = ".run.json"
_POLL_SECONDS = 0.1
_WEIGHTS = {"evaluation": ("checkpoints", "hf", "adapter"), "model": ("checkpoints",), "all": ()}


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a run.

    Attributes:
        request: request of the run.
        directory: output directory of the run.
        failure: error message; None if the run has finished.
    """

    request: RunRequest
    directory: Path
    failure: str | None


@dataclass(frozen=True)
class _Running:
    request: RunRequest
    process: subprocess.Popen
    log: Path
    log_offset: int  # bytes of the log written by earlier attempts
    note: str
    started: float


class Runner:
    """Executes requests, one or several at a time.

    Args:
        command: command that starts recipes/extend.py; overrides are appended to it.
        directory: parent of the runs' output directories, logs and records.
        keep: evaluation | model | all (StudyConfig.keep); determines what is deleted after a run has finished.
        fault_of: function of an output directory that returns why its results cannot be read, or None.
    """

    def __init__(self, command: list[str], directory: Path, *, keep: str, fault_of: Callable[[Path], str | None]):
        self.command, self.directory, self.keep, self.fault_of = command, Path(directory), keep, fault_of

    def check(self, requests: list[RunRequest]) -> None:
        """Check that existing runs were made with the overrides of these requests.

        Raises:
            ConfigError: lists every run that was made with other overrides.
        """
        problems = []
        for request in requests:
            stored = self._record(request)
            was, now = sorted((stored or {}).get("overrides") or request.overrides), sorted(request.overrides)
            if was != now:  # order only matters for a key that occurs twice
                changed = sorted(set(was) ^ set(now)) or ["how often a key occurs"]
                problems.append(
                    f"{self.directory / request.name} was made with other overrides (differing: {', '.join(changed)}). Choose another "
                    f"output_dir for the study, give the variant a label of its own, or remove that folder and its {_RECORD_SUFFIX}."
                )
        if problems:
            raise ConfigError(*problems)

    def outcome(self, request: RunRequest) -> RunOutcome | None:
        """Return the outcome of a run, or None if the run has not been started or was interrupted."""
        stored = self._record(request)
        if not stored or stored["status"] == "started":
            return None
        directory = self.directory / request.name
        return RunOutcome(request, directory, stored.get("failure") or self.fault_of(directory))

    def steps_of(self, request: RunRequest) -> int | None:
        """Return trainer.max_steps of an existing run, or None if the run was never started or does not override it."""
        stored = self._record(request)
        return RunRequest.steps_in(stored.get("overrides") or []) if stored else None

    def run_all(self, requests: list[RunRequest], *, jobs: int, after: Callable[[], None]) -> None:
        """Run every request that has not finished, including those that failed before.

        Args:
            jobs: number of parallel runs.
            after: function that is called after every run.
        Raises:
            OutputError: a record or a log cannot be written.
            RunInterrupted: a stop signal arrived. It was forwarded to the active runs, which the next start resumes.
        """
        waiting = []
        for request in requests:
            found = self.outcome(request)
            if found is None or found.failure is not None:
                waiting.append(request)
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        count = len(waiting)
        running: list[_Running] = []
        received: list[int] = []

        def forward(number: int, frame: object) -> None:
            """Forward a stop signal to the active runs."""
            received.append(number)
            for run in running:
                with suppress(ProcessLookupError):
                    run.process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
        try:
            while running or (waiting and not received):
                while waiting and len(running) < jobs and not received:
                    running.append(self._start(waiting.pop(0), f"run {count - len(waiting)} of {count}"))
                time.sleep(_POLL_SECONDS)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    self._finish(run, stopped=bool(received))
                    try:
                        after()
                    except OSError as error:  # a page that cannot be written must not stop the remaining runs
                        get_logger().warning(f"the page could not be written: {error}")
        except KeyboardInterrupt:  # the terminal has sent the interrupt to the runs as well
            for run in running:
                run.process.wait()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if received:
            name = signal.Signals(received[0]).name
            raise RunInterrupted(f"stopped by {name}; start the same command again to resume")

    def _start(self, request: RunRequest, note: str) -> _Running:
        directory = self.directory / request.name
        log = self.directory / f"{request.name}.log"
        get_logger().info(f"{note}: {request.name} (log {log})")
        self._write_record(request, status="started")
        arguments = [*self.command, *request.overrides, f"seed={request.seed}", f"output_dir={_quoted(directory)}", f"name={request.name}"]
        log_offset = log.stat().st_size if log.is_file() else 0
        with writing(log):
            stream = log.open("a")
        with stream:
            end_with_this = partial(end_with_parent, os.getpid())
            process = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=end_with_this)
        return _Running(request, process, log, log_offset, note, time.monotonic())

    def _finish(self, run: _Running, *, stopped: bool) -> None:
        directory, status = self.directory / run.request.name, run.process.returncode
        if status == EXIT_RESUME or (stopped and -status in STOP_SIGNALS):
            return  # the record keeps the status "started"
        failure = f"exit status {status}: {_error_line(run)}" if status else self.fault_of(directory)
        self._write_record(run.request, status="failed" if failure else "finished", failure=failure)
        get_logger().info(f"{run.note}: {run.request.name} {failure or 'finished'} after {time.monotonic() - run.started:.0f} s")
        if not failure:
            self._drop_weights(directory)

    def _drop_weights(self, directory: Path) -> None:
        for name in _WEIGHTS[self.keep]:
            shutil.rmtree(directory / name, ignore_errors=True)

    def _record_path(self, request: RunRequest) -> Path:
        return self.directory / f"{request.name}{_RECORD_SUFFIX}"

    def _record(self, request: RunRequest) -> dict[str, Any] | None:
        """Return the record of a run, or None if there is no record. A run whose record is damaged counts as interrupted. The next start
        resumes it from its checkpoint, and the run itself checks that its config has not changed."""
        path = self._record_path(request)
        if not path.exists():
            return None
        return read_or_set_aside(path, is_valid=_is_record, consequence="the run is started again and resumes") or {"status": "started"}

    def _write_record(self, request: RunRequest, **values: Any) -> None:
        replace_text(self._record_path(request), json.dumps({"overrides": list(request.overrides), **values}, indent=2) + "\n")


def _is_record(stored: dict[str, Any]) -> bool:
    overrides = stored.get("overrides") or []
    return isinstance(stored["status"], str) and isinstance(overrides, list) and all(isinstance(one, str) for one in overrides)


def _quoted(path: Path) -> str:
    """Return a path as the value of an override. Hydra's grammar accepts most characters only in quotes."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _error_line(run: _Running) -> str:
    """Return the last line of a run's log that names an error, or the last line if no line does."""
    text = run.log.read_bytes()[run.log_offset :].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]]
    return (named or lines or ["no output"])[-1][:300]
