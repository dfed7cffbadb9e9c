"""Simulate one rank of a job of any size in one process without a GPU, so that the layout of a cluster can be checked on a laptop. The
simulation creates Megatron's process groups on torch.distributed's `fake` backend, whose collectives do nothing. Weights are on the `meta`
device, which stores shapes and no data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from torch.overrides import TorchFunctionMode

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import version
from endprompt_megatron.mcore.patching import replaced

_META = torch.device("meta")


@dataclass(frozen=True)
class RankGroups:
    """The process groups of one rank, each as the global ranks of its members.

    Attributes:
        rank: global rank that belongs to these groups.
        tensor, pipeline, context, data: group of each parallel dimension.
        optimizer: data-parallel and context-parallel ranks together. Gradients are reduced and the distributed optimizer is sharded over
            this group.
        model: tensor-parallel and pipeline-parallel ranks that together hold one copy of the model. Other context-parallel ranks hold other
            copies.
    """

    rank: int
    tensor: tuple[int, ...]
    pipeline: tuple[int, ...]
    context: tuple[int, ...]
    data: tuple[int, ...]
    optimizer: tuple[int, ...]
    model: tuple[int, ...]


@contextlib.contextmanager
def fake_job(parallel: ParallelConfig, *, world_size: int, rank: int) -> Iterator[None]:
    """Make this process one rank of a fake job of `world_size` ranks inside the block, with all process groups of Megatron. All groups are
    destroyed at the end of the block, so that a real run can start.

    Args:
        parallel: sizes of the groups.
        world_size: number of ranks of the job.
        rank: rank that this process simulates.
    Raises:
        AssertionError: a process group is already initialised.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # this import registers the backend

    version.assert_supported()
    if torch.distributed.is_initialized():
        raise AssertionError("a process group is already initialized: a fake job must run before the real one starts")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with replaced(parallel_state, "generate_masked_orthogonal_rank_groups", _rank_groups):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
                create_gloo_process_groups=False,
            )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


_generate_rank_groups = parallel_state.generate_masked_orthogonal_rank_groups


@functools.lru_cache
def _cached_rank_groups(world_size: int, parallel_size: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
    return _generate_rank_groups(world_size, list(parallel_size), list(mask))


def _rank_groups(world_size: int, parallel_size: list[int], mask: list[bool]) -> list[list[int]]:
    """Return the same as generate_masked_orthogonal_rank_groups (parallel_state.py, megatron-core 0.16-0.19), and cache the result.
    Megatron's function computes the groups again for every fake rank, which takes a second per rank for a job of 4,096 ranks."""
    return [list(group) for group in _cached_rank_groups(world_size, tuple(parallel_size), tuple(mask))]


def groups_of_rank(parallel: ParallelConfig, *, world_size: int, rank: int) -> RankGroups:
    """Return the process groups that Megatron creates for one rank of a job."""
    with fake_job(parallel, world_size=world_size, rank=rank):
        groups = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
            "optimizer": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "model": parallel_state.get_model_parallel_group(),
        }
        return RankGroups(rank, **{name: tuple(torch.distributed.get_process_group_ranks(group)) for name, group in groups.items()})


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Create tensors with device "cuda" or without a device on `meta` inside the block. Megatron's weight initialisation draws no random
    numbers inside the block. This function replaces torch.cuda.current_device() and get_cuda_rng_tracker(), which tensor_parallel/layers.py
    (megatron-core 0.16-0.19) calls. Remove this function when `init_model_with_meta_device` of TransformerConfig covers these layers."""
    with (
        replaced(torch.cuda, "current_device", lambda: _META),
        replaced(layers, "get_cuda_rng_tracker", _NoRngTracker),
        _META,
        _CudaMeansMeta(),
    ):
        yield


class _NoRngTracker:
    """Replaces Megatron's CUDA RNG tracker."""

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        """Yield without saving or restoring a random state."""
        yield


class _CudaMeansMeta(TorchFunctionMode):
    """Maps the device "cuda" to `meta` (.cuda() and device="cuda"). Makes uniform_() a no-op, because it draws from a CPU generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(_META)
        if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _META
        if func is torch.Tensor.uniform_:
            return args[0]
        if func is torch.arange:  # on meta, torch.arange runs in Python and imports TorchDynamo, which takes a second
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
