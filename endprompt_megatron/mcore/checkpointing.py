"""Save and load checkpoints with megatron.core.dist_checkpointing. The functions take the same arguments for every supported version of
megatron-core. Loading unpickles only the classes that unpickling.py lists."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.launch.processes import block_stop_signals, own_multiprocessing_directory, serve_parent
from endprompt_megatron.mcore.patching import replaced
from endprompt_megatron.mcore.unpickling import load_archive


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


def load_sharded(sharded_state: dict[str, Any], directory: Path, metadata: Metadata) -> dict[str, Any]:
    """Load a sharded state. All ranks must call this function. Only the classes that mcore.unpickling lists are unpickled.

    Args:
        sharded_state: Megatron's sharded tensors and objects to load.
        directory: torch_dist directory.
        metadata: content of `.metadata` from mcore.unpickling.read_metadata.
    Returns:
        The state with loaded tensors and objects, and the content of common.pt.
    Raises:
        CheckpointError: a file of the directory names a class or function that is not listed.
        Exception, CheckpointException: the checkpoint is damaged in another way. Megatron and torch raise exceptions of many classes.
    """
    try:
        with _restricted_loading(Path(directory), metadata):
            return dist_checkpointing.load(sharded_state, str(directory))
    except CheckpointException as error:  # torch collects the exceptions of all ranks
        for failure, _ in error.failures.values():
            if isinstance(failure, CheckpointError):
                raise failure from error
        raise


@contextlib.contextmanager
def _restricted_loading(directory: Path, metadata: Metadata) -> Iterator[None]:
    """Make the loaders of Megatron and torch unpickle with mcore.unpickling inside the block.

    The function replaces FileSystemReader.read_metadata, which calls pickle.load (torch 2.9-2.13, distributed/checkpoint/filesystem.py),
    and torch.load. DefaultLoadPlanner.load_bytes calls torch.load with weights_only=False (distributed/checkpoint/default_planner.py), and
    Megatron calls torch.load for common.pt (megatron-core 0.16-0.19, dist_checkpointing/strategies/common.py). NVIDIA's storage client,
    which has its own loaders, is disabled. Remove this function when upstream restricts all three calls.
    """

    def metadata_of(reader: FileSystemReader) -> Metadata:
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    def load_archive_of(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        opened = getattr(file, "base_stream", file)  # torch passes a view of one archive in a .distcp file
        return load_archive(file, where=getattr(opened, "name", opened), map_location=map_location)

    original = DefaultLoadPlanner.load_bytes

    def load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: Any) -> None:
        file = planner.metadata.storage_data[read_item.storage_index].relative_path
        value.name = f"{directory / file}, object {read_item.storage_index.fqn},"  # for an error message
        original(planner, read_item, value)

    with (
        replaced(FileSystemReader, "read_metadata", metadata_of),
        replaced(DefaultLoadPlanner, "load_bytes", load_bytes),
        replaced(torch, "load", load_archive_of),
        replaced(MultiStorageClientFeature, "_enabled", False),
    ):
        yield


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
