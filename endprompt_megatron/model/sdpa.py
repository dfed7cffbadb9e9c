"""Core attention of the `torch` backend, based on torch.nn.functional.scaled_dot_product_attention. This attention runs on a CPU, and on a
GPU without Transformer Engine. It never materialises the s x s scores.

With context parallelism, key and value are all-gathered over the group, and each rank computes attention for the queries of its two chunks.
This method is simple and works on any device, but needs more memory than Transformer Engine's ring attention.

Shapes: b micro-batch, s sequence on this rank, t keys that a query can attend to, n query heads and g key/value heads on this rank, d head
dimension. Tensors are [s, b, n, d] as in Megatron.
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

# torch's CPU kernel. Unlike torch's public functions, this kernel returns the log-sum-exp of each row (torch 2.2 to 2.15).
_FLASH_ON_CPU: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
# Maximum rows x keys of a mask on a CPU. torch converts the mask to the dtype of the scores, so it takes 64 MiB in float32.
_MASK_ELEMENTS = 2**24


def _merges(query: Tensor) -> bool:
    """Return whether attention to earlier tokens (a cache or a trunk) and attention of the new tokens to each other are computed
    separately and merged. This is done in evaluation on a CPU, because torch's public function needs a large mask there."""
    return _FLASH_ON_CPU is not None and query.device.type == "cpu" and not torch.is_grad_enabled()


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Return (attention [b, n, s, d], log-sum-exp of each row, float32 [b, n, s])."""
    return _FLASH_ON_CPU(query, key, value, 0.0, is_causal, **options)


class KeyValueCache:
    """Key/value cache of one layer. The buffers are allocated once at their maximum size. The tokens of a head are contiguous, because
    attention reads them in this order.

    Args:
        max_length: capacity in tokens.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens to the cache.

        Args:
            key, value: [s, b, g, d], already rotated.
        Returns:
            Key and value of all cached tokens, [t, b, g, d]. Both are views of the cache and are valid until the next call.
        Raises:
            AssertionError: the tokens do not fit into the cache.
        """
        seen = self.peek(key, value)
        self.length += key.shape[0]
        return seen

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return key and value of all cached tokens, in the same form as `extend`."""
        assert self._buffers is not None  # the cache holds tokens
        return self._buffers[0][: self.length], self._buffers[1][: self.length]

    def rewind(self, length: int) -> None:
        """Truncate the cache to its first `length` tokens. Later tokens overwrite the rest."""
        if length > self.length:
            raise AssertionError(f"a key/value cache of {self.length} tokens cannot be truncated to {length}")
        self.length = length

    def peek(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `extend`, but do not keep the new tokens. The next call overwrites them."""
        past = self.length + key.shape[0]
        if past > self.max_length:
            raise AssertionError(f"{past} tokens do not fit into a key/value cache of {self.max_length}")
        if self._buffers is None:
            batch, heads, dim = key.shape[1:]
            room = [new.new_empty(batch, heads, self.max_length, dim).permute(2, 0, 1, 3) for new in (key, value)]
            self._buffers = room[0], room[1]
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[self.length : past] = new
        return self._buffers[0][:past], self._buffers[1][:past]


class TorchSDPA(MegatronModule):
    """Causal grouped-query attention for Megatron's `core_attention` slot, with the arguments of Megatron's core attention."""

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
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **unused: Any,
    ) -> Tensor:
        """Compute causal attention in the physical order of the tokens, independent of their positions. With a `cache`, the tokens also
        attend to the tokens of earlier calls.

        Args:
            query: [s, b, n, d].
            key, value: [s, b, g, d].
            attention_mask: unused, because the mask is always causal.
        Returns:
            [s, b, n * d].
        """
        if self.config.context_parallel_size > 1:
            return self._over_context_parallel_group(query, key, value)
        if self.branches:
            return self._over_branches(query, key, value)
        if self.cache is not None:
            first_row = self.cache.length
            return self._attend(query, *self.cache.extend(key, value), first_row=first_row)
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
        """Compute attention over a trunk and branches. `self.branches` contains the length of each branch. A branch attends to the trunk
        and to itself. Branches are not added to the cache."""
        trunk = query.shape[0] - sum(self.branches)
        if _merges(query):
            return self._over_merged_branches(query, key, value, trunk)
        cache = self.cache or KeyValueCache(trunk + max(self.branches))
        parts = list(zip(*(tensor.split([trunk, *self.branches]) for tensor in (query, key, value)), strict=True))
        outputs = []
        for index, (its_query, its_key, its_value) in enumerate(parts):
            if not its_query.shape[0]:
                continue  # the whole trunk is already in the cache
            first_row = cache.length
            seen = (cache.peek if index else cache.extend)(its_key, its_value)
            outputs.append(self._attend(its_query, *seen, first_row=first_row))
        return torch.cat(outputs)

    def _over_merged_branches(self, query: Tensor, key: Tensor, value: Tensor, trunk: int) -> Tensor:
        """Return the same as _over_branches, but read the trunk only once for all branches."""
        outputs, seen = [], (key[:trunk], value[:trunk])
        if self.cache is not None:
            first_row = self.cache.length
            seen = self.cache.extend(*seen) if trunk else self.cache.kept()
            if trunk:
                outputs.append(self._attend(query[:trunk], *seen, first_row=first_row))
        else:
            outputs.append(self._attend(query[:trunk], *seen, first_row=0))
        blocked = torch.block_diag(*(torch.ones(length, length).tril() for length in self.branches)) == 0
        mask = torch.zeros(blocked.shape, dtype=query.dtype).masked_fill_(blocked, -torch.inf)
        outputs.append(self._merge(query[trunk:], *seen, key[trunk:], value[trunk:], attn_mask=mask))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, first_row: int) -> Tensor:
        """Return the causal attention of rows first_row .. first_row + s - 1 over keys 0 .. first_row + s - 1, [s, b, n * d]."""
        sequence, batch, heads, dim = query.shape
        if not first_row:
            context = self._fused(query, key, value, is_causal=True)
        elif sequence == 1:  # treat the query heads of a group as rows, so that keys and values are read once per group
            groups = key.shape[2]
            rows = query.view(batch, groups, heads // groups, dim).permute(2, 0, 1, 3)
            context = self._fused(rows, key, value).reshape(batch, heads, 1, dim)
        elif _merges(query):
            past, own = (key[:first_row], value[:first_row]), (key[first_row:], value[first_row:])
            return self._merge(query, *past, *own, is_causal=True)
        else:  # torch's CPU kernels need a mask here; computing blocks of rows limits the size of the mask
            from torch.nn.attention.bias import causal_lower_right  # this import loads TorchDynamo, which takes a second

            step = max(1, _MASK_ELEMENTS // key.shape[0])
            blocks = []
            for start in range(0, sequence, step):
                past = min(start + step, sequence)
                seen = first_row + past
                mask = None if past - start == 1 else causal_lower_right(past - start, seen)
                blocks.append(self._fused(query[start:past], key[:seen], value[:seen], attn_mask=mask))
            context = torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * dim)

    def _merge(self, query: Tensor, past_key: Tensor, past_value: Tensor, key: Tensor, value: Tensor, **masking: Any) -> Tensor:
        """Return the attention of the query tokens, [s, b, n * d], over all past keys and over the keys of the query tokens themselves.
        `masking` applies only to the latter. Each part is one kernel call, and the log-sum-exp values of the calls determine how the
        results are merged. This avoids a mask over the past keys."""
        sequence, batch, heads, dim = query.shape
        groups = key.shape[2]
        # treat the query heads of a group as rows, so that the past keys and values are read once per group
        rows = query.view(sequence, batch, groups, heads // groups, dim).permute(1, 2, 3, 0, 4).reshape(batch, groups, -1, dim)
        far, far_sum = _flash_on_cpu(rows, past_key.permute(1, 2, 0, 3), past_value.permute(1, 2, 0, 3), scale=self.softmax_scale)
        near, near_sum = _flash_on_cpu(
            query.permute(1, 2, 0, 3),
            *(tensor.permute(1, 2, 0, 3).repeat_interleave(heads // groups, dim=1) for tensor in (key, value)),
            scale=self.softmax_scale,
            **masking,
        )
        far, far_sum = far.reshape(batch, heads, sequence, dim), far_sum.reshape(batch, heads, sequence)
        share = torch.sigmoid(far_sum - near_sum.view_as(far_sum)).unsqueeze(-1)
        context = (far.float() * share + near.float() * (1 - share)).to(query.dtype)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * dim)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, **masking: Any) -> Tensor:
        """Call scaled_dot_product_attention with [s, b, n, d] tensors. Return [b, n, s, d]."""
        return F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[2],
            **masking,
        )
