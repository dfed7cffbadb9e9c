"""EndPrompt with a random start of the end prompt, as in the released code. The start of each sample is drawn uniformly from the positions
after the text at which the whole end prompt fits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from endprompt_megatron.positions.endprompt import check_segments

IntArray = npt.NDArray[np.int64]


def endprompt_random_positions(
    num_context_tokens: int, num_prompt_tokens: int, *, target_context_length: int, random: np.random.Generator
) -> IntArray:
    """Return the positions of one sample. The context starts at 0. The end prompt is one contiguous segment with a random start.

    Args:
        num_context_tokens: a, number of physical tokens of the context segment, >= 1.
        num_prompt_tokens: b, number of physical tokens of the end prompt, >= 1.
        target_context_length: L, number of positions of the extended window.
        random: generator that draws the start.
    Returns:
        int64 [a + b], strictly increasing; the prompt starts in [a, L - b].
    Raises:
        ConfigError: a segment is empty, or a + b > L.
    Source: the released collator of EndPrompt (arXiv 2605.14589): start uniform in [a, L - b].
    """
    check_segments(num_context_tokens, num_prompt_tokens, target_context_length)
    start = random.integers(num_context_tokens, target_context_length - num_prompt_tokens, endpoint=True)
    return np.concatenate([np.arange(num_context_tokens), np.arange(start, start + num_prompt_tokens)]).astype(np.int64)
