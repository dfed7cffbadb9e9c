"""Convert a collated batch into the micro-batch of this rank. The loss weights are normalised so that every parallel layout optimises the
same loss.

Shapes: b micro-batch size, S physical sequence length, s = S / context-parallel size, the length on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from endprompt_megatron.mcore.context_parallel import token_indices


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward step.

    Attributes:
        tokens, labels: int64 [b, s].
        position_ids: int64 [s] or [b, s].
        loss_weights: float32 [b, s]. The weights of a sample sum to 1 / b over its S tokens. The loss of a micro-batch is therefore the
            mean over samples of the weighted mean over tokens (EndPrompt, arXiv 2605.14589, eq. 11), and does not depend on the parallel
            layout.
        prompt_mask: bool [b, s], True if the label is a token of the end prompt.
        counted: bool [b, s], True if the loss weight is positive.
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
    """Normalise the loss weights of a collated batch, select this context-parallel rank's tokens and move them to `device`."""
    weights = batch["loss_weights"]
    totals = weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    size = parallel_state.get_context_parallel_world_size()
    mine = token_indices(weights.shape[1], parallel_state.get_context_parallel_rank(), size) if size > 1 else slice(None)

    def local(tensor: Tensor) -> Tensor:
        return tensor[..., mine].to(device, non_blocking=True)

    return MicroBatch(
        tokens=local(batch["tokens"]),
        labels=local(batch["labels"]),
        position_ids=local(batch["position_ids"]),
        loss_weights=local(weights / totals / weights.shape[0]),
        prompt_mask=local(batch["prompt_mask"]),
        counted=local(weights > 0),
        sample_indices=batch["sample_index"],
    )
