"""Perplexity of held-out text by window length, on ordinary positions: the same tokens are scored at every length, in windows that do
not overlap, so that a longer window can only help through the context it adds.

Shapes: w tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from endprompt_megatron.errors import DataError
from endprompt_megatron.log import track
from endprompt_megatron.model.gpt import EndPromptGPTModel


def held_out_blocks(
    texts: Iterable[str], encode: Callable[[str], list[int]], *, block_length: int, num_tokens: int
) -> np.ndarray:
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
            f"evaluation.text: no held-out document has {block_length} tokens (the longest has {longest}). "
            f"Use longer documents, or a smaller maximum in evaluation.perplexity_lengths (evaluation.lengths where that is empty)."
        )
    return np.array(blocks, dtype=np.int64)


@torch.no_grad()
def perplexity_by_window(
    model: EndPromptGPTModel, blocks: np.ndarray, lengths: list[int], *, device: torch.device, label: str
) -> dict[str, float]:
    """Perplexity of the blocks, cut into windows of each length.

    Args:
        model: whole on this rank, in evaluation mode.
        blocks: int64 [blocks, longest window].
        lengths: window lengths in tokens; each must not exceed the blocks.
        device: of the model.
        label: for the progress display.
    Returns:
        {length: exp(mean negative log-likelihood a token)}; the first token of a window is not scored.
    """
    work = [(block, start, shared) for block in blocks for start, shared in _windows(blocks.shape[1], lengths).items()]
    total: dict[int, list[float]] = {length: [0.0, 0.0] for length in lengths}
    for block, start, shared in track(work, f"perplexity, {label}", total=len(work)):
        ids = torch.from_numpy(block[start : start + max(shared)]).to(device)[None]
        losses = model(ids[:, :-1], torch.arange(ids.shape[1] - 1, device=device), labels=ids[:, 1:])[0].double()
        for length in shared:
            total[length][0] += float(losses[: length - 1].sum())
            total[length][1] += length - 1
    return {str(length): math.exp(loss / count) for length, (loss, count) in total.items()}


def _windows(block_length: int, lengths: list[int]) -> dict[int, list[int]]:
    """{start in a block: lengths that have a window there}. A short window is the beginning of a longer one at the same start, and
    sees nothing after its end: the longest alone has to be computed."""
    windows: dict[int, list[int]] = {}
    for length in lengths:
        for start in range(0, block_length - length + 1, length):
            windows.setdefault(start, []).append(length)
    return windows
