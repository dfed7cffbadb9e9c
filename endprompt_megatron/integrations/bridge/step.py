"""EndPrompt's forward step for Megatron-Bridge: `pretrain(config, endprompt_forward_step)`. Bridge's own gives middle pipeline stages no
batch and the last one no positions, and rounds the sum of the loss weights to whole tokens.

Shapes: b micro-batch, s physical sequence on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from endprompt_megatron.data.batch import MicroBatch, to_micro_batch
from endprompt_megatron.training.step import weighted_loss


def endprompt_forward_step(data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """The same on every pipeline stage: each rotates by the positions of the micro-batch.

    Args:
        data_iterator: iterator over the samples of EndPromptDatasetProvider.
        model: a chunk of EndPromptModelProvider's model.
    Returns:
        (loss of each token [b, s] or hidden states, loss function).
    """
    batch = to_micro_batch(next(data_iterator), torch.device(torch.cuda.current_device()))
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, partial(_reported_loss, batch)


def _reported_loss(batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """weighted_loss with figures as Bridge adds them up: over micro-batches and ranks, [sum, count] each."""
    loss, report = weighted_loss(batch, token_losses)
    figures = report["figures"]
    share = figures.new_tensor([1.0 / parallel_state.get_context_parallel_world_size()])  # ranks of a group share one micro-batch
    return loss, {"lm loss": torch.cat([figures[:1], share]), "context loss": figures[1:3]}
