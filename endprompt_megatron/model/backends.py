"""Backends. A backend is a choice of kernels for attention, norms and linear layers. `resolve` selects a backend that is available on this
machine and describes the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.errors import BackendUnavailableError, ConfigError
from endprompt_megatron.model import te_support
from endprompt_megatron.model.layer_specs import te_block_spec, torch_block_spec


@dataclass(frozen=True)
class Backend:
    """A family of kernels.

    Attributes:
        name: value of `backend` in the config.
        description: text for the status line.
        block_spec: function (TransformerConfig, vp_stage=..., unfused_norms=...) that returns the layer spec for GPTModel. With
            unfused_norms, the norm before attention is not fused into a linear layer.
        has_te_kernels: whether the kernels are those of Transformer Engine.
    """

    name: str
    description: str
    block_spec: Callable[..., Any]
    has_te_kernels: bool = False


BACKENDS = {
    "torch": Backend("torch", "torch SDPA attention, torch RMSNorm, Megatron linear layers", torch_block_spec),
    "te": Backend("te", "Transformer Engine attention, norms and linear layers", te_block_spec, has_te_kernels=True),
}


def resolve(name: str, *, accelerator: str = "cpu", precision: str = "bf16") -> Backend:
    """Return the backend for `backend=NAME`; `auto` selects the best available one.

    Args:
        name: auto | te | torch.
        accelerator: gpu | cpu.
        precision: fp32, bf16 or an FP8 precision.
    Raises:
        ConfigError: `name` is not a backend.
        BackendUnavailableError: this machine does not meet the requirements of the backend or of the precision.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"backend={name}: choose one of auto, {', '.join(BACKENDS)}.")
    needs_te = name == "te" or precision in FP8_MULTIPLES
    if name == "torch" and not needs_te:
        return BACKENDS["torch"]
    setting = f"precision.name={precision}" if precision in FP8_MULTIPLES else f"backend={name}"
    if accelerator == "cpu" or precision == "fp32":
        if needs_te:
            raise BackendUnavailableError(
                f"{setting}: Transformer Engine needs an NVIDIA GPU and 16 bits. Set backend=auto precision=auto."
            )
        return BACKENDS["torch"]
    machine = te_support.this_machine()
    fault = te_support.fault_of(machine, precision) or te_support.trial_fault()
    if fault is None:
        version = ".".join(map(str, machine.te_version))
        return replace(BACKENDS["te"], description=f"Transformer Engine {version} attention, norms and linear layers")
    if needs_te:
        raise BackendUnavailableError(f"{setting}: {fault}")
    return replace(BACKENDS["torch"], description=f"{BACKENDS['torch'].description} (not te: {fault})")


def assert_same_everywhere(backend: Backend) -> None:
    """Check that all ranks of a job resolved the same backend. All ranks must call this function.

    Raises:
        BackendUnavailableError: a rank has another backend than rank 0.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (backend.name, backend.description))
    if len({name for name, _ in found}) > 1:
        odd = next(rank for rank, (name, _) in enumerate(found) if name != found[0][0])
        raise BackendUnavailableError(
            f"backend=auto: rank 0 has {found[0][0]} ({found[0][1]}), rank {odd} has {found[odd][0]} ({found[odd][1]}). Set "
            f"backend=torch, or give every host the same image."
        )
