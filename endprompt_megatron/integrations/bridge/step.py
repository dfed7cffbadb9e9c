"""Forward step for Megatron-Bridge, used as `pretrain(config, endprompt_forward_step)`. Bridge's own forward step passes no batch to middle
pipeline stages and no positions to the last stage, and rounds the sum of the loss weights to whole tokens.

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
    """Run the forward pass of one micro-batch. Every pipeline stage gets the positions of the micro-batch, because every stage rotates
    queries and keys.

    Args:
        data_iterator: iterator over the batches of EndPromptDatasetProvider.
        model: model chunk built by EndPromptModelProvider.
    Returns:
        (output, loss function). The output is the loss of each token [b, s] on the last pipeline stage, else hidden states.
    """
    batch = to_micro_batch(next(data_iterator), torch.device(torch.cuda.current_device()))
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, partial(_reported_loss, batch)


def _reported_loss(batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of weighted_loss, and its figures as [sum, count] tensors. Bridge sums these over micro-batches and ranks."""
    loss, report = weighted_loss(batch, token_losses)
    figures = report["figures"]
    share = figures.new_tensor([1.0 / parallel_state.get_context_parallel_world_size()])  # context-parallel ranks share one micro-batch
    return loss, {"lm loss": torch.cat([figures[:1], share]), "context loss": figures[1:3]}
