"""Helper processes that receive stop signals while they start: Slurm signals every process of a job step."""

from __future__ import annotations

import os
import subprocess
import sys

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
