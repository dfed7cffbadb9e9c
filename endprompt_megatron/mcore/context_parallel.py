"""Slice a sequence over context-parallel ranks, and all-gather the whole sequence in physical order.

A sequence of S tokens is split into 2c chunks for c ranks. Rank r holds chunks r and 2c-1-r, so every rank has the same share of the causal
attention FLOPs. Megatron and Transformer Engine use the same layout.

Shapes: S tokens of the whole sequence, s = S / c tokens on this rank, b micro-batch size. Tensors are [s, b, ...] as in Megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """Return the indices of the two chunks that a rank holds. The sequence has 2 * size chunks."""
    return rank, 2 * size - 1 - rank


def token_indices(seq_length: int, rank: int, size: int) -> Tensor:
    """Return the physical indices of a rank's tokens, int64 [S / size], in the local order of the rank.

    Args:
        seq_length: S, a multiple of 2 * size.
        rank: rank in the context-parallel group.
        size: size of the context-parallel group.
    """
    chunk = seq_length // (2 * size)
    return torch.cat([torch.arange(number * chunk, (number + 1) * chunk) for number in chunks_of_rank(rank, size)])


def gather_sequence(local: Tensor, group: Any) -> Tensor:
    """All-gather the tokens of all ranks in physical order. The operation is differentiable.

    Args:
        local: tokens of this rank, [s, b, ...].
        group: the context-parallel process group.
    Returns:
        The tokens of all ranks, [S, b, ...].
    """
    return _GatherSequence.apply(local, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        size = group.size()
        ctx.group, ctx.rank = group, group.rank()
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
        torch.distributed.all_gather(parts, local.contiguous(), group=group)
        ordered: list[Tensor | None] = [None] * (2 * size)
        for rank, part in enumerate(parts):
            for number, chunk in zip(chunks_of_rank(rank, size), part.chunk(2), strict=True):
                ordered[number] = chunk
        return torch.cat(ordered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        chunks = gradient.chunk(2 * ctx.group.size())
        return torch.cat([chunks[number] for number in chunks_of_rank(ctx.rank, ctx.group.size())]), None
