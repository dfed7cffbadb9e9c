"""Call megatron.core.dist_checkpointing.save with the same arguments in every supported version of megatron-core."""

from __future__ import annotations

import inspect
import multiprocessing
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from endprompt_megatron.launch.processes import block_stop_signals, own_multiprocessing_directory, serve_parent


def begin_save(sharded_state: dict[str, Any], directory: str, *, asynchronous: bool) -> Any:
    """Write a sharded state. All ranks must call this function.

    Args:
        sharded_state: Megatron's sharded tensors and objects.
        directory: empty directory to write to.
        asynchronous: if True, return a request for AsyncCallsQueue instead of writing during the call.
    Returns:
        Megatron's AsyncRequest if `asynchronous` is True, else None.
    """
    _prepare_queue()
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19 defaults to nvidia-resiliency-ext
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(sharded_state, directory, async_sharded_save=asynchronous, **options)


def _prepare_queue() -> None:
    """Create the queue on which Megatron's writer processes report their results. Its manager process ends when this process ends.

    This manager replaces the one that dist_checkpointing/strategies/filesystem_async.py (megatron-core 0.16-0.19) starts on first use.
    Megatron's manager keeps running after its rank is killed. A stop signal (SIGTERM, SIGUSR1) kills it while its rank still needs it to
    save a checkpoint. Remove this function when upstream fixes both problems.
    """
    if filesystem_async._results_queue is None:
        own_multiprocessing_directory()
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with block_stop_signals():
            manager.start(initializer=serve_parent)
        filesystem_async._results_queue = manager.Queue()
