"""Kill a run at the n-th time that it reaches a named moment, independent of timing, and count how often it reaches each.

A moment is the call of a function of ours, or an operation on files that Python reports to audit hooks, whichever library does it. Only the
main thread of the process counts: what other threads do depends on time.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from endprompt_megatron import log
from endprompt_megatron.checkpoint.hf import exporter, sources
from endprompt_megatron.data import index_cache, manifest, preprocess, texts
from endprompt_megatron.evaluation.probes import results
from endprompt_megatron.jobs import extend
from endprompt_megatron.mcore import runtime
from endprompt_megatron.report.figures import run as run_figures
from tests.support import signal_worker

# name -> (object, name of its function, whether the kill comes before the call or after it)
CALLS: dict[str, tuple[Any, str, bool]] = {
    **signal_worker.POINTS,
    "before a text is written": (texts, "_write", True),
    "after a text is written": (texts, "_write", False),
    "before the base model's tokenizer": (sources, "_train_tokenizer", True),
    "before a document is tokenised": (IndexedDatasetBuilder, "add_document", True),
    "before a dataset's index": (IndexedDatasetBuilder, "finalize", True),
    "before a manifest": (manifest, "_write", True),
    "before renaming a dataset": (preprocess, "rename_dataset", True),
    "before keeping the index arrays": (index_cache, "_keep", True),
    "before a record": (log.MetricsWriter, "write", True),
    "after a record": (log.MetricsWriter, "write", False),
    "before a probe": (results, "_measure", True),
    "after a probe": (results, "_measure", False),
    "before keeping a probe": (results, "_keep", True),
    "before writing the export": (exporter, "write_shard", True),
    "after writing the export": (exporter, "write_shard", False),
    "before verifying the export": (extend, "verify_export", True),
    "before moving the export": (exporter, "_move_into_place", True),
    "after moving the export": (exporter, "_move_into_place", False),
    "before the summary": (extend, "_write_results", True),
    "before the report": (extend, "write_report", True),
    "before the model card": (extend, "_write_model_card", True),
    "before an fsync": (os, "fsync", True),
}  # fmt: skip
# audit event -> name; the hook runs before the operation
OPERATIONS = {
    "os.rename": "before a rename", "os.remove": "before a file is deleted", "os.rmdir": "before a directory is deleted",
    "os.mkdir": "before a directory is made",
}  # fmt: skip
CREATE, HALF_FILE, HALF_RECORD = "before a file is opened to write", "in the middle of a file", "in the middle of a record"


def read_counts(file: Path) -> Counter[str]:
    """{moment: how often it was reached}, of a file that `arm` was told to write."""
    return Counter(file.read_text().splitlines())


def arm(place: Path, scratch: Path, counts: Path | None = None, kill: tuple[str, int] | None = None) -> None:
    """Prepare this process, which is to be a recipe, to be killed.

    Args:
        place: directory of the run; files elsewhere are not counted as opened to write.
        scratch: the system's temporary directory as the run shall see it.
        counts: file to which each moment is appended.
        kill: (moment, n): it gets SIGKILL at the n-th of these; None lets it live.
    """
    os.setsid()  # `processes_of` finds what it leaves behind
    # most of the time of so short a run, for nothing that is compared
    runtime.cpu_bf16_speedup = lambda: 1.0
    run_figures.write_figure = _no_pixels
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    seen: Counter[str] = Counter()
    descriptor = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if counts else None
    process, writing = os.getpid(), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def reach(moment: str, last: Callable[[], object] = lambda: None) -> None:
        """Count a moment; `last` is what the process still does if it dies there."""
        if os.getpid() != process or threading.current_thread() is not threading.main_thread():
            return
        seen[moment] += 1
        if descriptor is not None:
            os.write(descriptor, f"{moment}\n".encode())
        if kill is not None and (moment, seen[moment]) == kill:
            last()
            os.kill(process, signal.SIGKILL)

    for moment, (owner, name, before) in CALLS.items():
        _hook(owner, name, moment, before, reach)
    _hook_halves(reach)

    def operated(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            reach(OPERATIONS[event])
        elif event == "open" and arguments[2] & writing and str(arguments[0]).startswith((str(place), str(scratch))):
            reach(CREATE)

    sys.addaudithook(operated)


def _no_pixels(figure: Any, path: Path) -> Path:
    plt.close(figure)
    path.write_bytes(b"")
    return path


def _hook(owner: Any, name: str, moment: str, before: bool, reach: Callable[[str], None]) -> None:
    original = getattr(owner, name)

    def hooked(*arguments: Any, **options: Any) -> Any:
        if before:
            reach(moment)
        result = original(*arguments, **options)
        if not before:
            reach(moment)
        return result

    setattr(owner, name, hooked)


def _hook_halves(reach: Callable[..., None]) -> None:
    """A process that dies while it writes leaves the first half."""
    write_text, write_bytes, write = Path.write_text, Path.write_bytes, log.MetricsWriter.write

    def written(path: Path, text: str, **options: Any) -> int:
        reach(HALF_FILE, lambda: write_text(path, text[: len(text) // 2], **options))
        return write_text(path, text, **options)

    def written_bytes(path: Path, data: bytes) -> int:
        reach(HALF_FILE, lambda: write_bytes(path, data[: len(data) // 2]))
        return write_bytes(path, data)

    def recorded(writer: log.MetricsWriter, step: int, metrics: dict[str, Any]) -> None:
        reach(HALF_RECORD, lambda: os.write(writer._file.fileno(), f'{{"step": {step}, "lo'.encode()))
        write(writer, step, metrics)

    Path.write_text, Path.write_bytes = written, written_bytes  # type: ignore[method-assign,assignment]
    log.MetricsWriter.write = recorded  # type: ignore[method-assign]


def processes_of(session: int) -> list[int]:
    """Ids of the processes of a session that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(of_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found
