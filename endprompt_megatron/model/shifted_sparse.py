"""S2-attention of LongLoRA for Megatron's `core_attention` slot: while training, tokens attend within groups, and half of the heads within
groups that are shifted by half a group, so that neighbouring groups exchange what they know. Evaluation attends to everything.

It wraps the core attention of any backend and calls it once a layer, on the groups laid out as samples of a batch: m groups, and one more
where heads are shifted, so that time and memory grow with S (m + 1) / m times the group instead of with S squared.

Shapes: b micro-batch, S physical sequence, m groups, G = S / m tokens of a group, n query heads and g key/value heads on this rank, d head
dim; Megatron order [S, b, n, d].
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
    """The layers of `block` with S2-attention around their core attention.

    Args:
        block: a backend's layer specs; changed in place.
        num_groups: m.
    """
    for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers may share one spec
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ModuleSpec(
            module=ShiftedSparseAttention, params={"inner": attention.core_attention, "num_groups": num_groups}
        )
    return block


class ShiftedSparseAttention(MegatronModule):
    """Causal attention within groups of S / m tokens while training, full causal attention otherwise.

    The query heads from n // 2 on, counted over all tensor-parallel ranks, see groups that begin half a group later: the first and the last
    of them are half as long, because nothing wraps around. With m = 1 no head is shifted and attention is full.

    Where the first shifted head stands inside a key/value group, key and value are repeated for every query head, and the inner attention
    is built for as many key/value heads as query heads.

    Args:
        config, layer_number, attn_mask_type, attention_type: as of Megatron's own core attention.
        inner: class or spec of the attention that does the work.
        num_groups: m.
        options: further arguments of the inner attention.
    Raises:
        ConfigError: context parallelism, which holds no whole group on a rank.
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
                f"method.attention=s2 with parallel.context_parallel_size={config.context_parallel_size}: a group has to stand whole on a "
                f"rank. Set parallel.context_parallel_size=1."
            )
        self.num_groups = num_groups
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        first = config.num_attention_heads // 2 - parallel_state.get_tensor_model_parallel_rank() * heads
        self.first_shifted = min(max(first, 0), heads)
        self.repeats = config.num_attention_heads // config.num_query_groups
        # the same choice on every rank, so that all build the same module
        self.one_key_a_head = num_groups > 1 and config.num_attention_heads // 2 % self.repeats != 0
        if self.one_key_a_head:
            config = copy.copy(config)
            config.num_query_groups = config.num_attention_heads
        self.inner = build_module(
            inner, config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, attention_type=attention_type, **options
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any) -> Tensor:
        """Attention of one micro-batch; its arguments are those of Megatron's own core attention.

        Args:
            query: [S, b, n, d]; key, value: [S, b, g, d], all rotated to their positions already.
            attention_mask: handed on outside training; groups are causal without one.
        Returns:
            [S, b, n * d].
        """
        if self.one_key_a_head:
            key, value = (tensor.repeat_interleave(self.repeats, dim=2) for tensor in (key, value))
        if not self.training or self.num_groups == 1:
            return self.inner(query, key, value, attention_mask, *args, **options)
        sequence, batch, heads, _ = query.shape
        if sequence % (2 * self.num_groups):
            raise AssertionError(f"{sequence} tokens make no {self.num_groups} groups of even length")
        first_key = self.first_shifted // (heads // key.shape[2])
        folded = [_fold(tensor, self.num_groups, at) for tensor, at in ((query, self.first_shifted), (key, first_key), (value, first_key))]
        context = self.inner(*folded, None, *args, **options)
        return _unfold(context.unflatten(-1, (heads, -1)), self.num_groups, self.first_shifted, batch).reshape(sequence, batch, -1)


def _fold(tensor: Tensor, groups: int, first_shifted: int) -> Tensor:
    """Groups as samples.

    Padding stands behind a group's own tokens, and causal attention never looks behind: nothing sees it.

    Args:
        tensor: [S, b, n, d].
        groups: m.
        first_shifted: heads from here on are shifted.
    Returns:
        [G, (m + 1) b, n, d]; without shifted heads [G, m b, n, d].
    """
    sequence, batch, heads, dim = tensor.shape
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
    """The way back: [S, b, n, d] from what attention made of `_fold`'s."""
    size, _, heads, _ = tensor.shape
    sequence, half = groups * size, size // 2
    rows = tensor.unflatten(1, (-1, batch)).transpose(0, 1).flatten(0, 1)
    if first_shifted == heads:
        return rows
    shifted = rows[:, :, first_shifted:]
    shifted = torch.cat([shifted[:half], shifted[size : sequence + half]])
    return torch.cat([rows[:sequence, :, :first_shifted], shifted], dim=2) if first_shifted else shifted
