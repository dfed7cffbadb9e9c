"""Transformer Engine's own classes on a machine without a GPU: they are built as on one, and their kernels, which a CPU lacks, are replaced by
the same arithmetic in torch. So names, shapes, checkpoints and the wiring are real; speed and rounding are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from endprompt_megatron.model.te_support import import_transformer_engine


def require_transformer_engine() -> Any:
    """transformer_engine.pytorch; skips the test, with the reason, where it cannot be imported."""
    te, fault = import_transformer_engine()
    if fault is not None:
        pytest.skip(fault, allow_module_level=True)
    return te


@contextmanager
def building(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make Transformer Engine's modules constructible inside the block: their constructors query a GPU but do not use it."""
    properties = SimpleNamespace(major=9, minor=0, name="none", multi_processor_count=132, total_memory=80 * 2**30)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        yield


def replace_kernels(patch: pytest.MonkeyPatch) -> None:
    """Forward passes in torch, for whole models on one rank."""
    te = require_transformer_engine()
    patch.setattr(te.Linear, "forward", _linear)
    patch.setattr(te.LayerNormLinear, "forward", _norm_linear)
    patch.setattr(te.RMSNorm, "forward", lambda self, values: _norm(values, self.weight, self.eps))
    patch.setattr(te.DotProductAttention, "forward", _attention)


def _norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = values.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(values.dtype)


def _linear(self: Any, values: Tensor, **unused: Any) -> Any:
    bias = self.bias if self.use_bias else None
    return (F.linear(values, self.weight), bias) if self.return_bias else F.linear(values, self.weight, bias)


def _norm_linear(self: Any, values: Tensor, **unused: Any) -> Any:
    return _linear(self, _norm(values, self.layer_norm_weight, self.eps))


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    assert attention_mask is None and options["attn_mask_type"] == "causal" and self.qkv_format == "sbhd"
    rows = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    context = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)
