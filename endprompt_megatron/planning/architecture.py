"""The numbers of a Llama-family decoder that the model, the planner and the rules of the config share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and a gated SiLU feed-forward network.

    Attributes:
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, head_dim: as Megatron names them.
        vocab_size: tokens of the checkpoint, without padding.
        max_position_embeddings: the native window, in positions.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: of RMSNorm.
        tied_embeddings: whether the output layer is the embedding.
        qkv_bias: whether query, key and value projections add a bias (Qwen2).
        qk_norm: whether each head of query and key is normalised before it is rotated (Qwen3).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding: the vocabulary rounded up so that each rank's share is a multiple of 128."""
        multiple = VOCABULARY_MULTIPLE * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple
