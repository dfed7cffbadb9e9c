"""Skip-wise positions (PoSE): a sample is cut into chunks, and the positions skip forward between chunks. The chunks are cut from the text,
as in PoSE, or from the end prompt only, as in EndPrompt's variant ET(PoSE)."""

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
        text: int64 [c], indices of the sample's tokens in the running text, strictly increasing.
    """

    positions: IntArray
    text: IntArray


def pose_sample(
    num_tokens: int, *, num_text_tokens: int, target_context_length: int, random: np.random.Generator, num_chunks: int = 2
) -> PoseSample:
    """One PoSE sample. The first chunk starts at token 0 of the running text and at position 0; later chunks skip text and positions.

    With two chunks, the first has r tokens, r uniform in [1, (c + 1) // 2]. The second has the other c - r tokens, from a uniformly drawn
    later place of the text; its positions are shifted by a skip uniform in [0, L - c]. With n chunks, the first n - 1 draw their lengths
    one after the other by the same rule. The skips in the text and in the positions are uniform draws in ascending order.

    Args:
        num_tokens: c, physical tokens of the sample, >= 1.
        num_text_tokens: length of the running text, >= c.
        target_context_length: L, in positions.
        random: generator that draws lengths and skips.
        num_chunks: n, >= 1; a sample of fewer tokens has one chunk per token.
    Raises:
        ConfigError: num_tokens < 1, more tokens than L or than the text has, or num_chunks < 1.
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
    """Positions of one ET(PoSE) sample: the context contiguous from 0, the end prompt in pieces with skips between them.

    The prompt is cut into pieces whose lengths differ by at most one, longer ones first. Every piece, including the first, is shifted by a
    skip; the skips are uniform draws in ascending order. All pieces lie in [a, L - 1].

    Args:
        num_context_tokens: a, physical tokens of the context segment, >= 1.
        num_prompt_tokens: b, physical tokens of the end prompt, >= 1.
        target_context_length: L, in positions.
        random: generator that draws the skips.
        num_chunks: pieces of the prompt, >= 1; a prompt of fewer tokens has one piece per token.
    Returns:
        int64 [a + b], strictly increasing.
    Raises:
        ConfigError: a segment is empty, a + b > L, or num_chunks < 1.
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
    """Draw the chunk lengths. Every chunk but the last takes at most an equal share of the remaining tokens and leaves one for each later
    chunk."""
    lengths, left = [], num_tokens
    for chunks_left in range(min(num_chunks, num_tokens), 1, -1):
        longest = max(1, (left + 1) // chunks_left)
        lengths.append(int(random.integers(1, min(longest, left - chunks_left + 1), endpoint=True)))
        left -= lengths[-1]
    return [*lengths, left]
