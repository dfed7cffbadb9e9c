"""Perplexity of held-out text by window length, on ordinary positions: the same tokens are scored at every length, in windows that do
not overlap or in sliding ones, so that a longer window can only help through the context it adds.

Shapes: w tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endprompt_megatron.errors import DataError
from endprompt_megatron.inference.forward import Replica, pieces
from endprompt_megatron.model.gpt import EndPromptGPTModel


def held_out_blocks(texts: Iterable[str], encode: Callable[[str], list[int]], *, block_length: int, num_tokens: int) -> np.ndarray:
    """The first tokens of long held-out documents.

    Args:
        texts: documents, in a fixed order.
        encode: text -> token ids without special tokens.
        block_length: tokens taken of each document: the longest window.
        num_tokens: about how many tokens in all; rounded up to whole blocks.
    Returns:
        int64 [blocks, block_length].
    Raises:
        DataError: no document is long enough.
    """
    wanted = math.ceil(num_tokens / block_length)
    blocks: list[list[int]] = []
    longest = 0
    for text in texts:
        if len(text) < block_length:  # a token has at least one character
            longest = max(longest, len(text))
            continue
        ids = encode(text)
        longest = max(longest, len(ids))
        if len(ids) >= block_length:
            blocks.append(ids[:block_length])
        if len(blocks) == wanted:
            break
    if not blocks:
        raise DataError(
            f"probes.text (suite.perplexity.text): no held-out document has {block_length} tokens (the longest has {longest}). "
            f"Use longer documents, or a smaller maximum in probes.perplexity_lengths, probes.lengths where that is empty "
            f"(suite.lengths)."
        )
    return np.array(blocks, dtype=np.int64)


def perplexity_by_window(
    model: EndPromptGPTModel | list[EndPromptGPTModel], blocks: np.ndarray, lengths: list[int], **options: Any
) -> dict[str, float]:
    """Perplexity of the blocks, read in windows of each length. Arguments as losses_by_window.

    Returns:
        {length: exp(mean negative log-likelihood a token)}, the same on every rank.
    """
    found = losses_by_window(model, blocks, lengths, **options)
    totals = {length: tuple(map(sum, zip(*of_blocks, strict=True))) for length, of_blocks in found.items()}
    return {str(length): math.exp(loss / count) for length, (loss, count) in totals.items()}


@torch.no_grad()
def losses_by_window(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    blocks: np.ndarray,
    lengths: list[int],
    *,
    device: torch.device,
    label: str,
    stride: int = 0,
    prefill_chunk: int = 0,
) -> dict[int, list[tuple[float, int]]]:
    """Negative log-likelihood of the blocks, read in windows of each length; data-parallel copies of the model share the windows.

    Args:
        model: the model, or this rank's model chunks; in evaluation mode.
        blocks: int64 [blocks, longest window].
        lengths: window lengths in tokens; each must not exceed the blocks.
        device: of the model.
        label: for the progress display.
        stride: how far a sliding window moves at once, less than every length: a token is then scored with at least window - stride tokens
            before it, or all that its block has. 0: windows that do not overlap, whose first token is not scored.
        prefill_chunk: a longer window is read in pieces of so many tokens; 0 reads it whole.
    Returns:
        {length: (sum in nats, tokens scored) of each block}, the same on every rank.
    """
    replica = Replica(model, device=device)
    windows = _windows(blocks.shape[1], lengths, stride)
    work = [(block, start) for block in range(len(blocks)) for start in windows]

    def score(item: tuple[int, int]) -> list[float] | None:
        block, start = item
        ids = blocks[block, start : start + max(scored.length for scored in windows[start])].tolist()
        losses = _losses(replica, ids, prefill_chunk)
        return None if losses is None else [float(losses[scored.first - 1 : scored.past - 1].sum()) for scored in windows[start]]

    found = {length: [(0.0, 0)] * len(blocks) for length in lengths}
    for (block, start), sums in zip(work, replica.share_out(work, score, label=f"perplexity, {label}"), strict=True):
        for scored, loss in zip(windows[start], sums, strict=True):
            total, count = found[scored.length][block]
            found[scored.length][block] = (total + loss, count + scored.past - scored.first)
    return found


def _losses(replica: Replica, ids: list[int], prefill_chunk: int) -> torch.Tensor | None:
    """Negative log-likelihood of the tokens after the first, float64 [w - 1]."""
    read = pieces(len(ids) - 1, prefill_chunk)
    with replica.cached(len(ids) - 1) if len(read) > 1 else nullcontext():
        losses = [replica.losses(ids[start:past], ids[start + 1 : past + 1], first_position=start) for start, past in read]
    return torch.cat(losses).double() if replica.has_results else None


@dataclass(frozen=True)
class _Window:
    """A window of `length` tokens that scores its tokens from `first` up to `past`, counted from its own start."""

    length: int
    first: int
    past: int


def _windows(block_length: int, lengths: list[int], stride: int) -> dict[int, list[_Window]]:
    """{start in a block: the windows there}. A short window is the beginning of a longer one at the same start, and sees nothing after its
    end: the longest alone has to be computed."""
    windows: dict[int, list[_Window]] = {}
    for length in lengths:
        last = block_length - length
        for start in range(0, last + 1, stride or length):
            windows.setdefault(start, []).append(_Window(length, length - stride if stride and start else 1, length))
        if stride and last % stride:  # the block's end
            windows.setdefault(last, []).append(_Window(length, length - last % stride, length))
    return windows
