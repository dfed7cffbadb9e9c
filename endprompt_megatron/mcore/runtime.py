"""Initialise Megatron-Core (process groups, device and seeds) from the environment variables that the launcher set."""

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
    """Device and ranks of this process.

    Attributes:
        device: torch device of the model and its batches.
        rank, world_size: global rank, and number of ranks.
        local_rank: rank on this host.
    """

    device: torch.device
    rank: int
    world_size: int
    local_rank: int


def resolve_accelerator(accelerator: str) -> str:
    """ "gpu" or "cpu" for `accelerator` = auto | gpu | cpu.

    Raises:
        ConfigError: `accelerator` is none of these.
        BackendUnavailableError: `accelerator` is gpu and no GPU is available.
    """
    if accelerator not in ("auto", "gpu", "cpu"):
        raise ConfigError(f"accelerator={accelerator}: choose auto, gpu or cpu.")
    found = not cpu.cpu_shims_installed() and torch.cuda.is_available()
    if accelerator == "gpu" and not found:
        raise BackendUnavailableError(
            "accelerator=gpu: this experiment needs an NVIDIA GPU with a CUDA build of PyTorch, and "
            f"torch {torch.__version__} finds none here. Start it on a GPU node, check it with dry_run=true, or try the method on "
            "this machine with the default experiment (no +experiment)."
        )
    return "gpu" if found and accelerator != "cpu" else "cpu"


def select_device(accelerator: str) -> torch.device:
    """Return the device of this process. A GPU also becomes the current device, so that nothing allocates on GPU 0 by accident.

    Args:
        accelerator: gpu | cpu, resolved.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, accelerator: str) -> str:
    """Resolve `precision` = auto on a resolved accelerator: bf16 on a GPU, the faster of bf16 and fp32 on a CPU (cpu_bf16_speedup). Other
    values are returned unchanged."""
    if precision != "auto":
        return precision
    return "bf16" if accelerator == "gpu" or cpu_bf16_speedup() > _MIN_BF16_SPEEDUP else "fp32"


# Measured speedups: 0.15 with AVX2 alone, 1.7 with avx512_bf16, 3 with AMX.
_MIN_BF16_SPEEDUP = 1.2


@cache
def cpu_bf16_speedup() -> float:
    """Speedup of bf16 over float32 matrix products on this CPU: the ratio of the medians of seven alternating products each. Takes at most
    a tenth of a second, once per process. The CPU's instruction set does not determine it, because libraries use different parts of it."""
    sizes = [(512, 576), (576, 1536)]  # matrices of a small model's layer
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    factors = {dtype: [torch.ones(size, dtype=dtype) for size in sizes] for dtype in seconds}
    for left, right in factors.values():
        left @ right  # warm-up: the first product initialises its kernel
    for _ in range(7):
        for dtype, (left, right) in factors.items():
            started = time.perf_counter()
            left @ right
            seconds[dtype].append(time.perf_counter() - started)
    return median(seconds[torch.float32]) / median(seconds[torch.bfloat16])


def initialize(parallel: ParallelConfig, *, accelerator: str, seed: int, timeout_minutes: float | None = 60.0) -> Runtime:
    """Start torch.distributed and Megatron's process groups, and seed all random generators.

    Args:
        parallel: sizes of the groups.
        accelerator: auto | gpu | cpu; without a GPU the shims of mcore.cpu are installed and the backend is gloo.
        seed: seed of the run; Megatron derives the tensor-parallel streams from it.
        timeout_minutes: timeout of collectives; None means a year.
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
        get_logger().debug("reusing the process group of an earlier run in this process")
    elif world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = torch.distributed.HashStore()  # a run of one process needs no port, and so cannot collide with another run
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
    """Whether the weight-gradient GEMM can accumulate directly into Megatron's gradient buffer: with Apex's kernel on a GPU, with the shim
    of mcore.cpu on a CPU."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with the number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def agree_on_any(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank. Collective; all ranks return the same value."""
    if torch.distributed.get_world_size() == 1:
        return flag
    found = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def from_rank_zero(value: Any) -> Any:
    """Broadcast rank 0's value to all ranks: hosts and file systems may give each rank another value, and all ranks must decide alike."""
    if torch.distributed.get_world_size() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel generators (Megatron adds the rank if streams must differ)."""
    pipeline_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(pipeline_seed)
    np.random.seed(pipeline_seed)
    torch.manual_seed(pipeline_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(pipeline_seed)


def shut_down(*, keep_process_group: bool = False) -> None:
    """Destroy Megatron's process groups, so that another run can start in this process.

    Args:
        keep_process_group: keep torch.distributed initialised, for a following run with another layout over the same ranks.
    """
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        if not keep_process_group:
            torch.distributed.destroy_process_group()
