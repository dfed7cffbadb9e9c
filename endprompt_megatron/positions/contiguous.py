"""Contiguous positions 0, 1, 2, ...: those of pretraining, and of the control that EndPrompt is compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError

IntArray = npt.NDArray[np.int64]


def contiguous_positions(num_tokens: int, *, target_context_length: int) -> IntArray:
    """Positions of one contiguous sample.

    Args:
        num_tokens: physical tokens of the sample, >= 1.
        target_context_length: L, in positions.
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
