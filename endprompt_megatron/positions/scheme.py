"""The registry of position schemes. Positions depend only on the scheme, the seed, the sample index and the lengths. Every rank can
therefore compute the positions of its samples, and a resumed run draws the same positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.positions.endprompt_random import endprompt_random_positions
from endprompt_megatron.positions.pose import PoseSample, endprompt_pose_positions, pose_sample

_POSITIONS = 2  # part of the seed; makes the draws of positions independent of the draws of end prompts (data.prompts)
_POSE_TEXT_SPAN = 5  # PoSE truncates documents to five training lengths
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleLayout:
    """The lengths of one training sample.

    Attributes:
        num_context_tokens: a, number of physical tokens of the text.
        num_prompt_tokens: b, number of physical tokens of the end prompt; 0 for schemes without an end prompt.
        target_context_length: L, number of positions of the extended window.
        num_chunks: number of chunks of the text (`pose`) or of the end prompt (`endprompt_pose`); positions skip between them.
    """

    num_context_tokens: int
    num_prompt_tokens: int
    target_context_length: int
    num_chunks: int = 2


@dataclass(frozen=True)
class PositionScheme:
    """One way to assign positions to the tokens of a sample.

    Attributes:
        name: value of `method.position_scheme`.
        uses_end_prompt: whether the last tokens of the sample are an end prompt.
        varies_by_sample: whether two samples of the same lengths can have different positions. Fused RoPE kernels need the same positions
            for all samples of a micro-batch.
        place: function of (layout, seed, sample_index) that returns the positions, int64 [a + b].
        text_span: length of the source text from which a sample is chosen, as a multiple of the sample length.
        choose_text: function of (layout, seed, sample_index) that returns the indices of the chosen tokens in the source text,
            int64 [a + b]; None if `text_span` is 1 and all tokens are used.
    """

    name: str
    uses_end_prompt: bool
    varies_by_sample: bool
    place: Callable[[SampleLayout, int, int], IntArray]
    text_span: int = 1
    choose_text: Callable[[SampleLayout, int, int], IntArray] | None = None

    def shares_positions(self, *, prompt_lengths: list[int], micro_batch_size: int) -> bool:
        """Return whether all samples of a micro-batch have the same positions, so that one row of positions is enough.

        Args:
            prompt_lengths: b, the number of tokens, of each end prompt in the set.
            micro_batch_size: number of samples per micro-batch.
        """
        varies = self.varies_by_sample or (self.uses_end_prompt and len(set(prompt_lengths)) > 1)
        return micro_batch_size == 1 or not varies


def _random(seed: int, sample_index: int) -> np.random.Generator:
    return np.random.default_rng([seed, _POSITIONS, sample_index])


def _contiguous(layout: SampleLayout, seed: int, sample_index: int) -> IntArray:
    total = layout.num_context_tokens + layout.num_prompt_tokens
    return contiguous_positions(total, target_context_length=layout.target_context_length)


def _endprompt(layout: SampleLayout, seed: int, sample_index: int) -> IntArray:
    return endprompt_positions(layout.num_context_tokens, layout.num_prompt_tokens, target_context_length=layout.target_context_length)


def _endprompt_random(layout: SampleLayout, seed: int, sample_index: int) -> IntArray:
    return endprompt_random_positions(
        layout.num_context_tokens,
        layout.num_prompt_tokens,
        target_context_length=layout.target_context_length,
        random=_random(seed, sample_index),
    )


def _endprompt_pose(layout: SampleLayout, seed: int, sample_index: int) -> IntArray:
    return endprompt_pose_positions(
        layout.num_context_tokens,
        layout.num_prompt_tokens,
        target_context_length=layout.target_context_length,
        random=_random(seed, sample_index),
        num_chunks=layout.num_chunks,
    )


def _pose(layout: SampleLayout, seed: int, sample_index: int) -> PoseSample:
    return pose_sample(
        layout.num_context_tokens + layout.num_prompt_tokens,
        num_text_tokens=_POSE_TEXT_SPAN * (layout.num_context_tokens + layout.num_prompt_tokens),
        target_context_length=layout.target_context_length,
        random=_random(seed, sample_index),
        num_chunks=layout.num_chunks,
    )


SCHEMES: dict[str, PositionScheme] = {
    scheme.name: scheme
    for scheme in (
        PositionScheme("contiguous", uses_end_prompt=False, varies_by_sample=False, place=_contiguous),
        PositionScheme("endprompt", uses_end_prompt=True, varies_by_sample=False, place=_endprompt),
        PositionScheme("endprompt_random", uses_end_prompt=True, varies_by_sample=True, place=_endprompt_random),
        PositionScheme("endprompt_pose", uses_end_prompt=True, varies_by_sample=True, place=_endprompt_pose),
        PositionScheme(
            "pose",
            uses_end_prompt=False,
            varies_by_sample=True,
            place=lambda layout, seed, index: _pose(layout, seed, index).positions,
            text_span=_POSE_TEXT_SPAN,
            choose_text=lambda layout, seed, index: _pose(layout, seed, index).text,
        ),
    )
}


def get_scheme(name: str) -> PositionScheme:
    """Return the scheme with this name.

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
    """
    if name not in SCHEMES:
        raise ConfigError(f"method.position_scheme={name}: no such scheme. Choose one of {', '.join(sorted(SCHEMES))}.")
    return SCHEMES[name]
