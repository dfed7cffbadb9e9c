"""Parameter names of low-rank adapters in models and checkpoints, and the merge of an adapter into its weight. This module does not import
Megatron, so that the converter can use it without Megatron."""

from __future__ import annotations

import torch
from torch import Tensor

QKV_TARGETS = ("q_proj", "k_proj", "v_proj")
OUTPUT_TARGET = "o_proj"
_SUFFIXES = ("_lora_A", "_lora_B")


def is_adapter(name: str) -> bool:
    """Return whether a parameter name (of a module, a model or a checkpoint) belongs to an adapter."""
    return name.endswith(_SUFFIXES)


def adapter_name(target: str, matrix: str) -> str:
    """Return the name of an adapter parameter in its linear layer.

    Args:
        target: q_proj | k_proj | v_proj | o_proj.
        matrix: A | B.
    """
    return f"{target}_lora_{matrix}"


def merge(weight: Tensor, update: Tensor, scale: float) -> Tensor:
    """Return W + alpha / r B A, computed in float32 and rounded to the dtype of W.

    Args:
        weight: rows of W.
        update: the same rows of B A in float32, from low_rank_product.
        scale: alpha / r.
    """
    return (weight.float() + update * scale).to(weight.dtype)


def low_rank_product(b: Tensor, a: Tensor) -> Tensor:
    """Return B A in float32. The product is accumulated over the rank dimension in a fixed order by elementwise products and sums. Unlike a
    matrix product, the result is bitwise independent of the device and of the number of rows, so every layout merges to the same weight.

    Args:
        b: B, [rows, r].
        a: A, [r, columns].
    Returns:
        float32 [rows, columns].
    """
    b, a = b.float(), a.float()
    product = torch.zeros(b.shape[0], a.shape[1], device=b.device)
    for index in range(a.shape[0]):
        product += b[:, index : index + 1] * a[index]
    return product
