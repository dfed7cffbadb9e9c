"""Context-parallel slicing: which tokens of a sequence a rank holds, and the all-gather of the whole sequence in physical order.

A sequence of S tokens is cut into 2c chunks for c ranks. Rank r holds chunks r and 2c-1-r, which gives every rank the same share of the
causal attention FLOPs (the layout of Megatron and Transformer Engine).

Shapes: S whole sequence, s = S / c on this rank, b micro-batch; Megatron order [s, b, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """Indices of the two chunks (of 2 * size) that a rank holds."""
    return rank, 2 * size - 1 - rank


def token_indices(seq_length: int, rank: int, size: int) -> Tensor:
    """Physical indices of a rank's tokens, int64 [S / size], in the rank's local order.

    Args:
        seq_length: S, a multiple of 2 * size.
        rank, size: rank in, and size of, the context-parallel group.
    """
    chunk = seq_length // (2 * size)
    return torch.cat([torch.arange(number * chunk, (number + 1) * chunk) for number in chunks_of_rank(rank, size)])


def gather_sequence(local: Tensor, group: Any) -> Tensor:
    """All-gather the tokens of all ranks into physical order; differentiable.

    Args:
        local: [s, b, ...], tokens of this rank.
        group: the context-parallel process group.
    Returns:
        [S, b, ...].
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
