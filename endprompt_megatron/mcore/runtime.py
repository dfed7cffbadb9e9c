"""Process groups, devices and seeds: from what the launcher put into the environment to an initialised Megatron-Core."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.errors import BackendUnavailableError, ConfigError
from endprompt_megatron.log import get_logger
from endprompt_megatron.mcore import cpu, version


@dataclass(frozen=True)
class Runtime:
    """Where this process stands.

    Attributes:
        device: torch device of the model and its batches.
        rank, world_size: of this process among all.
        local_rank: of this process on its host.
    """

    device: torch.device
    rank: int
    world_size: int
    local_rank: int


def resolve_accelerator(accelerator: str) -> str:
    """ "gpu" or "cpu" for `accelerator` = auto | gpu | cpu.

    Raises:
        ConfigError: another word.
        BackendUnavailableError: gpu is asked for and there is none.
    """
    if accelerator not in ("auto", "gpu", "cpu"):
        raise ConfigError(f"accelerator={accelerator}: choose auto, gpu or cpu.")
    found = not cpu.cpu_shims_installed() and torch.cuda.is_available()
    if accelerator == "gpu" and not found:
        raise BackendUnavailableError(
            "accelerator=gpu: this experiment needs an NVIDIA GPU with a CUDA build of PyTorch, and "
            f"torch {torch.__version__} sees none here. Start it on a GPU node, check it with dry_run=true, or try the method on "
            "this machine with the default experiment (no +experiment)."
        )
    return "gpu" if found and accelerator != "cpu" else "cpu"


def select_device(accelerator: str) -> torch.device:
    """The device of this process, made the current one where it is a GPU: the rank's own, before anything touches the first.

    Args:
        accelerator: gpu | cpu, resolved.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, accelerator: str) -> str:
    """What `precision` = auto means on a resolved accelerator, bf16 or fp32: on a CPU the faster of the two (cpu_bf16_speedup). Others
    stay."""
    if precision != "auto":
        return precision
    return "bf16" if accelerator == "gpu" or cpu_bf16_speedup() > _BF16_PAYS else "fp32"


# Seen: 0.15 with AVX2 alone, 1.7 with avx512_bf16, 3 with AMX.
_BF16_PAYS = 1.2


@cache
def cpu_bf16_speedup() -> float:
    """How many times as fast this CPU multiplies bf16 matrices as float32 ones: medians of seven products each, taken in turn. A tenth of a
    second at most, once a process: instruction sets do not say it, because libraries differ in what they use of them."""
    sizes = [(512, 576), (576, 1536)]  # of a small model's layer
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    factors = {dtype: [torch.ones(size, dtype=dtype) for size in sizes] for dtype in seconds}
    for left, right in factors.values():
        left @ right  # the first product of a kind sets its kernel up
    for _ in range(7):
        for dtype, (left, right) in factors.items():
            started = time.perf_counter()
            left @ right
            seconds[dtype].append(time.perf_counter() - started)
    return median(seconds[torch.float32]) / median(seconds[torch.bfloat16])


def initialize(parallel: ParallelConfig, *, accelerator: str, seed: int, timeout_minutes: float | None = 60.0) -> Runtime:
    """Start torch.distributed and Megatron's process groups, and seed every generator.

    Args:
        parallel: sizes of the groups.
        accelerator: auto | gpu | cpu; without a GPU the shims of mcore.cpu are installed and the backend is gloo.
        seed: of the run; Megatron derives the tensor-parallel streams from it.
        timeout_minutes: after which a collective that some rank never joins fails; None waits a year.
    """
    version.assert_supported()
    kind = resolve_accelerator(accelerator)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = select_device(kind)
    if kind == "gpu":
        backend = "nccl"
    else:
        cpu.install_cpu_shims()
        cpu.keep_freed_memory()
        backend = "gloo"
    timeout = timedelta(minutes=timeout_minutes) if timeout_minutes else timedelta(days=365)
    if torch.distributed.is_initialized():
        get_logger().debug("the process group of an earlier run in this process is used again")
    elif world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = torch.distributed.HashStore()  # no port to collide on for a run of one process
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    seed_everything(seed)
    get_logger().info(
        f"megatron-core {version.megatron_core_version()}, torch {torch.__version__}, {world_size} process(es) over {backend} on "
        f"{device_name(device)}"
    )
    return Runtime(device=device, rank=rank, world_size=world_size, local_rank=local_rank)


def fuses_gradient_accumulation() -> bool:
    """Whether weight gradients can be added to Megatron's gradient buffer by the matrix product itself: with Apex's kernel on a GPU,
    with torch's on a CPU."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with its number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def agree_on_any(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on some rank; every rank takes part and gets the same answer."""
    if torch.distributed.get_world_size() == 1:
        return flag
    found = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank: what machines and file systems show to each may differ, and all must choose alike."""
    if torch.distributed.get_world_size() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel generators (which add the rank where streams must differ)."""
    pipeline_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(pipeline_seed)
    np.random.seed(pipeline_seed)
    torch.manual_seed(pipeline_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(pipeline_seed)


def shut_down(*, keep_process_group: bool = False) -> None:
    """Destroy Megatron's groups, so that another run can start in this process.

    Args:
        keep_process_group: leave torch.distributed itself up, for a next run with another layout over the same ranks.
    """
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        if not keep_process_group:
            torch.distributed.destroy_process_group()
