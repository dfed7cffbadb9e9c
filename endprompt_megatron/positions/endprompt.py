"""Positions of EndPrompt. A sample has two segments. The context has contiguous positions from 0, and the end prompt after it has the last
positions of the target window. A short training sequence therefore contains the longest distances of the window."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError

IntArray = npt.NDArray[np.int64]


def endprompt_positions(num_context_tokens: int, num_prompt_tokens: int, *, target_context_length: int) -> IntArray:
    """Return the positions of one EndPrompt sample. The context starts at position 0, and the end prompt ends at position L - 1.

    Args:
        num_context_tokens: a, number of physical tokens of the context segment, >= 1.
        num_prompt_tokens: b, number of physical tokens of the end prompt, >= 1.
        target_context_length: L, number of positions of the extended window.
    Returns:
        int64 [a + b], strictly increasing; the last value is L - 1.
    Raises:
        ConfigError: a segment is empty, or a + b > L, so that the segments would overlap.
    Source: EndPrompt (arXiv 2605.14589), eq. 5.
    """
    check_segments(num_context_tokens, num_prompt_tokens, target_context_length)
    context = np.arange(num_context_tokens, dtype=np.int64)
    prompt = np.arange(target_context_length - num_prompt_tokens, target_context_length, dtype=np.int64)
    return np.concatenate([context, prompt])


def check_segments(num_context_tokens: int, num_prompt_tokens: int, target_context_length: int) -> None:
    """Check that a context segment and an end prompt fit into the target window without overlap.

    Raises:
        ConfigError: a segment is empty, or a + b > L.
    """
    if num_context_tokens < 1 or num_prompt_tokens < 1:
        raise ConfigError(
            f"context segment of {num_context_tokens} tokens and end prompt of {num_prompt_tokens}: both need at least one token. "
            f"Set a larger data.seq_length or a shorter end prompt (method.end_prompts, method.end_prompt_length)."
        )
    if num_context_tokens + num_prompt_tokens > target_context_length:
        raise ConfigError(
            f"{num_context_tokens} context + {num_prompt_tokens} prompt tokens exceed target_context_length="
            f"{target_context_length}: the segments would overlap. Set a smaller data.seq_length."
        )
