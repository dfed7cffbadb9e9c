"""Logging of a run. The module contains a logger that prints on rank 0 only, a writer for metrics.jsonl and TensorBoard, and a progress
display, which is a live bar on a terminal and plain lines in log files and CI."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from endprompt_megatron.errors import DamagedFileError
from endprompt_megatron.output_files import check_not_moved, damaged_name, make_directory, replace_bytes, replace_text, set_aside, writing

T = TypeVar("T")
_RECORD_START = b'{"step": '


def global_rank() -> int:
    """Return the rank of this process as set by the launcher, or 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return global_rank() == 0 or record.levelno >= logging.ERROR


class _ToStandardError(logging.StreamHandler):
    """Writes to the current sys.stderr. It looks sys.stderr up for every message, because other code may redirect sys.stderr temporarily
    to a file that is closed later."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def get_logger() -> logging.Logger:
    """Return the project's logger. It writes to standard error. Ranks other than 0 write only messages of level ERROR and above."""
    logger = logging.getLogger("endprompt_megatron")
    if not logger.handlers:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(_RankZero())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class MetricsWriter:
    """Appends one JSON object per line to `metrics.jsonl` and writes its numbers to TensorBoard, on rank 0 only.

    A damaged line of an earlier start is moved to `metrics.jsonl.damaged`, and a warning states its number. All other lines stay.

    Args:
        output_dir: output directory of the run, which contains `metrics.jsonl` and `tensorboard/`.
        resume_step: step from which the run resumes. Records of later steps, which an interrupted run left, are removed, so that each step
            occurs once.
    """

    def __init__(self, output_dir: Path, *, resume_step: int = 0):
        self.path = Path(output_dir) / "metrics.jsonl"
        self._file: io.FileIO | None = None
        self._tensorboard: _TensorBoard | None = None
        self._kept: list[dict[str, Any]] = []
        if global_rank() != 0:
            return
        records, damaged = _metrics_lines(self._readable())
        if damaged:
            self._set_aside(damaged)
        if resume_step and not records:
            get_logger().warning(f"{self.path} holds no record of the {resume_step} steps before this start")
        # keep only the last record of each step and kind: earlier releases wrote validation losses twice after a resume
        self._kept = list({(record["step"], *record): record for record in records if record["step"] <= resume_step}.values())
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in self._kept))
        with writing(self.path):
            self._file = self.path.open("ab", buffering=0)
        self._tensorboard = _TensorBoard(Path(output_dir) / "tensorboard", purge_step=resume_step + 1)

    def _readable(self) -> bytes:
        """Return the content of the file. Rename a file that cannot be read and return b""."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            set_aside(self.path, f"cannot be read ({error})", consequence="the new file begins with this start")
            return b""

    def _set_aside(self, damaged: dict[int, bytes]) -> None:
        aside = damaged_name(self.path)
        replace_bytes(aside, b"".join(line + b"\n" for line in damaged.values()))
        numbers = ", ".join(map(str, damaged))
        get_logger().warning(f"{self.path}: line {numbers} is damaged. It was moved to {aside.name}; all other lines stay.")

    def has(self, step: int, key: str) -> bool:
        """Return whether an earlier start wrote a record of this step with this key. Ranks other than 0 always return False."""
        return any(record["step"] == step and key in record for record in self._kept)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append `metrics` for `step`.

        Raises:
            OutputError: one of the files cannot be written.
            CheckpointError: the output directory was renamed. Without this check, the records would go to the open file in the renamed
                directory.
        """
        if self._file is None or self._tensorboard is None:
            return
        check_not_moved(self.path.parent)
        with writing(self.path):
            _write_all(self._file, (json.dumps({"step": step, **metrics}) + "\n").encode())
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self._tensorboard.add_scalars(step, numbers)

    def close(self) -> None:
        """Close both files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()
        self._file = self._tensorboard = None


class _TensorBoard:
    """Writes scalars to a TensorBoard event file.

    torch's SummaryWriter is not used, because it writes in a thread: if the disk is full, only a later call raises the error, or no call.

    Args:
        directory: directory of the event file, created if necessary.
        purge_step: first step of this file. TensorBoard hides values of this and later steps in earlier files of the directory.
    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, directory: Path, *, purge_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2  # only rank 0 needs them
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard reads the files of a directory in the order of their names
        self.path = directory / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        make_directory(directory)
        with writing(self.path):
            self._file = self.path.open("ab", buffering=0)
        self._record = io.BytesIO()
        self._writer = RecordWriter(self._record)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add_scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        with writing(self.path):
            _write_all(self._file, self._record.getvalue())
        self._record.seek(0)
        self._record.truncate()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file. Closing the file then writes nothing."""
    while data:
        data = data[file.write(data) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, or an empty list if the file is missing. Damaged lines are skipped; the next start of the run
    moves them to another file.

    Raises:
        DamagedFileError: the path is a directory or cannot be read.
    """
    path = Path(path)
    try:
        return _metrics_lines(path.read_bytes())[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read ({error})", "Move it away and start the run's command again.") from error


def _metrics_lines(content: bytes) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return (records, {line number from 1: damaged line}). Neither contains an unfinished last line, which a crash leaves."""
    records, damaged = [], {}
    *lines, last = content.split(b"\n")
    for number, line in enumerate([*lines, last], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("no record of a step")
            records.append(record)
        except (ValueError, RecursionError):
            is_of_crash = number > len(lines) and _RECORD_START.startswith(line[: len(_RECORD_START)])
            if line.strip() and not is_of_crash:
                damaged[number] = line
    return records, damaged


class Progress:
    """Displays the progress of a job: a live bar on a terminal, plain lines at intervals elsewhere.

    Use as a context manager and call `advance(n, "loss 2.31")`.

    Args:
        label: name of the activity, e.g. "training".
        total: number of units, or None if unknown.
        initial: number of units that an earlier start completed.
        seconds_between_lines: interval between plain lines, in seconds.
    """

    def __init__(self, label: str, total: int | None, *, initial: int = 0, seconds_between_lines: float = 15.0):
        self.label, self.total, self.done, self.initial = label, total, initial, initial
        self._every = seconds_between_lines
        self._started = self._last = time.monotonic()
        self._bar: Any = None  # a rich Progress on a terminal
        self._silent = global_rank() != 0

    def __enter__(self) -> Progress:
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total}" if self.total else "{task.completed:.0f}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Add `units` to the completed units and show `note` next to the bar."""
        self.done += units
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self._every or (self.total is not None and self.done >= self.total):
            self._last = now
            rate = (self.done - self.initial) / max(now - self._started, 1e-9)
            of_total = f"/{self.total}" if self.total else ""
            left = f", {_clock((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
            get_logger().info(f"{self.label}: {self.done}{of_total}{left}{'  ' + note if note else ''}")

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and display the progress."""
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
