"""TransformerConfig fields of each precision. Megatron's TransformerBlock enters the FP8 context: once around all layers with delayed
scaling, and once around each layer with the other recipes."""

from __future__ import annotations

from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Maps names of conf/precision to Megatron's fields. Formats, amax history and amax algorithm are the defaults of Transformer Engine
# (common/recipe). All formats use e4m3 for forward values; hybrid uses e5m2 for gradients.
_FP8_FIELDS: dict[str, dict[str, Any]] = {
    "fp8": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8_attention": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_margin": 0,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": True,
    },
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
_DESCRIPTIONS = {
    "fp8": "FP8 with a current scale for each tensor, attention in bf16",
    "fp8_attention": "FP8 with delayed scales, attention in FP8",
    "fp8_blockwise": "FP8 with scales for blocks of 128, attention in bf16",
    "mxfp8": "FP8 with scales for blocks of 32, attention in bf16",
}


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights and activations. FP8 precisions keep weights in bf16."""
    return _DTYPES.get(precision, torch.bfloat16)


def precision_fields(precision: str, bf16_layers: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Return the TransformerConfig arguments of a precision.

    Args:
        precision: fp32 | bf16 | fp8 | fp8_attention | fp8_blockwise | mxfp8.
        bf16_layers: for an FP8 precision, numbers of layers at the start and at the end that stay in bf16.
    """
    dtype = dtype_of(precision)
    fields = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype, "autocast_dtype": dtype}
    if precision not in _FP8_FIELDS:
        return fields
    start, end = bf16_layers
    kept = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end} if start or end else {}
    return fields | _FP8_FIELDS[precision] | kept


def describe_precision(precision: str, bf16_layers: tuple[int, int] = (0, 0)) -> str:
    """Return a description of a precision for the log."""
    if precision not in _DESCRIPTIONS:
        return precision
    kept = f", {bf16_layers[0]} layer(s) at the start and {bf16_layers[1]} at the end in bf16" if any(bf16_layers) else ""
    return f"{precision}: {_DESCRIPTIONS[precision]}{kept}"
