"""Skip-wise positions (PoSE). A sample is cut into chunks, and the positions skip forward between chunks. PoSE cuts the whole text into
chunks, and EndPrompt's variant ET(PoSE) cuts only the end prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.endprompt import check_segments

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PoseSample:
    """One PoSE sample of c tokens in a window of L positions.

    Attributes:
        positions: int64 [c], strictly increasing, within [0, L - 1].
        text: int64 [c], strictly increasing indices of the sample's tokens in the source text.
    """

    positions: IntArray
    text: IntArray


def pose_sample(
    num_tokens: int, *, num_text_tokens: int, target_context_length: int, random: np.random.Generator, num_chunks: int = 2
) -> PoseSample:
    """Draw one PoSE sample. The first chunk starts at token 0 of the source text and at position 0. Later chunks skip tokens of the text
    and positions.

    With two chunks, the first has r tokens, where r is uniform in [1, (c + 1) // 2], and the second has the other c - r tokens. The tokens
    of the second chunk are shifted in the text by a skip that is uniform in [0, num_text_tokens - c]. Their positions are shifted by a skip
    that is uniform in [0, L - c]. With n chunks, the lengths of the first n - 1 are drawn one after the other (see _chunk_lengths). The
    skips in the text and in the positions are then n - 1 uniform draws each, sorted in ascending order.

    Args:
        num_tokens: c, number of physical tokens of the sample, >= 1.
        num_text_tokens: number of tokens of the source text, >= c.
        target_context_length: L, number of positions of the extended window.
        random: generator that draws lengths and skips.
        num_chunks: n, number of chunks, >= 1; a sample of fewer than n tokens has one chunk per token.
    Raises:
        ConfigError: num_tokens < 1, num_tokens exceeds L or num_text_tokens, or num_chunks < 1.
    Source: PoSE (arXiv 2309.10400). The draws for two chunks follow its training code.
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
    """Return the positions of one ET(PoSE) sample. The context is contiguous from position 0. The end prompt is cut into pieces with skips
    between them.

    The lengths of the pieces differ by at most one, and longer pieces come first. Every piece, including the first, is shifted by a skip.
    The skips are uniform draws, sorted in ascending order. All pieces lie in [a, L - 1].

    Args:
        num_context_tokens: a, number of physical tokens of the context segment, >= 1.
        num_prompt_tokens: b, number of physical tokens of the end prompt, >= 1.
        target_context_length: L, number of positions of the extended window.
        random: generator that draws the skips.
        num_chunks: number of pieces of the prompt, >= 1; a prompt of fewer tokens has one piece per token.
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
    """Draw the chunk lengths in order. If n chunks (at least two) and m tokens remain, the next chunk has 1 to (m + 1) // n tokens, which
    leaves at least one token for each later chunk. The last chunk has all remaining tokens."""
    lengths, left = [], num_tokens
    for chunks_left in range(min(num_chunks, num_tokens), 1, -1):
        longest = max(1, (left + 1) // chunks_left)
        lengths.append(int(random.integers(1, min(longest, left - chunks_left + 1), endpoint=True)))
        left -= lengths[-1]
    return [*lengths, left]
