"""RMSNorm of the `torch` backend. The forward pass equals torch's RMSNorm bit for bit. The backward pass is written by hand and needs only
the input and one number per row. Autograd would save every intermediate tensor of the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with support for sequence parallelism, which Megatron's torch fallback does not support.

    Args:
        config: config of the model. With `sequence_parallel`, Megatron sums the gradient of the weight over the tensor-parallel group.
        hidden_size: size of the last dimension.
        eps: number added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension of hidden_states, [..., hidden_size]. The mean square is computed in float32."""
        return _RMSNormFunction.apply(hidden_states, self.weight, self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """The forward pass computes y = x r w with r = (mean(x^2) + eps)^-1/2 of each row. The backward pass computes dw = sum(g n) and
    dx = r (g w - n mean(g w n)) with n = x r and the gradient g of y."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        values = hidden_states.float()
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(hidden_states, weight, scale)
        return (values * scale).mul_(weight).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_states, weight, scale = ctx.saved_tensors
        size = weight.shape[0]
        normalized = (hidden_states.float() * scale).reshape(-1, size)
        grad = grad_output.float().reshape(-1, size)
        weight_share = grad * normalized
        grad_weight = weight_share.sum(0)
        row_mean = torch.mv(weight_share, weight.float()).div_(size).unsqueeze_(1)
        grad_input = torch.mul(grad, weight).addcmul_(normalized, row_mean, value=-1).mul_(scale.reshape(-1, 1))
        return grad_input.view(hidden_states.shape).to(hidden_states.dtype), grad_weight.to(weight.dtype), None
