"""Positions that skip (PoSE): a sample is cut into chunks, and every chunk but the first is moved up by what was skipped before it.
Here cut over the text, as PoSE does, or over the end prompt alone, as EndPrompt's variant ET(PoSE) does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.endprompt import check_segments

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PoseSample:
    """One PoSE sample.

    Attributes:
        positions: int64 [c], strictly increasing, within [0, L - 1].
        text: int64 [c], which tokens of the running text the sample holds, strictly increasing.
    """

    positions: IntArray
    text: IntArray


def pose_sample(
    num_tokens: int, *, num_text_tokens: int, target_context_length: int, random: np.random.Generator, num_chunks: int = 2
) -> PoseSample:
    """One PoSE sample: chunks of the running text, the first from its start at position 0, the others from later on and moved up.

    With two chunks the first has r tokens, r uniform in [1, (c + 1) // 2]; the second is the other c - r tokens from a uniformly drawn
    later place of the text, its positions moved up by a skip uniform in [0, L - c]. With n chunks the first n - 1 draw their lengths so
    one after the other, and skips in the text and in the positions are uniform and in order.

    Args:
        num_tokens: c, physical tokens of the sample, >= 1.
        num_text_tokens: running text to choose from, >= c.
        target_context_length: L, in positions.
        random: draws lengths and skips.
        num_chunks: n, >= 1; a sample of fewer tokens has as many chunks as tokens.
    Raises:
        ConfigError: no tokens, more than L, more than there is text, or no chunk.
    Source: PoSE (arXiv 2309.10400); the draws for two chunks are those of its training code.
    """
    if not 1 <= num_tokens <= min(target_context_length, num_text_tokens):
        raise ConfigError(
            f"{num_tokens} tokens do not fit into target_context_length={target_context_length} or the text of {num_text_tokens} tokens: a "
            f"sample holds 1 to target_context_length tokens. Set a smaller data.seq_length."
        )
    if num_chunks < 1:
        raise ConfigError(f"method.num_chunks={num_chunks}: a sample has at least one chunk. The default is 2.")
    lengths = _chunk_lengths(num_tokens, num_chunks, random)

    def skipping(room: int) -> IntArray:
        skips = np.sort(random.integers(0, room, size=len(lengths) - 1, endpoint=True))
        return np.arange(num_tokens, dtype=np.int64) + np.repeat(np.concatenate([[0], skips]).astype(np.int64), lengths)

    text = skipping(num_text_tokens - num_tokens)
    return PoseSample(skipping(target_context_length - num_tokens), text)


def endprompt_pose_positions(
    num_context_tokens: int, num_prompt_tokens: int, *, target_context_length: int, random: np.random.Generator, num_chunks: int = 2
) -> IntArray:
    """Positions of one ET(PoSE) sample: the context from 0, the end prompt, never the text, in pieces that skip.

    The prompt is cut into pieces of nearly equal length, the first ones longer; the starts of the pieces skip uniformly and in order, the
    first included, so that all of them lie in [a, L - 1].

    Args:
        num_context_tokens: a, physical tokens of the context segment, >= 1.
        num_prompt_tokens: b, physical tokens of the end prompt, >= 1.
        target_context_length: L, in positions.
        random: draws the skips.
        num_chunks: pieces of the prompt, >= 1; a prompt of fewer tokens has as many pieces as tokens.
    Returns:
        int64 [a + b], strictly increasing.
    Raises:
        ConfigError: a segment is empty, a + b > L, or no piece.
    Source: EndPrompt (arXiv 2605.14589), ET(PoSE).
    """
    check_segments(num_context_tokens, num_prompt_tokens, target_context_length)
    if num_chunks < 1:
        raise ConfigError(f"method.num_chunks={num_chunks}: the end prompt has at least one piece. The default is 2.")
    pieces = min(num_chunks, num_prompt_tokens)
    lengths = [num_prompt_tokens // pieces + (index < num_prompt_tokens % pieces) for index in range(pieces)]
    room = target_context_length - num_context_tokens - num_prompt_tokens
    skips = np.sort(random.integers(0, room, size=pieces, endpoint=True))
    positions = np.arange(num_context_tokens + num_prompt_tokens, dtype=np.int64)
    positions[num_context_tokens:] += np.repeat(skips, lengths)
    return positions


def _chunk_lengths(num_tokens: int, num_chunks: int, random: np.random.Generator) -> list[int]:
    """Every chunk but the last has at most its equal share of what is left, and leaves a token for each that follows."""
    lengths, left = [], num_tokens
    for chunks_left in range(min(num_chunks, num_tokens), 1, -1):
        longest = max(1, (left + 1) // chunks_left)
        lengths.append(int(random.integers(1, min(longest, left - chunks_left + 1), endpoint=True)))
        left -= lengths[-1]
    return [*lengths, left]
