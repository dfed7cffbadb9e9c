"""Compute the number of parameters and the training FLOPs of a decoder-only model from its architecture. No weights are read."""

from __future__ import annotations

from endprompt_megatron.planning.architecture import ModelArchitecture


def count_parameters(architecture: ModelArchitecture) -> int:
    """Return the number of parameters of the whole model, without vocabulary padding. A tied embedding counts once."""
    layer = architecture.matrix_parameters_per_layer + architecture.norm_parameters_per_layer + architecture.bias_parameters_per_layer
    embeddings = architecture.embedding_parameters * (1 if architecture.tied_embeddings else 2)
    return architecture.num_layers * layer + embeddings + architecture.hidden_size


def layer_matrix_flops_per_token(architecture: ModelArchitecture) -> float:
    """Return the forward FLOPs per token of one layer's matrix products. A multiply-add counts as two FLOPs."""
    return 2.0 * architecture.matrix_parameters_per_layer


def layer_attention_flops_per_token(architecture: ModelArchitecture, seq_length: int) -> float:
    """Return the forward FLOPs per token of one layer's two attention products (scores and values). They are averaged over a causal
    sequence, in which a token attends to half of the sequence on average."""
    return 2.0 * seq_length * architecture.query_size


def output_flops_per_token(architecture: ModelArchitecture) -> float:
    """Return the forward FLOPs per token of the output layer. Tying the output layer to the embedding does not change them."""
    return 2.0 * architecture.embedding_parameters


def forward_flops_per_token(architecture: ModelArchitecture, seq_length: int) -> float:
    """Return the model FLOPs per token of the forward pass, averaged over a causal sequence. The embedding lookup counts as 0.

    Args:
        architecture: sizes of the model.
        seq_length: number of physical tokens of a sequence. Skipped positions cost nothing.
    Returns:
        FLOPs per token.
    """
    layer = layer_matrix_flops_per_token(architecture) + layer_attention_flops_per_token(architecture, seq_length)
    return architecture.num_layers * layer + output_flops_per_token(architecture)


def training_flops_per_token(architecture: ModelArchitecture, seq_length: int) -> float:
    """Return the model FLOPs per token of the forward and backward pass: three times the forward pass. They exclude recomputation (see
    throughput.py).

    Args:
        architecture: sizes of the model.
        seq_length: number of physical tokens of a sequence.
    Returns:
        FLOPs per token.
    """
    return 3 * forward_flops_per_token(architecture, seq_length)
