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
    """Resolve `accelerator` = auto | gpu | cpu to "gpu" or "cpu". The value auto becomes "gpu" if a GPU is available.

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
            f"torch {torch.__version__} finds no GPU here. Start the experiment on a GPU node, check it with dry_run=true, or try the "
            "method on this machine with the default experiment (no +experiment)."
        )
    return "gpu" if found and accelerator != "cpu" else "cpu"


def select_device(accelerator: str) -> torch.device:
    """Return the device of this process. A GPU also becomes torch's current device, because torch allocates on GPU 0 by default.

    Args:
        accelerator: gpu | cpu.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, accelerator: str) -> str:
    """Resolve `precision` = auto. The result is bf16 on a GPU. On a CPU it is bf16 if cpu_bf16_speedup exceeds 1.2, else fp32. Other values
    are returned unchanged."""
    if precision != "auto":
        return precision
    return "bf16" if accelerator == "gpu" or cpu_bf16_speedup() > _MIN_BF16_SPEEDUP else "fp32"


# Measured speedups: 0.15 with AVX2 alone, 1.7 with avx512_bf16, 3 with AMX.
_MIN_BF16_SPEEDUP = 1.2


@cache
def cpu_bf16_speedup() -> float:
    """Measure the speedup of bf16 over float32 matrix products on this CPU. Seven products of each dtype run alternately. The speedup is
    the median time with float32 divided by the median time with bf16. The measurement takes at most a tenth of a second, once per
    process. The speedup is measured and not derived from the instruction set, because libraries may not use all instructions of the CPU."""
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
        accelerator: auto | gpu | cpu. On the CPU, this function installs the shims of mcore.cpu and uses gloo.
        seed: seed of the run. Megatron derives the tensor-parallel random streams from this seed.
        timeout_minutes: timeout of collectives. None and 0 mean a year.
    Raises:
        ConfigError: `accelerator` is none of the three values.
        BackendUnavailableError: no GPU is available but required, or the megatron-core version is unsupported.
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
        store = torch.distributed.HashStore()  # needs no port, so two runs on one host cannot collide
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
    """Return whether the weight-gradient GEMM can accumulate directly into Megatron's gradient buffer. This needs Apex's kernel on a GPU
    and the shim of mcore.cpu on a CPU."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "CPU" with the number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def agree_on_any(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is True on any rank. All ranks must call this function, and all get the same result."""
    if torch.distributed.get_world_size() == 1:
        return flag
    found = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def from_rank_zero(value: Any) -> Any:
    """Broadcast rank 0's value to all ranks and return it. Ranks on other hosts or file systems may have other values, but all ranks must
    take the same decision. All ranks must call this function."""
    if torch.distributed.get_world_size() == 1:
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel generators. Each pipeline stage gets another seed. Megatron adds the
    tensor-parallel rank to the seed of streams that must differ between tensor-parallel ranks."""
    pipeline_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(pipeline_seed)
    np.random.seed(pipeline_seed)
    torch.manual_seed(pipeline_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(pipeline_seed)


def shut_down(*, keep_process_group: bool = False) -> None:
    """Destroy the process groups of Megatron and torch.distributed, so that another run can start in this process.

    Args:
        keep_process_group: whether torch.distributed stays initialised for another run on the same ranks, possibly with another layout.
    """
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        if not keep_process_group:
            torch.distributed.destroy_process_group()
