"""Collect the queries and keys of a checkpoint on a text, before the rotary embedding. They are used to measure the smoothness of the
checkpoint's attention scores.

Shapes: s tokens of the text, n query heads, g key/value heads, d head dim, p pairs of tokens; Megatron order [s, b, h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.model.gpt import EndPromptGPTModel

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QueriesAndKeys:
    """Queries and keys of every layer and token, after the q/k norms (if the model has them) and before the rotary embedding.

    Attributes:
        layers: layer numbers, from 0.
        queries: float32 [layers, s, n, d].
        keys: float32 [layers, s, g, d].
    """

    layers: tuple[int, ...]
    queries: FloatArray
    keys: FloatArray

    def pairs(self, count: int, *, seed: int) -> tuple[FloatArray, FloatArray]:
        """Return queries and keys of random pairs of tokens. Each head has its own pairs, and the key's token precedes the query's token.

        Args:
            count: p, number of pairs per head.
            seed: seed of the random pairs.
        Returns:
            Queries and keys, both [layers, n, p, d]. Each query head is paired with the key/value head of its group.
        """
        random = np.random.default_rng(seed)
        num_layers, num_tokens, num_heads = self.queries.shape[:3]
        query_tokens = random.integers(1, num_tokens, size=(num_layers, num_heads, count))
        key_tokens = random.integers(0, query_tokens)
        layer, head = np.arange(num_layers)[:, None, None], np.arange(num_heads)[:, None]
        queries = self.queries[layer, query_tokens, head]
        keys = self.keys[layer, key_tokens, head // (num_heads // self.keys.shape[2])]
        return queries, keys


@torch.no_grad()
def collect_queries_and_keys(model: EndPromptGPTModel, token_ids: Sequence[int], *, layers: Sequence[int] | None = None) -> QueriesAndKeys:
    """Run a text through the model on contiguous positions and return the queries and keys.

    Args:
        model: the whole model, without tensor or pipeline parallelism, in evaluation mode.
        token_ids: s token ids, at least 2.
        layers: layer numbers, from 0; None selects all.
    Raises:
        ConfigError: a layer does not exist, `layers` is empty, the text has fewer than 2 tokens, or the model is split over ranks.
    """
    blocks = model.decoder.layers
    if model.config.tensor_model_parallel_size * model.config.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "queries and keys can be collected only if the whole model is on one process: set tensor_model_parallel_size and "
            "pipeline_model_parallel_size to 1."
        )
    if len(token_ids) < 2:
        raise ConfigError(f"a text of {len(token_ids)} tokens: a query and an earlier key need at least 2. Use a longer text.")
    chosen = tuple(range(len(blocks)) if layers is None else layers)
    unknown = [layer for layer in chosen if not 0 <= layer < len(blocks)]
    if unknown or not chosen:
        raise ConfigError(f"layers={unknown or list(chosen)}: choose at least one of this model's layers 0 to {len(blocks) - 1}.")
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def make_hook(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            found[layer] = _split(blocks[layer].self_attention, output[0])

        return hook

    handles = [blocks[layer].self_attention.linear_qkv.register_forward_hook(make_hook(layer)) for layer in chosen]
    device = next(model.parameters()).device
    try:
        with model.logits_of(slice(-1, None)):
            model(torch.tensor([list(token_ids)], device=device), torch.arange(len(token_ids), device=device))
    finally:
        for handle in handles:
            handle.remove()
    queries, keys = (torch.stack([found[layer][part] for layer in chosen]).float().cpu().numpy() for part in (0, 1))
    return QueriesAndKeys(chosen, queries, keys)


def _split(attention: torch.nn.Module, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Split Megatron's fused projection [s, 1, g (n/g + 2) d] into queries [s, n, d] and keys [s, g, d].

    For each key/value head, the projection contains the queries of its group, then the key, then the value.
    """
    config = attention.config
    groups, size = config.num_query_groups, config.kv_channels
    by_group = mixed[:, 0].unflatten(-1, (groups, config.num_attention_heads // groups + 2, size))
    queries, keys = by_group[:, :, :-2].flatten(1, 2), by_group[:, :, -2]
    if attention.q_layernorm is not None:
        queries = attention.q_layernorm(queries)
    if attention.k_layernorm is not None:
        keys = attention.k_layernorm(keys)
    return queries, keys
