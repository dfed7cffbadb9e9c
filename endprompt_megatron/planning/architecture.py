"""The sizes of a Llama-family decoder. Model building, checkpoint conversion and planning share them, so this module imports only the
standard library."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and a gated SiLU feed-forward network.

    Attributes:
        num_layers: number of decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width inside the MLP.
        num_attention_heads: number of query heads.
        num_query_groups: number of key/value heads.
        head_dim: width of one head.
        vocab_size: number of tokens in the checkpoint's vocabulary, without padding.
        max_position_embeddings: native window, in positions.
        rope_theta: base of the rotary frequencies.
        norm_epsilon: epsilon of RMSNorm.
        tied_embeddings: whether the output layer shares the embedding's weight.
        qkv_bias: whether the query, key and value projections add a bias (Qwen2).
        qk_norm: whether each head of query and key is normalised before the rotation, with one weight per head dimension (Qwen3).
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
        """Return the number of rows of Megatron's embedding: vocab_size rounded up to a multiple of 128 * tensor_model_parallel_size."""
        multiple = VOCABULARY_MULTIPLE * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

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
        """Number of parameters of one embedding matrix, without padding."""
        return self.vocab_size * self.hidden_size

    @property
    def matrix_parameters_per_layer(self) -> int:
        """Number of parameters of one layer's matrices: those of attention and the three of the gated MLP. Norms are not included."""
        attention = self.hidden_size * (2 * self.query_size + self.key_value_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def norm_parameters_per_layer(self) -> int:
        """Number of parameters of one layer's norms: two norms of the residual and, with qk_norm, one norm each for query and key."""
        return 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim

    @property
    def bias_parameters_per_layer(self) -> int:
        """Number of parameters of one layer's biases; 0 without qkv_bias."""
        return self.qkv_bias * (self.query_size + self.key_value_size)
