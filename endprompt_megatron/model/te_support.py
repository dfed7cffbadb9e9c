"""Check whether Transformer Engine supports a precision on this machine. The checks cover the import, the GPU and the versions. They return
the reason if a precision is not supported. Only this module imports Transformer Engine directly."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from endprompt_megatron.config.precision import FP8_MULTIPLES

Version = tuple[int, ...]

# Oldest version of Transformer Engine that supports each precision (megatron-core 0.16-0.19, core/fp8_utils.py: get_fp8_recipe)
_OLDEST_TE: dict[str, Version] = {"bf16": (2, 0), "fp8": (2, 2), "fp8_attention": (2, 0), "fp8_blockwise": (2, 3), "mxfp8": (2, 1)}
_HOPPER, _BLACKWELL, _CONSUMER_BLACKWELL = (9, 0), (10, 0), (12, 0)
# Training with FP8 attention needs cuDNN 9.2.1 or later, but does not work with 9.10.0
_OLDEST_CUDNN_FOR_FP8_ATTENTION, _BROKEN_CUDNN_FOR_FP8_ATTENTION = (9, 2, 1), (9, 10, 0)
_OLDEST_CUDA_FOR_BLOCKS = (12, 9)
_OTHER = "Set precision=bf16, or run on another GPU or image."


@dataclass(frozen=True)
class Machine:
    """The GPU and the versions that determine which kernels of Transformer Engine work.

    Attributes:
        te_fault: reason why Transformer Engine cannot be imported; None if the import works.
        te_version: version of Transformer Engine; empty if the import fails.
        gpu: name of the GPU of this process; None if there is no GPU.
        capability: compute capability of the GPU.
        cuda, cudnn: versions of CUDA and cuDNN that torch uses.
    """

    te_fault: str | None
    te_version: Version = ()
    gpu: str | None = None
    capability: Version = ()
    cuda: Version = ()
    cudnn: Version = ()


@functools.cache
def import_transformer_engine() -> tuple[Any, str | None]:
    """Import transformer_engine.pytorch. Return (module, None), or (None, reason) if the import fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("transformer_engine.pytorch"), None
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine" and error.__cause__ is None:
            return None, "transformer_engine is not installed"
        return None, str(error)  # a missing dependency, or the reason given by mcore.import_hooks
    except Exception as error:  # RuntimeError: empty meta package; AssertionError: mixed versions; OSError: missing library
        return None, f"transformer_engine cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"


def this_machine() -> Machine:
    """Read the GPU and the versions of this machine. This call initialises CUDA if a GPU is visible."""
    _, fault = import_transformer_engine()
    version = ()
    if fault is None:
        from megatron.core.utils import get_te_version

        version = tuple(get_te_version().release)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return Machine(fault, version)
    cudnn = torch.backends.cudnn.version() or 0
    return Machine(
        fault,
        version,
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        tuple(int(part) for part in torch.version.cuda.split(".")),
        (cudnn // 10000, cudnn // 100 % 100, cudnn % 100),  # numbering of cuDNN 9 and later
    )


def fault_of(machine: Machine, precision: str) -> str | None:
    """Return why Transformer Engine cannot run a precision on a machine, and how to fix it. Return None if it can.

    Args:
        machine: result of this_machine.
        precision: bf16 or an FP8 precision.
    """
    if machine.te_fault is not None:
        return f"{machine.te_fault}. Use NVIDIA's PyTorch image, or pip install 'transformer-engine[pytorch]' to match torch and CUDA."
    if machine.gpu is None:
        return "no GPU is visible, and Transformer Engine has only GPU kernels. Check nvidia-smi."
    if machine.te_version < _OLDEST_TE[precision]:
        return f"Transformer Engine {_dotted(machine.te_version)} is older than {_dotted(_OLDEST_TE[precision])}. Upgrade it."
    found = f"{machine.gpu} has compute capability {_dotted(machine.capability)}"
    if precision in FP8_MULTIPLES and machine.capability < _HOPPER:
        return f"{found}; FP8 training needs 9.0 (Hopper) or later. {_OTHER}"
    if precision == "mxfp8" and not _BLACKWELL <= machine.capability < _CONSUMER_BLACKWELL:
        return f"{found}; MXFP8 needs 10.x (Blackwell). Set precision=fp8, or run on a B200."
    if precision == "fp8_blockwise" and machine.cuda < _OLDEST_CUDA_FOR_BLOCKS:
        return f"torch was built for CUDA {_dotted(machine.cuda)}; block scaling needs 12.9 or later. Set precision=fp8, or upgrade."
    if precision == "fp8_attention":
        if machine.capability >= _CONSUMER_BLACKWELL:
            return f"{found}; FP8 attention does not support it. Set precision=fp8."
        if machine.cudnn < _OLDEST_CUDNN_FOR_FP8_ATTENTION or machine.cudnn == _BROKEN_CUDNN_FOR_FP8_ATTENTION:
            return (
                f"cuDNN {_dotted(machine.cudnn)}; FP8 attention needs {_dotted(_OLDEST_CUDNN_FOR_FP8_ATTENTION)} or later, except "
                f"{_dotted(_BROKEN_CUDNN_FOR_FP8_ATTENTION)}. Set precision=fp8, or use another cuDNN."
            )
    return None


def trial_fault() -> str | None:
    """Run one matrix product of Transformer Engine on the GPU of this process. Return the reason if it fails, else None. A build for
    another GPU can be imported without an error, so a successful import is not enough."""
    te, fault = import_transformer_engine()
    if fault is not None:
        return fault
    try:
        linear = te.Linear(16, 16, bias=False, params_dtype=torch.bfloat16, device="cuda")
        linear(torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")).sum().backward()
        torch.cuda.synchronize()
    except Exception as error:
        return f"Transformer Engine fails on {torch.cuda.get_device_name()} ({type(error).__name__}: {error}). Was it built for this GPU?"
    return None


def _dotted(version: Version) -> str:
    return ".".join(map(str, version)) or "unknown"
