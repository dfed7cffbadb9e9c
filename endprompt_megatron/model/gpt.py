"""Megatron's GPTModel with rotary positions that are read from position_ids.

Shapes: b micro-batch, s physical sequence, v vocabulary share of this rank; Megatron order [s, b, h].
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

from endprompt_megatron.mcore.cpu import no_device_names
from endprompt_megatron.mcore.rope_concentration import rope_concentrations, set_rope_concentration
from endprompt_megatron.model.cross_entropy import sliced_cross_entropy
from endprompt_megatron.model.sdpa import KeyValueCache, TorchSDPA
from endprompt_megatron.rope.embedding import PositionRotaryEmbedding
from endprompt_megatron.rope.scaling import RopeScaling


class EndPromptGPTModel(GPTModel):
    """A GPTModel whose rotary embedding obeys position_ids.

    Args:
        config, transformer_layer_spec: as GPTModel.
        vocab_size: rows of the embedding, padding included.
        num_real_tokens: tokens of the vocabulary; the padding rows after them never get probability.
        rope: frequencies.
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
        """Use the frequencies and the attention factor of `rope` from the next forward pass on (e.g. the base's own, to evaluate it)."""
        self.rotary_pos_emb.set_scaling(rope)
        set_rope_concentration(self, rope.attention_factor)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As GPTModel.forward, with every token rotated to its entry of position_ids.

        Args:
            input_ids: [b, s] (None on pipeline stages without the embedding).
            position_ids: [s], shared by the micro-batch, or [b, s]; needed on every pipeline stage.
        Returns:
            Loss of each token [b, s] where labels are given, else logits [b, s, v], else hidden states [s, b, h].
        """
        if self.config.apply_rope_fusion and position_ids.dim() == 2:
            if position_ids.shape[0] > 1:
                raise AssertionError(
                    f"position_ids {tuple(position_ids.shape)}: the fused rotary kernel takes one row for the whole micro-batch, and would "
                    f"rotate every sample to the first one's positions"
                )
            position_ids = position_ids[0]
        # a token at a time, the shim's share would show; training keeps it: its recomputation names devices
        unwatched = nullcontext() if torch.is_grad_enabled() else no_device_names()
        with unwatched, self.rotary_pos_emb.at(position_ids):
            return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token, float32.

        Rows that pad the vocabulary get no probability, so that the loss is the same for every tensor-parallel size. Where the whole
        vocabulary is on this rank, the loss is taken in slices of rows and never copies the logits.

        Args:
            labels: [b, s]; logits: [s, b, v].
        Returns:
            [b, s].
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
        """Inside the block the output layer sees only these tokens of the sequence: a probe of a long context needs a few logits, not a
        table of s x v. Not for sequence parallelism, where a rank holds a part of the sequence."""
        hook = self.output_layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows], *inputs[1:]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the model computes for probes and generation, whatever it trains with: attention is torch's, which keeps keys
        and values and branches, and nothing is rounded to FP8, whose matrix products take only round numbers of tokens."""
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
        """Inside the block the sequence is a trunk and branches: each branch sees the trunk and itself, as if it alone followed. Several
        questions about one long context thus share its prefill. For whole sequences on this rank, inside `evaluating`.

        Inside `cached`, what earlier calls read belongs to the trunk, the branches may follow without anything before them, and they are
        not kept: another call may ask anew.

        Args:
            trunk: tokens before the first branch, those of earlier calls included, >= 1.
            lengths: tokens of each branch; with the trunk they fill the sequence. Empty: no branches.
        """
        attentions = self._caching_attentions() if lengths else []
        if lengths and trunk < 1:
            raise AssertionError(f"{len(lengths)} branches after {trunk} tokens: nothing to share")
        for attention in attentions:
            attention.branches = list(lengths)
        try:
            yield
        finally:
            for attention in attentions:
                attention.branches = []

    @contextmanager
    def cached(self, max_length: int) -> Iterator[None]:
        """Inside the block a forward pass goes on where the last one ended: every layer keeps keys and values, and new tokens see the old
        ones. A long context can so be read in chunks, and a text written token by token. For torch.no_grad and whole sequences on this
        rank, inside `evaluating`.

        Args:
            max_length: tokens of all passes together, >= 1; the memory for them is taken with the first.
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
        """Inside `cached`, forget all but the first `length` tokens."""
        for attention in self._caching_attentions():
            attention.cache.rewind(length)

    def _caching_attentions(self) -> list[TorchSDPA]:
        attentions = [module for module in self.modules() if isinstance(module, TorchSDPA)]
        if len(attentions) != len(self.decoder.layers) or self.config.context_parallel_size > 1:
            raise AssertionError(f"{len(attentions)} of {len(self.decoder.layers)} layers can keep keys and values, or branch")
        return attentions

    def assert_rope(self, rope: RopeScaling) -> None:
        """Refuse to train with frequencies other than the configured ones.

        Raises:
            AssertionError: another module has taken the rotary slot, or its frequencies differ (a bug, never a user's mistake).
        """
        live = self.rotary_pos_emb
        if not isinstance(live, PositionRotaryEmbedding):
            raise AssertionError(f"the live rotary module is {type(live).__name__}, which ignores position_ids")
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
            raise AssertionError(f"attention multiplies cosine and sine with {wrong[0]}, the configuration says {rope.attention_factor}")
