"""A rotary embedding for explicit position_ids. Megatron-Core's own embedding computes its table from the sequence length and caches it, so
it ignores position_ids.

Shapes: b is the micro-batch size, s the number of tokens on this rank, n the number of heads, d the head dimension. Megatron's order is
[s, b, n, d].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from endprompt_megatron.rope.scaling import RopeScaling


class PositionRotaryEmbedding(RotaryEmbedding):
    """Computes the rotary angles, in float32, of the positions that `at(position_ids)` sets.

    Args:
        scaling: scaling that computes the frequencies; `set_scaling` replaces it. The scaling's attention factor is applied by
            EndPromptGPTModel.set_rope, not here, because it scales cosine and sine and not the angles.
    """

    def __init__(self, scaling: RopeScaling):
        super().__init__(kv_channels=scaling.head_dim, rotary_percent=1.0, rotary_base=int(scaling.rope_theta), use_cpu_initialization=True)
        self._position_ids: Tensor | None = None
        self.set_scaling(scaling)

    def set_scaling(self, scaling: RopeScaling) -> None:
        """Use the frequencies of `scaling` from the next forward pass on."""
        self.scaling = scaling
        self.inv_freq = torch.from_numpy(scaling.inv_freq())

    @contextmanager
    def at(self, position_ids: Tensor) -> Iterator[None]:
        """Use these positions for the forward passes inside the block.

        Args:
            position_ids: int64, positions of the tokens on this rank, already sliced for context parallelism. The shape is [s] if all
                samples of the micro-batch have the same positions, and [b, s] otherwise.
        Raises:
            ValueError: position_ids has another number of dimensions.
        """
        if position_ids.dim() not in (1, 2):
            raise ValueError(f"position_ids of shape {tuple(position_ids.shape)}: must be [s] or [b, s]")
        self._position_ids = position_ids
        try:
            yield
        finally:
            self._position_ids = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: object = None) -> Tensor:
        """Return the angles in float32, [s, 1, 1, d] for positions [s] and [s, b, 1, d] for positions [b, s].

        The arguments are those of Megatron's class. `max_seq_len` is the length of the whole sequence over all context parallel ranks, and
        is only used to check the number of positions. The angles are not cached, because computing them costs far less than one layer.
        """
        if self._position_ids is None:
            raise RuntimeError("the rotary embedding was called outside EndPromptGPTModel.forward, so it has no positions")
        context_parallel_size = self.cp_group.size() if self.cp_group is not None else 1
        if self._position_ids.shape[-1] * context_parallel_size != max_seq_len:
            raise RuntimeError(
                f"{self._position_ids.shape[-1]} position_ids for {max_seq_len} tokens over {context_parallel_size} context-parallel "
                f"ranks: every token needs a position"
            )
        if self.inv_freq.device != self._position_ids.device:
            self.inv_freq = self.inv_freq.to(self._position_ids.device)
        angles = self._position_ids.to(torch.float32).unsqueeze(-1) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        if angles.dim() == 2:
            return angles[:, None, None, :]
        return angles.transpose(0, 1).unsqueeze(2).contiguous()
