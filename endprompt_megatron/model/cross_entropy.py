"""Cross-entropy in slices of rows, for a vocabulary that is not split over tensor-parallel ranks. This implementation allocates neither a
float32 copy of all logits nor a dense one-hot gradient. The backward pass writes the gradient into the memory of the logits.

Shapes: r rows (tokens), v vocabulary size including padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLICE_ELEMENTS = 4 * 2**20


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, num_real_tokens: int) -> Tensor:
        log_normalizer = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _slices(logits):
            log_normalizer[rows] = torch.logsumexp(logits[rows, :num_real_tokens].float(), dim=-1)
        target = logits.gather(1, labels[:, None])[:, 0].float()
        ctx.save_for_backward(logits, labels, log_normalizer)
        ctx.num_real_tokens = num_real_tokens
        ctx.consumed = False
        return log_normalizer - target

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        if ctx.consumed:
            raise RuntimeError("the backward pass has overwritten the logits with their gradient: differentiate this loss only once")
        ctx.consumed = True
        logits, labels, log_normalizer = ctx.saved_tensors
        logits = logits.detach()
        real = ctx.num_real_tokens
        for rows in _slices(logits):
            scale = grad_losses[rows, None]
            probability = torch.sub(logits[rows, :real], log_normalizer[rows, None]).exp_().mul_(scale)
            probability.scatter_add_(1, labels[rows, None], -scale)
            logits[rows, :real] = probability
        logits[:, real:] = 0
        return logits, None, None


def sliced_cross_entropy(logits: Tensor, labels: Tensor, *, num_real_tokens: int) -> Tensor:
    """Return the cross-entropy of each row. The backward pass overwrites `logits`.

    Args:
        logits: [r, v], any floating-point dtype. The caller must not use them afterwards.
        labels: int64 [r], each < num_real_tokens.
        num_real_tokens: number of columns that are tokens. The following columns are padding and get no probability.
    Returns:
        float32 [r].
    """
    return _SlicedCrossEntropy.apply(logits, labels, num_real_tokens)


def _slices(logits: Tensor) -> list[slice]:
    rows = max(1, _SLICE_ELEMENTS // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]
