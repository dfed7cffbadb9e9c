"""A job of any size on one process and without a device: torch.distributed's `fake` backend, whose collectives do nothing, Megatron's
process groups on top of it, and weights on `meta`, which have a shape and no memory. What a cluster would be told can so be checked on a
laptop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from torch.overrides import TorchFunctionMode

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import version

_META = torch.device("meta")


@dataclass(frozen=True)
class RankGroups:
    """The process groups that one rank is in, each as the global ranks of its members.

    Attributes:
        rank: whose groups they are.
        tensor, pipeline, context, data: one dimension of the layout each.
        optimizer: data and context parallel ranks together, over which gradients are summed and the distributed optimizer is cut.
        model: ranks that hold one copy of the model, each a part of it (context parallel ranks repeat them).
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
    """Inside the block this process is one rank of a job of `world_size`, with every process group of Megatron. Afterwards there is no
    group left, and a real run may start.

    Args:
        parallel: sizes of the groups.
        world_size: ranks of the job.
        rank: which of them this process plays.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

    version.assert_supported()
    if torch.distributed.is_initialized():
        raise AssertionError("a process group is up: a job is planned before it starts, not in its midst")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
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


def groups_of_rank(parallel: ParallelConfig, *, world_size: int, rank: int) -> RankGroups:
    """The groups of one rank of a job, as Megatron makes them."""
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
    """Inside the block every tensor that would be made on a GPU, or on no device in particular, is made on `meta`, and Megatron's
    initialisation draws nothing. Stands in for a CUDA device in tensor_parallel/layers.py (megatron-core 0.16-0.19), which asks for the
    current one and for its generator; can go when the `init_model_with_meta_device` of its configuration reaches these layers."""
    with (
        _replaced(torch.cuda, "current_device", lambda: _META),
        _replaced(layers, "get_cuda_rng_tracker", _DrawsNothing),
        _META,
        _CudaMeansMeta(),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _DrawsNothing:
    """Stands in for the tracker of CUDA's generators."""

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        """As the tracker's, without a state to save."""
        yield


class _CudaMeansMeta(TorchFunctionMode):
    """Stands in for a GPU where tensors are moved with .cuda(), made with device="cuda" or drawn from a CPU's generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(_META)
        if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _META
        if func is torch.Tensor.uniform_:
            return args[0]
        return func(*args, **kwargs)
