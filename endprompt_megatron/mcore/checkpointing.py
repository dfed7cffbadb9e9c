"""The save of megatron.core.dist_checkpointing, the same in every supported version."""

from __future__ import annotations

import inspect
import multiprocessing
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from endprompt_megatron.launch.processes import serve_parent, starting_helpers


def begin_save(sharded_state: dict[str, Any], directory: str, *, asynchronous: bool) -> Any:
    """Write a sharded state; every rank takes part.

    Args:
        sharded_state: of Megatron's sharded tensors and objects.
        directory: empty.
        asynchronous: return the work as a request for AsyncCallsQueue instead of doing it.
    Returns:
        Megatron's AsyncRequest, or None.
    """
    _prepare_queue()
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19 asks for nvidia-resiliency-ext otherwise
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(sharded_state, directory, async_sharded_save=asynchronous, **options)


def _prepare_queue() -> None:
    """The queue through which Megatron's writers report, served by a process that lives as long as this one. Stands in for what
    dist_checkpointing/strategies/filesystem_async.py (megatron-core 0.16-0.19) makes on first use: a manager that outlives a killed
    rank, and dies of the signal that only asks the rank to stop. Can go when upstream's does not."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with starting_helpers():
            manager.start(initializer=serve_parent)
        filesystem_async._results_queue = manager.Queue()
