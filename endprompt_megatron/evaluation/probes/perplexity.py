"""Measure the perplexity of held-out text by window length, on contiguous positions. The same tokens are scored at every length, in windows
that either do not overlap or slide, so that a longer window can help only through its additional context. One exception: if windows do not
overlap, the first token of each window is not scored, so shorter windows score fewer tokens.

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
from endprompt_megatron.inference.forward import ForwardModel, chunk_ranges
from endprompt_megatron.model.gpt import EndPromptGPTModel


def held_out_blocks(texts: Iterable[str], encode: Callable[[str], list[int]], *, block_length: int, num_tokens: int) -> np.ndarray:
    """Return the first tokens of long held-out documents.

    Args:
        texts: documents, in a fixed order. Documents shorter than a block are skipped.
        encode: text -> token ids without special tokens.
        block_length: number of tokens per block, which is the longest window. Each document provides one block.
        num_tokens: total number of tokens, rounded up to whole blocks. The result is smaller if there are too few documents.
    Returns:
        int64 [blocks, block_length].
    Raises:
        DataError: every document is shorter than a block.
    """
    num_blocks = math.ceil(num_tokens / block_length)
    blocks: list[list[int]] = []
    longest = 0
    for text in texts:
        if len(text) < block_length:  # too short if a token has at least one character
            longest = max(longest, len(text))
            continue
        ids = encode(text)
        longest = max(longest, len(ids))
        if len(ids) >= block_length:
            blocks.append(ids[:block_length])
        if len(blocks) == num_blocks:
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
    """Return the perplexity of the blocks in windows of each length. The arguments are those of losses_by_window.

    Returns:
        {length: exp(mean negative log-likelihood per token)}, the same on every rank.
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
    """Return the negative log-likelihood of the blocks in windows of each length. Data-parallel ranks split the windows.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        blocks: int64 [blocks, longest window], token ids.
        lengths: window lengths in tokens, at most the length of a block.
        device: device of the model.
        label: text of the progress display.
        stride: step of a sliding window in tokens, less than every length. Each token is then scored with at least window - stride tokens
            of context, or with all earlier tokens of its block if there are fewer. 0: windows do not overlap, and the first token of each
            window is not scored.
        prefill_chunk: number of tokens per chunk in which longer windows are read; 0 reads each window in one pass.
    Returns:
        {length: (sum in nats, number of scored tokens) of each block}, the same on every rank.
    """
    forward = ForwardModel(model, device=device)
    windows = _windows(blocks.shape[1], lengths, stride)
    work = [(block, start) for block in range(len(blocks)) for start in windows]

    def score(item: tuple[int, int]) -> list[float] | None:
        block, start = item
        ids = blocks[block, start : start + max(scored.length for scored in windows[start])].tolist()
        losses = _losses(forward, ids, prefill_chunk)
        return None if losses is None else [float(losses[scored.first - 1 : scored.end - 1].sum()) for scored in windows[start]]

    found = {length: [(0.0, 0)] * len(blocks) for length in lengths}
    for (block, start), sums in zip(work, forward.map_over_data_parallel(work, score, label=f"perplexity, {label}"), strict=True):
        for scored, loss in zip(windows[start], sums, strict=True):
            total, count = found[scored.length][block]
            found[scored.length][block] = (total + loss, count + scored.end - scored.first)
    return found


def _losses(forward: ForwardModel, ids: list[int], prefill_chunk: int) -> torch.Tensor | None:
    """Return the negative log-likelihood of every token after the first, float64 [w - 1]."""
    ranges = chunk_ranges(len(ids) - 1, prefill_chunk)
    with forward.cached(len(ids) - 1) if len(ranges) > 1 else nullcontext():
        losses = [forward.losses(ids[start:end], ids[start + 1 : end + 1], first_position=start) for start, end in ranges]
    return torch.cat(losses).double() if forward.has_results else None


@dataclass(frozen=True)
class _Window:
    """A window of `length` tokens. Its tokens from `first` to `end` (exclusive), counted from the start of the window, are scored."""

    length: int
    first: int
    end: int


def _windows(block_length: int, lengths: list[int], stride: int) -> dict[int, list[_Window]]:
    """Return {start in a block: windows that begin at this start}. Attention is causal, so a short window has the same losses as the
    beginning of a longer window with the same start, and only the longest window needs a forward pass."""
    windows: dict[int, list[_Window]] = {}
    for length in lengths:
        last = block_length - length
        for start in range(0, last + 1, stride or length):
            windows.setdefault(start, []).append(_Window(length, length - stride if stride and start else 1, length))
        if stride and last % stride:  # one more window scores the rest of the block
            windows.setdefault(last, []).append(_Window(length, length - last % stride, length))
    return windows
