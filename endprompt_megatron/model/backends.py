"""The kernels that carry attention, norms and linear layers. One door: `resolve` turns the config's word into a backend that this
machine has, and says in one line which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.model.layer_specs import torch_block_spec


@dataclass(frozen=True)
class Backend:
    """A family of kernels.

    Attributes:
        name: as written in `backend`.
        description: for the status line.
        block_spec: (TransformerConfig, vp_stage=...) -> what GPTModel takes as its layer spec.
    """

    name: str
    description: str
    block_spec: Callable[..., Any]


BACKENDS = {"torch": Backend("torch", "torch SDPA attention, torch RMSNorm, Megatron linear layers", torch_block_spec)}


def resolve(name: str) -> Backend:
    """The backend for `backend=NAME`; `auto` takes the best one this machine has.

    Raises:
        ConfigError: no such backend.
    """
    if name == "auto":
        return BACKENDS["torch"]
    if name not in BACKENDS:
        raise ConfigError(f"backend={name}: choose one of auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]
