"""S2-attention of LongLoRA for Megatron's `core_attention` slot. In training, tokens attend within groups. Half of the heads use groups
that are shifted by half a group, so that information flows between neighbouring groups. Evaluation uses full attention.

This module wraps the core attention of any backend and calls it once per layer. The groups are the samples of the batch. A sample becomes m
groups, or m + 1 if heads are shifted. Time and memory are therefore proportional to S (m + 1) / m times G instead of S squared.

Shapes: b micro-batch, S physical sequence, m groups, G = S / m tokens of a group, n query heads and g key/value heads on this rank, d head
dimension. Tensors are [S, b, n, d] as in Megatron.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from endprompt_megatron.errors import ConfigError


def with_shifted_sparse_attention(block: TransformerBlockSubmodules, *, num_groups: int) -> TransformerBlockSubmodules:
    """Wrap the core attention of the layers of `block` in S2-attention.

    Args:
        block: layer specs of a backend; changed in place.
        num_groups: m, number of groups.
    """
    for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers may share one spec
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ModuleSpec(
            module=ShiftedSparseAttention, params={"inner": attention.core_attention, "num_groups": num_groups}
        )
    return block


class ShiftedSparseAttention(MegatronModule):
    """Causal attention within groups of S / m tokens in training, and full causal attention otherwise.

    The query heads from n // 2 on, counted over all tensor-parallel ranks, use groups that start half a group later. Groups do not wrap
    around the sequence, so the first and the last shifted group have half the length. With m = 1, no head is shifted and attention is full.

    If the first shifted head is not the first of its key/value group, key and value are repeated for every query head, and the inner
    attention is built with as many key/value heads as query heads.

    Args:
        config, layer_number, attn_mask_type, attention_type: same as for Megatron's core attention.
        inner: class or spec of the wrapped attention.
        num_groups: m, number of groups.
        options: further arguments of the inner attention.
    Raises:
        ConfigError: context parallelism is on, which would split groups over ranks.
    Source: LongLoRA (arXiv 2309.12307), section 3.2.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        inner: Any,
        num_groups: int,
        **options: Any,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"method.attention=s2 with parallel.context_parallel_size={config.context_parallel_size}: S2-attention needs "
                f"whole groups on a rank. Set parallel.context_parallel_size=1."
            )
        self.num_groups = num_groups
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        first = config.num_attention_heads // 2 - parallel_state.get_tensor_model_parallel_rank() * heads
        self.first_shifted = min(max(first, 0), heads)
        self.repeats = config.num_attention_heads // config.num_query_groups
        # this depends only on head counts of the whole model, so that all ranks build the same module
        self.repeats_keys = num_groups > 1 and config.num_attention_heads // 2 % self.repeats != 0
        if self.repeats_keys:
            config = copy.copy(config)
            config.num_query_groups = config.num_attention_heads
        self.inner = build_module(
            inner, config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, attention_type=attention_type, **options
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any) -> Tensor:
        """Compute the attention of one micro-batch. The arguments are those of Megatron's core attention.

        Args:
            query: [S, b, n, d], already rotated.
            key, value: [S, b, g, d], already rotated.
            attention_mask: passed to the inner attention outside training. Grouped attention is causal without a mask.
        Returns:
            [S, b, n * d].
        Raises:
            AssertionError: S is not a multiple of 2 m.
        """
        if self.repeats_keys:
            key, value = (tensor.repeat_interleave(self.repeats, dim=2) for tensor in (key, value))
        if not self.training or self.num_groups == 1:
            return self.inner(query, key, value, attention_mask, *args, **options)
        sequence, batch, heads, _ = query.shape
        if sequence % (2 * self.num_groups):
            raise AssertionError(f"{sequence} tokens cannot be split into {self.num_groups} groups of even length")
        first_key = self.first_shifted // (heads // key.shape[2])
        folded = [_fold(tensor, self.num_groups, at) for tensor, at in ((query, self.first_shifted), (key, first_key), (value, first_key))]
        context = self.inner(*folded, None, *args, **options)
        return _unfold(context.unflatten(-1, (heads, -1)), self.num_groups, self.first_shifted, batch).reshape(sequence, batch, -1)


def _fold(tensor: Tensor, groups: int, first_shifted: int) -> Tensor:
    """Reshape groups into samples of a batch.

    Padding follows the tokens of a group, so causal attention never attends to the padding.

    Args:
        tensor: [S, b, n, d].
        groups: m.
        first_shifted: index of the first shifted head; n if no head is shifted.
    Returns:
        [G, (m + 1) b, n, d], or [G, m b, n, d] if no head is shifted.
    """
    sequence, _, heads, dim = tensor.shape
    size = sequence // groups
    half = size // 2
    if first_shifted < heads:
        plain, shifted = tensor[:, :, :first_shifted], tensor[:, :, first_shifted:]
        padding = shifted.new_zeros(half, *shifted.shape[1:])
        tensor = torch.cat([shifted[:half], padding, shifted[half:], padding])
        if first_shifted:
            tensor = torch.cat([torch.cat([plain, plain.new_zeros(size, *plain.shape[1:])]), tensor], dim=2)
    return tensor.unflatten(0, (-1, size)).transpose(0, 1).reshape(size, -1, heads, dim)


def _unfold(tensor: Tensor, groups: int, first_shifted: int, batch: int) -> Tensor:
    """Apply the inverse of `_fold` to the attention output. Return [S, b, n, d]."""
    size, _, heads, _ = tensor.shape
    sequence, half = groups * size, size // 2
    rows = tensor.unflatten(1, (-1, batch)).transpose(0, 1).flatten(0, 1)
    if first_shifted == heads:
        return rows
    shifted = rows[:, :, first_shifted:]
    shifted = torch.cat([shifted[:half], shifted[size : sequence + half]])
    return torch.cat([rows[:sequence, :, :first_shifted], shifted], dim=2) if first_shifted else shifted
