"""The forward step of training: the forward pass of a micro-batch, the weighted next-token loss, and metrics of the loss.

Shapes: b micro-batch, S physical sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from endprompt_megatron.data.batch import MicroBatch, to_micro_batch

LOSS_FIGURES = ("loss", "context_loss_sum", "context_tokens", "prompt_loss_sum", "prompt_tokens")


def make_forward_step(device: torch.device) -> Callable[[Iterator[dict[str, Tensor]], torch.nn.Module], tuple[Tensor, Callable]]:
    """Return the forward step function that Megatron's schedules call on every pipeline stage.

    Args:
        device: device of the model.
    """

    def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = to_micro_batch(next(batches), device)
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return output, partial(weighted_loss, batch)

    return forward_step


def weighted_loss(batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted next-token loss of a micro-batch.

    Args:
        batch: micro-batch with normalised loss weights.
        token_losses: float32 [b, S].
    Returns:
        (loss, {"figures": float32 [5] in the order of LOSS_FIGURES}). The sums in `figures` are unweighted, so that sums and counts give
        the separate mean losses of context and prompt.
    Source: EndPrompt (arXiv 2605.14589), eq. 11.
    """
    token_losses = token_losses.float()
    loss = (token_losses * batch.loss_weights).sum()
    with torch.no_grad():
        context = batch.counted & ~batch.prompt_mask
        prompt = batch.counted & batch.prompt_mask
        detached = token_losses.detach()
        figures = torch.stack(
            [loss.detach(), (detached * context).sum(), context.sum().float(), (detached * prompt).sum(), prompt.sum().float()]
        )
    return loss, {"figures": figures}
