"""Shims that run Megatron-Core on a host without a GPU. The schedules, optimizer and random-number code of Megatron-Core hard-code the
device "cuda". With the shims, the same code runs on the CPU over gloo. A run installs the shims only if it uses the CPU. The docstring of
each shim names the upstream code that it replaces (megatron-core 0.16-0.19). Remove the shims when upstream reads the device from its
configuration.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: _CudaNamesMeanCpu | None = None


def install_cpu_shims() -> None:
    """Install all shims of this module. Call this function only in processes that use no GPU. Further calls do nothing."""
    global _installed
    if _installed is not None:
        return
    _replace_device_queries()
    _replace_random_state()
    _replace_streams_and_synchronization()
    _replace_gradient_accumulation_kernel()
    _replace_fused_optimizers()
    _installed = _CudaNamesMeanCpu()
    _installed.__enter__()


def cpu_shims_installed() -> bool:
    """Return whether this process runs Megatron-Core on the CPU through the shims."""
    return _installed is not None


@contextlib.contextmanager
def without_device_shim() -> Iterator[None]:
    """Disable the shim that maps "cuda" to the CPU inside the block. A forward pass names no device, so it does not need the shim. The shim
    checks every torch call, which takes a fifth of the time per token of a small model."""
    shim = _installed if torch.overrides._get_current_function_mode() is _installed else None
    if shim is not None:
        shim.__exit__(None, None, None)
    try:
        yield
    finally:
        if shim is not None:
            shim.__enter__()


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks instead of returning them to the kernel, as CUDA's caching allocator does on a GPU. Without this
    setting, the fresh memory of every activation causes page faults, and on a virtual machine these take more time than the arithmetic. The
    function has no effect with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Maps the device "cuda" to the CPU. Tensors created with device="cuda" (pipeline_parallel/schedules.py, optimizer/optimizer.py,
    optimizer/clip_grads.py) are on the CPU, and .cuda() and pin_memory have no effect. `tensor.type()` returns the CUDA type names, because
    optimizer/distrib_optimizer.py and optimizer/optimizer.py compare its result with 'torch.cuda.FloatTensor' and similar names."""

    _TYPE_NAMES: ClassVar = {
        "torch.FloatTensor": "torch.cuda.FloatTensor",
        "torch.HalfTensor": "torch.cuda.HalfTensor",
        "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return self._TYPE_NAMES.get(name, name)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _replace_device_queries() -> None:
    """Replace torch.cuda's device queries. tensor_parallel/layers.py, tensor_parallel/mappings.py, pipeline_parallel/p2p_communication.py
    and distributed/param_and_grad_buffer.py allocate on `current_device()`."""
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None


def _replace_random_state() -> None:
    """Replace the CUDA generator with the CPU generator. Megatron's RNG tracker (tensor_parallel/random.py) saves, seeds and restores the
    CUDA generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


class _NoStream:
    """Replaces torch.cuda.Stream and torch.cuda.Event with no-ops, because a CPU operation is complete when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = wait_stream = wait_event = record_event = record = wait = _nothing

    def query(self) -> bool:
        """Return True, because CPU work is always complete."""
        return True

    def elapsed_time(self, other: _NoStream) -> float:
        """Return 0 milliseconds, because these events record no time."""
        return 0.0


@contextlib.contextmanager
def _no_stream_context(stream: Any) -> Iterator[None]:
    yield


def _replace_streams_and_synchronization() -> None:
    """Replace streams, events and torch.cuda.synchronize. They are used by timers.py, pipeline_parallel,
    distributed/distributed_data_parallel.py and dist_checkpointing."""
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.stream = _no_stream_context
    no_stream = _NoStream()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: no_stream
    torch.cuda.nvtx.range_push = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None


class _WeightGradientGemm:
    """Replaces Apex's fused_weight_gradient_mlp_cuda. The weight-gradient GEMM adds to `main_grad` without a separate gradient tensor if
    the input is float32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """Add grad_output^T @ total_input to main_grad. Shapes: main_grad float32 [o, i], grad_output [t, o], total_input [t, i]."""
        if total_input.dtype == torch.float32:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t() @ total_input)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _replace_gradient_accumulation_kernel() -> None:
    """Replace the CUDA extension that tensor_parallel/layers.py imports for gradient_accumulation_fusion. HAVE_TE = False prevents
    tensor_parallel/layers.py from using Transformer Engine's GPU buffer if Transformer Engine is installed."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = _WeightGradientGemm
    layers._grad_accum_fusion_available = True
    layers.HAVE_TE = False


def _replace_fused_optimizers() -> None:
    """Replace the CUDA kernels of Transformer Engine and Apex with the fallbacks that megatron.core uses without these packages.
    optimizer/__init__.py, optimizer/optimizer.py, optimizer/clip_grads.py and optimizer/distrib_optimizer.py select the CUDA kernels
    whenever one of the packages can be imported, even for a run on the CPU."""
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    if optimizers.USING_PYTORCH_OPTIMIZER:
        return
    optimizers.USING_PYTORCH_OPTIMIZER = True
    optimizers.Adam = distrib_optimizer.Adam = torch.optim.AdamW
    optimizers.SGD = torch.optim.SGD
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
