"""A micro-batch on this rank: moved to its device, with the loss weights normalised so that every layout optimises the same loss.

Shapes: b micro-batch, S physical sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one forward step needs.

    Attributes:
        tokens, labels: int64 [b, S].
        position_ids: int64 [S] or [b, S].
        loss_weights: float32 [b, S]; each sample's weights sum to 1 / b, so that the loss of a micro-batch is the mean over samples
            of the weighted mean over tokens (eq. 11), whatever the micro-batch size.
        prompt_mask: bool [b, S], True where the label is a token of the end prompt.
        counted: bool [b, S], True where the loss counts.
        sample_indices: int64 [b].
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_weights: Tensor
    prompt_mask: Tensor
    counted: Tensor
    sample_indices: Tensor


def to_micro_batch(batch: dict[str, Tensor], device: torch.device) -> MicroBatch:
    """Move a collated batch to `device` and normalise its loss weights."""
    weights = batch["loss_weights"].to(device, non_blocking=True)
    totals = weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return MicroBatch(
        tokens=batch["tokens"].to(device, non_blocking=True),
        labels=batch["labels"].to(device, non_blocking=True),
        position_ids=batch["position_ids"].to(device, non_blocking=True),
        loss_weights=weights / totals / weights.shape[0],
        prompt_mask=batch["prompt_mask"].to(device, non_blocking=True),
        counted=weights > 0,
        sample_indices=batch["sample_index"],
    )
