"""Setter and getter of the factor by which Megatron's attention multiplies cosine and sine (YaRN's attention factor). megatron-core 0.16
derives the factor from the config at every call. Later versions derive it once per attention layer. megatron/core/transformer/attention.py
(0.16-0.19) has no setter. Remove this module when upstream adds one."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import Attention


def set_rope_concentration(model: torch.nn.Module, factor: float) -> None:
    """Make every attention layer of `model` multiply cosine and sine by `factor` from the next forward pass on."""
    if factor != 1.0 or hasattr(model.config, "yarn_rotary_scaling_factor"):
        model.config.yarn_rotary_scaling_factor = math.exp((factor - 1.0) * 10.0)  # upstream: 0.1 ln(scaling factor) + 1
    for module in model.modules():
        if isinstance(module, Attention) and hasattr(module, "_yarn_concentration_factor"):
            module._yarn_concentration_factor = factor


def rope_concentrations(model: torch.nn.Module) -> set[float]:
    """Return the distinct factors of the attention layers of `model`. The set is empty if this rank has no attention layer."""
    return {
        getattr(module, "_yarn_concentration_factor", None) or _yarn_get_concentration_factor_from_config(module.config)
        for module in model.modules()
        if isinstance(module, Attention)
    }
