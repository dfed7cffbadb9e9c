"""Which Hugging Face tensors make which Megatron parameter: a table. Import, export and verification all read it.

Shapes: h hidden, f feed-forward, v vocabulary, q = query heads x head dim, k = key/value heads x head dim, all of the whole model;
t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from endprompt_megatron.model.architecture import ModelArchitecture

ReadRows = Callable[[str, int, int], Tensor]
"""(HF name, first, past the last) -> that range of the tensor's rows."""
ReadColumns = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one kind of parameter is cut over tensor-parallel ranks.

    Attributes:
        tensor_parallel_dim: dimension of the Megatron parameter that is split; None where every rank holds all of it.
        read: (architecture, HF names, rows, columns, rank, t) -> this rank's Megatron tensor.
        join: (architecture, one Megatron tensor a rank) -> HF tensors in the order of the names.
        shapes: (architecture) -> shapes of the HF tensors in the order of the names.
    """

    tensor_parallel_dim: int | None
    read: Callable[[ModelArchitecture, tuple[str, ...], ReadRows, ReadColumns, int, int], Tensor]
    join: Callable[[ModelArchitecture, list[Tensor]], list[Tensor]]
    shapes: Callable[[ModelArchitecture], list[tuple[int, ...]]]


def _share(total: int, rank: int, size: int) -> tuple[int, int]:
    each = total // size
    return rank * each, (rank + 1) * each


def _read_whole(arch, names, rows, columns, rank, size):
    return rows(names[0], 0, arch.hidden_size)


def _read_head(arch, names, rows, columns, rank, size):
    return rows(names[0], 0, arch.head_dim)


def _read_vocabulary(arch, names, rows, columns, rank, size):
    """[v / t, h], rows past the real vocabulary are zero."""
    first, last = _share(arch.padded_vocab_size(size), rank, size)
    real = rows(names[0], min(first, arch.vocab_size), min(last, arch.vocab_size))
    padding = real.new_zeros((last - first - real.shape[0], *real.shape[1:]))
    return torch.cat([real, padding]) if padding.shape[0] else real


def _read_qkv(arch, names, rows, columns, rank, size):
    """[(q + 2k) / t, h], or [(q + 2k) / t] of the biases: for each key/value group its query heads, its key head, its value head."""
    first, last = _share(arch.num_query_groups, rank, size)
    groups = last - first
    per_group = arch.num_attention_heads // arch.num_query_groups
    dim = arch.head_dim
    query = rows(names[0], first * per_group * dim, last * per_group * dim).reshape(groups, per_group * dim, -1)
    key = rows(names[1], first * dim, last * dim).reshape(groups, dim, -1)
    value = rows(names[2], first * dim, last * dim).reshape(groups, dim, -1)
    joined = torch.cat([query, key, value], dim=1).reshape(groups * (per_group + 2) * dim, -1)
    return joined.squeeze(1) if names[0].endswith(".bias") else joined


def _read_gate_up(arch, names, rows, columns, rank, size):
    """[2f / t, h]: this rank's share of the gate, then its share of the up projection."""
    first, last = _share(arch.ffn_hidden_size, rank, size)
    return torch.cat([rows(names[0], first, last), rows(names[1], first, last)])


def _read_attention_output(arch, names, rows, columns, rank, size):
    return columns(names[0], *_share(arch.num_attention_heads * arch.head_dim, rank, size))


def _read_down(arch, names, rows, columns, rank, size):
    return columns(names[0], *_share(arch.ffn_hidden_size, rank, size))


def _join_whole(arch, shards):
    return [shards[0]]


def _join_vocabulary(arch, shards):
    return [torch.cat(shards)[: arch.vocab_size]]


def _join_qkv(arch, shards):
    per_group = arch.num_attention_heads // arch.num_query_groups
    dim = arch.head_dim
    whole = torch.cat(shards)
    grouped = whole.reshape(arch.num_query_groups, (per_group + 2) * dim, *whole.shape[1:])
    parts = grouped.split([per_group * dim, dim, dim], dim=1)
    return [part.reshape(-1, *whole.shape[1:]) for part in parts]


def _join_gate_up(arch, shards):
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]


def _join_columns(arch, shards):
    return [torch.cat(shards, dim=1)]


_WHOLE = Layout(None, _read_whole, _join_whole, lambda arch: [(arch.hidden_size,)])
_HEAD = Layout(None, _read_head, _join_whole, lambda arch: [(arch.head_dim,)])
_VOCABULARY = Layout(0, _read_vocabulary, _join_vocabulary, lambda arch: [(arch.vocab_size, arch.hidden_size)])
_QKV = Layout(
    0,
    _read_qkv,
    _join_qkv,
    lambda arch: [
        (heads * arch.head_dim, arch.hidden_size) for heads in (arch.num_attention_heads, arch.num_query_groups, arch.num_query_groups)
    ],
)
_QKV_BIAS = Layout(0, _read_qkv, _join_qkv, lambda arch: [shape[:1] for shape in _QKV.shapes(arch)])
_GATE_UP = Layout(0, _read_gate_up, _join_gate_up, lambda arch: [(arch.ffn_hidden_size, arch.hidden_size)] * 2)
_ATTENTION_OUTPUT = Layout(
    1, _read_attention_output, _join_columns, lambda arch: [(arch.hidden_size, arch.num_attention_heads * arch.head_dim)]
)
_DOWN = Layout(1, _read_down, _join_columns, lambda arch: [(arch.hidden_size, arch.ffn_hidden_size)])


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter.

    Attributes:
        megatron: its name; {layer} is the layer's number in the whole model, from 0.
        hugging_face: the tensors it is made of, in the order of the layout.
        layout: how it is cut and joined.
        exists: (architecture) -> whether the model has it.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout
    exists: Callable[[ModelArchitecture], bool] = lambda arch: True


RULES: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _VOCABULARY),
    Rule("decoder.layers.{layer}.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), _WHOLE),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        _QKV,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        (
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ),
        _QKV_BIAS,
        lambda arch: arch.qkv_bias,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        ("model.layers.{layer}.self_attn.q_norm.weight",),
        _HEAD,
        lambda arch: arch.qk_norm,
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        ("model.layers.{layer}.self_attn.k_norm.weight",),
        _HEAD,
        lambda arch: arch.qk_norm,
    ),
    Rule("decoder.layers.{layer}.self_attention.linear_proj.weight", ("model.layers.{layer}.self_attn.o_proj.weight",), _ATTENTION_OUTPUT),
    Rule("decoder.layers.{layer}.pre_mlp_layernorm.weight", ("model.layers.{layer}.post_attention_layernorm.weight",), _WHOLE),
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        _GATE_UP,
    ),
    Rule("decoder.layers.{layer}.mlp.linear_fc2.weight", ("model.layers.{layer}.mlp.down_proj.weight",), _DOWN),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), _VOCABULARY, lambda arch: not arch.tied_embeddings),
)


@dataclass(frozen=True)
class Binding:
    """A rule applied to one layer: Megatron name (whole-model layer number), HF names, layout."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout


def bindings(architecture: ModelArchitecture) -> Iterator[Binding]:
    """Every parameter of the whole model, in the order of the file on disk: embedding, layers, norm, output."""
    rules = [rule for rule in RULES if rule.exists(architecture)]
    is_per_layer = ["{layer}" in rule.megatron for rule in rules]
    first, past = is_per_layer.index(True), len(rules) - is_per_layer[::-1].index(True)
    for rule in rules[:first]:
        yield _bind(rule, None)
    for layer in range(architecture.num_layers):
        for rule in rules[first:past]:
            yield _bind(rule, layer)
    for rule in rules[past:]:
        yield _bind(rule, None)


def _bind(rule: Rule, layer: int | None) -> Binding:
    number = {} if layer is None else {"layer": layer}
    return Binding(
        rule.megatron.format(**number), tuple(name.format(**number) for name in rule.hugging_face), rule.layout
    )
