"""Megatron's GPTModel with rotary positions taken from position_ids.

Shapes: b micro-batch, s physical sequence, h hidden size, v vocabulary share of this rank. Tensors are [s, b, h] as in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from endprompt_megatron.mcore.cpu import without_device_shim
from endprompt_megatron.mcore.rope_concentration import rope_concentrations, set_rope_concentration
from endprompt_megatron.model.cross_entropy import sliced_cross_entropy
from endprompt_megatron.model.sdpa import KeyValueCache, TorchSDPA
from endprompt_megatron.rope.embedding import PositionRotaryEmbedding
from endprompt_megatron.rope.scaling import RopeScaling


class EndPromptGPTModel(GPTModel):
    """A GPTModel whose rotary embedding uses position_ids.

    Args:
        config, transformer_layer_spec, max_sequence_length: same as for GPTModel.
        vocab_size: number of rows of the embedding, including padding.
        num_real_tokens: number of tokens of the vocabulary. The padding rows after these tokens get no probability.
        rope: rotary frequencies.
        kwargs: further arguments of GPTModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: Any,
        vocab_size: int,
        max_sequence_length: int,
        *,
        num_real_tokens: int,
        rope: RopeScaling,
        **kwargs: Any,
    ):
        super().__init__(config, transformer_layer_spec, vocab_size, max_sequence_length, position_embedding_type="rope", **kwargs)
        self.rotary_pos_emb = PositionRotaryEmbedding(rope)
        self.set_rope(rope)
        self.num_real_tokens = num_real_tokens

    def set_rope(self, rope: RopeScaling) -> None:
        """Use the frequencies and the attention factor of `rope` from the next forward pass on, e.g. to evaluate the base model with
        its own frequencies."""
        self.rotary_pos_emb.set_scaling(rope)
        set_rope_concentration(self, rope.attention_factor)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run GPTModel.forward, and rotate every token to its position in position_ids.

        Args:
            input_ids: [b, s] (None on pipeline stages without the embedding).
            position_ids: [s] if all samples of the micro-batch share their positions, else [b, s]. Required on every pipeline stage.
        Returns:
            On the last pipeline stage, the loss of each token [b, s] if labels are given, else logits [b, s, v]. On other stages, hidden
            states [s, b, h].
        Raises:
            AssertionError: the samples have different positions and the rotary kernel is fused.
        """
        if self.config.apply_rope_fusion and position_ids.dim() == 2:
            if position_ids.shape[0] > 1:
                raise AssertionError(
                    f"position_ids {tuple(position_ids.shape)}: the fused rotary kernel supports one row for the whole micro-batch, and "
                    f"would rotate every sample to the positions of the first"
                )
            position_ids = position_ids[0]
        # the overhead of the shim matters when decoding token by token; training needs the shim because recomputation names devices
        device_shim = nullcontext() if torch.is_grad_enabled() else without_device_shim()
        with device_shim, self.rotary_pos_emb.at(position_ids):
            return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross-entropy of each token.

        Padding rows of the vocabulary get no probability, so that the loss is the same for every tensor-parallel size. If the whole
        vocabulary is on this rank, the loss is computed in slices of rows without copying the logits.

        Args:
            labels: [b, s].
            logits: [s, b, v].
        Returns:
            float32 [b, s].
        """
        share = logits.shape[-1]
        first_token = self.pg_collection.tp.rank() * share
        real = min(max(self.num_real_tokens - first_token, 0), share)
        if share == self.vocab_size:
            by_token = labels.t()
            flat = sliced_cross_entropy(logits.flatten(0, 1), by_token.reshape(-1), num_real_tokens=real)
            return flat.view(by_token.shape).t()
        if real < share:
            padding = torch.arange(share, device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return super().compute_language_model_loss(labels, logits)

    @contextmanager
    def logits_of(self, rows: slice | Sequence[int]) -> Iterator[None]:
        """Compute logits only for the tokens with the indices `rows` inside the block, because a probe of a long context needs the logits
        of only a few of its tokens. Sequence parallelism is not supported, because a rank then holds only a part of the sequence."""
        hook = self.output_layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows], *inputs[1:]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set the model up for probes and generation inside the block. Attention is torch SDPA, which supports a key/value cache and
        branches. FP8 is off, because FP8 matrix products require the number of tokens to be a multiple of the value in
        config.precision.FP8_MULTIPLES."""
        fp8 = self.config.fp8
        replaced = []
        for layer in self.decoder.layers:
            attention = layer.self_attention
            if not any(isinstance(module, TorchSDPA) for module in attention.core_attention.modules()):
                replaced.append((attention, attention.core_attention))
                attention.core_attention = TorchSDPA(self.config, layer.layer_number, AttnMaskType.causal, "self").eval()
        self.config.fp8 = None
        try:
            yield
        finally:
            self.config.fp8 = fp8
            for attention, core_attention in replaced:
                attention.core_attention = core_attention

    @contextmanager
    def branches_after(self, trunk: int, lengths: list[int]) -> Iterator[None]:
        """Treat the sequence as a trunk and branches inside the block. Each branch attends to the trunk and to itself, but not to other
        branches, so several questions about one long context share its prefill. The block must be inside `evaluating`, and this rank must
        hold the whole sequence.

        Inside `cached`, the tokens of earlier calls belong to the trunk, and a call may consist of branches alone. Branches are not added
        to the cache, so the next call can pass new branches.

        Args:
            trunk: number of tokens before the first branch, including the tokens of earlier calls, >= 1.
            lengths: number of tokens of each branch. The trunk and the branches form the sequence. An empty list means no branches.
        Raises:
            AssertionError: the trunk is empty, a layer does not support branches, or the sequence is split over ranks.
        """
        attentions = self._caching_attentions() if lengths else []
        if lengths and trunk < 1:
            raise AssertionError(f"{len(lengths)} branches after {trunk} tokens: branches need a trunk of at least one token")
        for attention in attentions:
            attention.branches = list(lengths)
        try:
            yield
        finally:
            for attention in attentions:
                attention.branches = []

    @contextmanager
    def cached(self, max_length: int) -> Iterator[None]:
        """Give every layer a key/value cache inside the block, so that a forward pass continues the sequence of the previous passes. This
        allows prefill in chunks and decoding token by token. The block must be inside torch.no_grad and `evaluating`, and this rank must
        hold the whole sequence.

        Args:
            max_length: maximum number of tokens of all passes together, >= 1. The first pass allocates the memory for these tokens.
        Raises:
            AssertionError: a layer does not support a cache, or the sequence is split over ranks.
        """
        attentions = self._caching_attentions()
        for attention in attentions:
            attention.cache = KeyValueCache(max_length)
        try:
            yield
        finally:
            for attention in attentions:
                attention.cache = None

    def rewind(self, length: int) -> None:
        """Truncate the cache to its first `length` tokens. Must be called inside `cached`."""
        for attention in self._caching_attentions():
            assert attention.cache is not None  # `cached` gave every layer a cache
            attention.cache.rewind(length)

    def _caching_attentions(self) -> list[TorchSDPA]:
        attentions = [module for module in self.modules() if isinstance(module, TorchSDPA)]
        if len(attentions) != len(self.decoder.layers) or self.config.context_parallel_size > 1:
            raise AssertionError(
                f"{len(attentions)} of {len(self.decoder.layers)} layers support a key/value cache and branches; all layers must, and "
                f"context_parallel_size={self.config.context_parallel_size} must be 1"
            )
        return attentions

    def assert_rope(self, rope: RopeScaling) -> None:
        """Check that the model uses the configured rotary frequencies.

        Raises:
            AssertionError: another module computes the rotary angles, or the frequencies or the attention factor differ. This is always
                a bug and never a user error.
        """
        live = self.rotary_pos_emb
        if not isinstance(live, PositionRotaryEmbedding):
            raise AssertionError(f"the rotary module of the model is {type(live).__name__}, which ignores position_ids")
        expected = rope.inv_freq()
        found = live.inv_freq.cpu().numpy()
        if not np.array_equal(found, expected):
            worst = int(np.argmax(np.abs(found - expected)))
            raise AssertionError(
                f"rotary frequency {worst} is {found[worst]:.9g}, the configuration ({rope.type}, theta {rope.rope_theta:g}, factor "
                f"{rope.factor:g}) says {expected[worst]:.9g}"
            )
        wrong = [value for value in rope_concentrations(self) if abs(value - rope.attention_factor) > 1e-12]
        if wrong:
            raise AssertionError(f"attention multiplies cosine and sine by {wrong[0]}, the configuration says {rope.attention_factor}")
