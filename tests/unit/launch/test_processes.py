"""Helper processes that receive stop signals while they start: Slurm signals every process of a job step."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from endprompt_megatron.launch.processes import own_multiprocessing_directory, serve_parent, sweep_multiprocessing_directories
from endprompt_megatron.output_files import owner, temporary_name
from tests.support.tiny import ROOT

# Every child gets both signals from the moment it exists until the queue is served.
PROGRAM = """
import os, signal, threading, time, psutil
from endprompt_megatron.mcore.checkpointing import _prepare_queue, filesystem_async
from endprompt_megatron.launch.processes import STOP_SIGNALS

def pester():
    while not served.is_set():
        for child in psutil.Process().children():
            for number in STOP_SIGNALS:
                child.send_signal(number)
                sent.add((child.pid, number))
        time.sleep(0.02)

if __name__ == "__main__":
    heard, sent, served = [], set(), threading.Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: heard.append(number))
    thread = threading.Thread(target=pester)
    thread.start()
    try:
        _prepare_queue()
    finally:
        served.set()
        thread.join()
    filesystem_async._results_queue.put(7)
    assert filesystem_async._results_queue.get() == 7 and len(sent) == 4, sent  # the tracker of multiprocessing, and the manager
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert heard == list(STOP_SIGNALS), "this process hears them as before"
    print("served")
"""


def test_stop_signals_before_helpers_ignore_them(tmp_path):
    program = tmp_path / "program.py"  # a file, because spawned processes import it
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout == "served\n", done.stderr[-3000:]


# A process that owns multiprocessing's directory, with a helper that has its socket there; both are killed.
OWNER = """
import multiprocessing, os, signal
from multiprocessing.managers import SyncManager
from endprompt_megatron.launch.processes import own_multiprocessing_directory, serve_parent

if __name__ == "__main__":
    own_multiprocessing_directory()
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=serve_parent)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_directory_of_killed_processes_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.run(
        [sys.executable, "-c", OWNER], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}, timeout=600
    )
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()  # one directory for both
    assert left.name.startswith("pymp-") and any(path.is_socket() for path in left.iterdir())
    alive, foreign, other_host, odd = (tmp_path / f"pymp-{name}" for name in ("alive", "foreign", "other_host", "odd"))
    for directory, text in ((alive, owner()), (other_host, "00000000.4194305"), (odd, "?")):
        directory.mkdir()
        (directory / "owner").write_text(text)
    foreign.mkdir()  # of another program: no owner
    (odd / "owner").write_bytes(b"\xff")
    (link := tmp_path / "pymp-link").symlink_to(left)
    (tmp_path / temporary_name(tmp_path / "pymp").name.replace(f".{os.getpid()}.", ".4194305.")).mkdir()  # killed before it had its name
    sweep_multiprocessing_directories()
    assert set(tmp_path.iterdir()) == {alive, foreign, other_host, odd, link}


def test_a_directory_that_is_deleted_by_halves_is_still_known(tmp_path, monkeypatch):
    """A process may be killed after it has deleted the record of the owner and before it has deleted the directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "pymp-dead").mkdir()
    (tmp_path / "pymp-dead" / "owner").write_text(owner().replace(f".{os.getpid()}", ".4194305"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: (Path(path) / "owner").unlink())
        sweep_multiprocessing_directories()
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / left.name.replace(f".{os.getpid()}.", ".4194305."))  # as another process, which then died
    sweep_multiprocessing_directories()
    assert list(tmp_path.iterdir()) == []


def _own_and_end(inherited: str) -> None:
    own_multiprocessing_directory.cache_clear()  # forked: the test process may have called it
    own_multiprocessing_directory()
    assert util.get_temp_dir() == inherited


def test_the_directory_of_a_parent_is_not_owned_and_not_swept(tmp_path, monkeypatch):
    """A run that another program starts with multiprocessing inherits its directory: the end of the run is not that of the program."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", str(tmp_path / "pymp-parent"))
    (tmp_path / "pymp-parent").mkdir()
    run = multiprocessing.get_context("fork").Process(target=_own_and_end, args=(str(tmp_path / "pymp-parent"),))
    run.start()
    run.join()
    assert run.exitcode == 0 and list((tmp_path / "pymp-parent").iterdir()) == []
    sweep_multiprocessing_directories()
    assert (tmp_path / "pymp-parent").is_dir()


def _serve_too_late(answer: Connection, parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.001)
    serve_parent()
    answer.send("lives")


def _start_helper_and_die(answer: Connection) -> None:
    multiprocessing.get_context("fork").Process(target=_serve_too_late, args=(answer, os.getpid())).start()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_helper_ends_whose_parent_was_killed_before_it_served():
    """The kernel signals the end of a parent only after it was asked to."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    run = context.Process(target=_start_helper_and_die, args=(sending,))
    run.start()
    run.join()
    sending.close()  # the helper has the last copy
    with pytest.raises(EOFError):
        receiving.recv()
