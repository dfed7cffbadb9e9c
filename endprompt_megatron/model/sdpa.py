"""Core attention through torch.nn.functional.scaled_dot_product_attention: the `torch` backend's, which runs on a CPU and on a GPU
without Transformer Engine and never materialises the s x s scores.

Under context parallelism key and value are gathered over the group and each rank attends from its own two chunks: simple, and right
on any device; Transformer Engine's ring saves the memory.

Shapes: b micro-batch, s sequence on this rank, n query heads and g key/value heads on this rank, d head dim; Megatron order [s, b, n, d].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from endprompt_megatron.mcore.context_parallel import chunks_of_rank, gather_sequence


class TorchSDPA(MegatronModule):
    """Causal grouped-query attention for Megatron's `core_attention` slot. The arguments are those of Megatron's own."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.branches: list[int] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attention over the physical order of the tokens: each sees those before it, whatever their positions are.

        Args:
            query: [s, b, n, d]; key, value: [s, b, g, d].
            attention_mask: unused: the mask is causal.
        Returns:
            [s, b, n * d].
        """
        if self.config.context_parallel_size > 1:
            return self._over_context_parallel_group(query, key, value)
        if self.branches:
            return self._over_branches(query, key, value)
        return self._attend(query, key, value, first_row=0)

    def _over_context_parallel_group(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        key, value = gather_sequence(key, group), gather_sequence(value, group)
        outputs = []
        for number, chunk in zip(chunks_of_rank(group.rank(), group.size()), query.chunk(2), strict=True):
            first_row, seen = number * chunk.shape[0], (number + 1) * chunk.shape[0]
            outputs.append(self._attend(chunk, key[:seen], value[:seen], first_row=first_row))
        return torch.cat(outputs)

    def _over_branches(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last tokens are branches of `branches` tokens each: a branch sees what stands before the first, and itself."""
        trunk = query.shape[0] - sum(self.branches)
        outputs = [self._attend(query[:trunk], key[:trunk], value[:trunk], first_row=0)]
        parts = zip(*(tensor[trunk:].split(self.branches) for tensor in (query, key, value)), strict=True)
        for its_query, its_key, its_value in parts:
            seen = (torch.cat([key[:trunk], its_key]), torch.cat([value[:trunk], its_value]))
            outputs.append(self._attend(its_query, *seen, first_row=trunk))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, first_row: int) -> Tensor:
        """Causal attention of query rows first_row, first_row + 1, ... over keys 0, 1, ...: [s, b, n * d]."""
        sequence, batch, heads, dim = query.shape
        mask = None
        if first_row:
            rows = torch.arange(first_row, first_row + sequence, device=query.device)
            mask = rows[:, None] >= torch.arange(key.shape[0], device=query.device)[None, :]
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != heads,
        )
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * dim)
