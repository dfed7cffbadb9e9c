"""Contiguous positions 0, 1, 2, ..., as in pretraining. The control that EndPrompt is compared with also uses them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError

IntArray = npt.NDArray[np.int64]


def contiguous_positions(num_tokens: int, *, target_context_length: int) -> IntArray:
    """Return the positions of one contiguous sample.

    Args:
        num_tokens: number of physical tokens of the sample, >= 1.
        target_context_length: L, number of positions of the extended window.
    Returns:
        int64 [num_tokens]: 0 .. num_tokens - 1.
    Raises:
        ConfigError: the sample is empty or longer than the target window.
    """
    if not 1 <= num_tokens <= target_context_length:
        raise ConfigError(
            f"{num_tokens} tokens do not fit into target_context_length={target_context_length}: a sample holds 1 to "
            f"target_context_length tokens. Set a smaller data.seq_length."
        )
    return np.arange(num_tokens, dtype=np.int64)
