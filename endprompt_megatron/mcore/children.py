"""Processes that a run starts beside itself, and their end: they follow their parent, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from multiprocessing.managers import SyncManager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends (Linux; no effect elsewhere)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def prepare_checkpoint_queue() -> None:
    """Make the queue through which Megatron's checkpoint writers report, served by a process that ends with this one.

    Stands in for what dist_checkpointing/strategies/filesystem_async.py (megatron-core 0.16-0.19) makes on first use: a manager that
    outlives a killed rank. Can go when upstream's does not.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
