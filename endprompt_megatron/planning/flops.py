"""How many parameters a decoder-only model has and how many floating-point operations a token of training costs, from its shape
alone, so that a plan can be made before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder (RMSNorm, grouped-query attention; no biases but those of query, key and value).

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width inside the MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: width of one head.
        vocab_size: rows of the embedding, unpadded.
        tied_embeddings: whether the output layer is the embedding.
        gated: whether the MLP has a gate (SwiGLU: three matrices), or only two matrices.
        qkv_bias: whether query, key and value have biases (Qwen2).
        qk_norm: whether each head of query and key is normalised, with one weight a head dimension (Qwen3).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all keys and values of a token together."""
        return 2 * self.num_query_groups * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Parameters of one embedding matrix, unpadded."""
        return self.vocab_size * self.hidden_size

    @property
    def matrix_parameters_per_layer(self) -> int:
        """Parameters of one layer's matrices (attention and MLP), without its norms."""
        attention = self.hidden_size * (2 * self.query_size + self.key_value_size)
        return attention + (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def norm_parameters_per_layer(self) -> int:
        """Parameters of one layer's norms: two, and those of query and key."""
        return 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim

    @property
    def bias_parameters_per_layer(self) -> int:
        """Parameters of one layer's biases."""
        return self.qkv_bias * (self.query_size + self.key_value_size)


def count_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model, the unpadded vocabulary counted, a tied embedding counted once."""
    layer = shape.matrix_parameters_per_layer + shape.norm_parameters_per_layer + shape.bias_parameters_per_layer
    embeddings = shape.embedding_parameters * (1 if shape.tied_embeddings else 2)
    return shape.num_layers * layer + embeddings + shape.hidden_size


def layer_matrix_flops_per_token(shape: ModelShape) -> float:
    """FLOPs of one layer's matrix products, forward: a multiply-add counts two."""
    return 2.0 * shape.matrix_parameters_per_layer


def layer_attention_flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """FLOPs of one layer's two attention products (scores, values), forward, averaged over the tokens of a causal sequence: a token
    attends to half of it."""
    return 2.0 * seq_length * shape.query_size


def output_flops_per_token(shape: ModelShape) -> float:
    """FLOPs of the output layer, forward; the same whether tied or not."""
    return 2.0 * shape.embedding_parameters


def forward_flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """Model FLOPs of the forward pass, averaged over the tokens of a causal sequence. The embedding lookup counts nothing.

    Args:
        shape: of the model.
        seq_length: physical tokens of a sequence; positions that no token holds cost nothing.
    Returns:
        FLOPs a token.
    """
    layer = layer_matrix_flops_per_token(shape) + layer_attention_flops_per_token(shape, seq_length)
    return shape.num_layers * layer + output_flops_per_token(shape)


def training_flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """Model FLOPs of forward and backward: three times the forward pass. Recomputation is not part of it (see throughput.py).

    Args:
        shape: of the model.
        seq_length: physical tokens of a sequence.
    Returns:
        FLOPs a token.
    """
    return 3 * forward_flops_per_token(shape, seq_length)
