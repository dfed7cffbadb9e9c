"""Queries and keys of a real checkpoint on a real text, as they are before rotation: what the smoothness of its attention scores is
measured on.

Shapes: s tokens of the text, n query heads, g key/value heads, d head dim, p pairs of tokens; Megatron order [s, b, h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QueriesAndKeys:
    """What every layer asked and offered at every token, after q/k norms where the model has them and before rotation.

    Attributes:
        layers: numbers of the layers, from 0.
        queries: float32 [layers, s, n, d].
        keys: float32 [layers, s, g, d].
    """

    layers: tuple[int, ...]
    queries: FloatArray
    keys: FloatArray

    def pairs(self, count: int, *, seed: int) -> tuple[FloatArray, FloatArray]:
        """Queries and keys of randomly drawn pairs of tokens, every head with pairs of its own, the key's token before the query's.

        Args:
            count: p, pairs a head.
            seed: of the draw.
        Returns:
            Both [layers, n, p, d]; a query head meets the key/value head of its group.
        """
        random = np.random.default_rng(seed)
        num_layers, num_tokens, num_heads = self.queries.shape[:3]
        query_tokens = random.integers(1, num_tokens, size=(num_layers, num_heads, count))
        key_tokens = random.integers(0, query_tokens)
        layer, head = np.arange(num_layers)[:, None, None], np.arange(num_heads)[:, None]
        queries = self.queries[layer, query_tokens, head]
        keys = self.keys[layer, key_tokens, head // (num_heads // self.keys.shape[2])]
        return queries, keys


def load_model(hf_path: Path, *, device: torch.device, precision: str = "fp32") -> EndPromptGPTModel:
    """A Hugging Face directory on Megatron, whole on this process, with its own frequencies, in evaluation mode.

    Args:
        hf_path: model directory.
        device: where the weights go. Megatron's process groups must be up (mcore.runtime.initialize).
        precision: fp32 | bf16.
    Raises:
        CheckpointError: the directory is none, or not of a known family.
    """
    config = read_hf_config(hf_path)
    architecture = architecture_from_hf(config)
    chunks = build_model_chunks(
        architecture,
        rope=rope_from_hf(config),
        max_sequence_length=architecture.max_position_embeddings,
        parallel=ParallelConfig(),
        precision=precision,
        backend=resolve("auto"),
        device=device,
    )
    load_hf_weights(chunks, hf_path, architecture)
    return chunks[0].eval()


@torch.no_grad()
def collect_queries_and_keys(model: EndPromptGPTModel, token_ids: Sequence[int], *, layers: Sequence[int] | None = None) -> QueriesAndKeys:
    """Run a text through the model on ordinary positions and keep queries and keys.

    Args:
        model: whole on this rank, in evaluation mode.
        token_ids: s of them, at least 2.
        layers: numbers from 0; None takes all.
    Raises:
        ConfigError: no such layer, a text of fewer than 2 tokens, or a model that is spread over ranks.
    """
    blocks = model.decoder.layers
    if model.config.tensor_model_parallel_size * model.config.pipeline_model_parallel_size > 1:
        raise ConfigError("queries and keys are collected from a model that is whole on one process: set no parallel sizes.")
    if len(token_ids) < 2:
        raise ConfigError(f"a text of {len(token_ids)} tokens: a query and a key before it need at least 2.")
    chosen = tuple(range(len(blocks)) if layers is None else layers)
    strange = [layer for layer in chosen if not 0 <= layer < len(blocks)]
    if strange or not chosen:
        raise ConfigError(f"layers={strange or list(chosen)}: choose at least one of this model's layers 0 to {len(blocks) - 1}.")
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keeper(layer: int) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            found[layer] = _split(blocks[layer].self_attention, output[0])

        return keep

    hooks = [blocks[layer].self_attention.linear_qkv.register_forward_hook(keeper(layer)) for layer in chosen]
    device = next(model.parameters()).device
    try:
        with model.logits_of(slice(-1, None)):
            model(torch.tensor([list(token_ids)], device=device), torch.arange(len(token_ids), device=device))
    finally:
        for hook in hooks:
            hook.remove()
    queries, keys = (torch.stack([found[layer][part] for layer in chosen]).float().cpu().numpy() for part in (0, 1))
    return QueriesAndKeys(chosen, queries, keys)


def _split(attention: torch.nn.Module, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [s, n, d] and keys [s, g, d] of one text from Megatron's fused projection [s, 1, g (n/g + 2) d]: for each key/value head
    its query heads, then its key, then its value."""
    config = attention.config
    groups, size = config.num_query_groups, config.kv_channels
    by_group = mixed[:, 0].unflatten(-1, (groups, config.num_attention_heads // groups + 2, size))
    queries, keys = by_group[:, :, :-2].flatten(1, 2), by_group[:, :, -2]
    if attention.q_layernorm is not None:
        queries = attention.q_layernorm(queries)
    if attention.k_layernorm is not None:
        keys = attention.k_layernorm(keys)
    return queries, keys
