"""Table of the Hugging Face tensors that make up each Megatron parameter. Import, export, conversion and verification all use this table.

A Megatron parameter is a sequence of rows of Hugging Face tensors, split over tensor-parallel ranks by rows or by columns. The table
defines the order of the rows, and everything else is derived from this order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from endprompt_megatron.planning.architecture import ModelArchitecture

# Transformer Engine fuses the norms of a layer into the linear layers that follow, and names the norms after these linear layers. The
# table below uses the unfused names. Checkpoints of every backend use the fused names.
FUSED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_UNFUSED_NAMES = {fused: unfused for unfused, fused in FUSED_NAMES.items()}

ReadRows = Callable[[str, int, int], Tensor]
"""Function (HF name, first row, row past the last) -> these rows of the tensor."""
ReadColumns = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Segment:
    """Rows first .. last-1 of a Hugging Face tensor. `source` is the index of the tensor in its rule."""

    source: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Describes how one kind of Megatron parameter is assembled from Hugging Face rows and split over tensor-parallel ranks.

    Attributes:
        tensor_parallel_dim: dimension of the Megatron parameter that is split; None if every rank holds the whole parameter. With dimension
            1, the parameter is a single, unchanged Hugging Face tensor.
        shapes: function (architecture) -> shapes of the HF tensors in the order of the names.
        segments: function (architecture) -> HF rows that make up the whole Megatron parameter, in order.
        parts: number of equal parts of the rows, each of which is split over the ranks. For example, a rank holds its shard of the gate
            projection, then its shard of the up projection.
        padded: whether rows of zeros are appended up to a multiple of 128 rows per rank.
    """

    tensor_parallel_dim: int | None
    shapes: Callable[[ModelArchitecture], list[tuple[int, ...]]]
    segments: Callable[[ModelArchitecture], list[Segment]]
    parts: int = 1
    padded: bool = False

    def megatron_shape(self, architecture: ModelArchitecture, size: int = 1) -> tuple[int, ...]:
        """Return the shape of the whole Megatron parameter, with the padding for `size` tensor-parallel ranks."""
        shapes = self.shapes(architecture)
        height = architecture.padded_vocab_size(size) if self.padded else sum(shape[0] for shape in shapes)
        return (height, *shapes[0][1:])

    def ranges_of_rank(self, architecture: ModelArchitecture, rank: int, size: int) -> list[tuple[int, int]]:
        """Return the row ranges (first, past the last) of the whole Megatron parameter that a rank holds, in the order of the rank."""
        height = self.megatron_shape(architecture, size)[0]
        if self.tensor_parallel_dim != 0:
            return [(0, height)]
        part = height // self.parts
        share = part // size
        return [(index * part + rank * share, index * part + (rank + 1) * share) for index in range(self.parts)]

    def pieces(self, architecture: ModelArchitecture, first: int, last: int) -> Iterator[Segment]:
        """Yield the Hugging Face rows that make up rows first .. last-1 of the whole Megatron parameter, without padding."""
        start = 0
        for segment in self.segments(architecture):
            length = segment.last - segment.first
            low, high = max(first - start, 0), min(last - start, length)
            if low < high:
                yield Segment(segment.source, segment.first + low, segment.first + high)
            start += length

    def rows_of_source(self, architecture: ModelArchitecture, source: int) -> list[tuple[int, int]]:
        """Return the row ranges (first, past the last) of the whole Megatron parameter that make up HF tensor `source`, in the order of
        that tensor."""
        found, start = [], 0
        for segment in self.segments(architecture):
            length = segment.last - segment.first
            if segment.source == source:
                found.append((segment.first, start, start + length))
            start += length
        return [(first, last) for _, first, last in sorted(found)]

    def read(
        self, architecture: ModelArchitecture, names: tuple[str, ...], rows: ReadRows, columns: ReadColumns, rank: int, size: int
    ) -> Tensor:
        """Read a rank's shard of the Megatron parameter.

        Args:
            names: HF names.
            rows, columns: functions that read ranges of rows and columns.
            rank, size: tensor-parallel rank and size.
        """
        if self.tensor_parallel_dim == 1:
            width = self.shapes(architecture)[0][1] // size
            return columns(names[0], rank * width, (rank + 1) * width)
        ranges = self.ranges_of_rank(architecture, rank, size)
        pieces = [piece for first, last in ranges for piece in self.pieces(architecture, first, last)]
        found = [rows(names[piece.source], piece.first, piece.last) for piece in pieces]
        missing = sum(last - first for first, last in ranges) - sum(tensor.shape[0] for tensor in found)
        if missing:
            like = found[0] if found else rows(names[0], 0, 0)
            found.append(like.new_zeros((missing, *like.shape[1:])))
        return torch.cat(found) if len(found) > 1 else found[0]

    def join(self, architecture: ModelArchitecture, shards: list[Tensor]) -> list[Tensor]:
        """Return the HF tensors, in the order of the names, from the shards of all ranks. This is the inverse of `read`."""
        if self.tensor_parallel_dim is None:
            whole = shards[0]
        elif self.tensor_parallel_dim == 1:
            whole = torch.cat(shards, dim=1)
        else:
            whole = torch.cat([shard.chunk(self.parts)[index] for index in range(self.parts) for shard in shards])
        joined = []
        for source in range(len(self.shapes(architecture))):
            found = [whole[first:last] for first, last in self.rows_of_source(architecture, source)]
            joined.append(torch.cat(found) if len(found) > 1 else found[0])
        return joined


def _concatenated(shapes: Callable[[ModelArchitecture], list[tuple[int, ...]]]) -> Callable[[ModelArchitecture], list[Segment]]:
    return lambda arch: [Segment(source, 0, shape[0]) for source, shape in enumerate(shapes(arch))]


def _qkv_shapes(arch: ModelArchitecture) -> list[tuple[int, ...]]:
    return [(heads * arch.head_dim, arch.hidden_size) for heads in (arch.num_attention_heads, arch.num_query_groups, arch.num_query_groups)]


def _qkv_segments(arch: ModelArchitecture) -> list[Segment]:
    """Return the rows of the fused projection in order. Each key/value group has its query heads, then its key head, then its value
    head."""
    widths = (arch.num_attention_heads // arch.num_query_groups * arch.head_dim, arch.head_dim, arch.head_dim)
    return [
        Segment(source, group * width, (group + 1) * width) for group in range(arch.num_query_groups) for source, width in enumerate(widths)
    ]


def _layout(tensor_parallel_dim: int | None, shapes: Callable[[ModelArchitecture], list[tuple[int, ...]]], **options: Any) -> Layout:
    return Layout(tensor_parallel_dim, shapes, _concatenated(shapes), **options)


_WHOLE = _layout(None, lambda arch: [(arch.hidden_size,)])
_HEAD = _layout(None, lambda arch: [(arch.head_dim,)])
_VOCABULARY = _layout(0, lambda arch: [(arch.vocab_size, arch.hidden_size)], padded=True)
_QKV = Layout(0, _qkv_shapes, _qkv_segments)
_QKV_BIAS = Layout(0, lambda arch: [shape[:1] for shape in _qkv_shapes(arch)], _qkv_segments)
_GATE_UP = _layout(0, lambda arch: [(arch.ffn_hidden_size, arch.hidden_size)] * 2, parts=2)
_ATTENTION_OUTPUT = _layout(1, lambda arch: [(arch.hidden_size, arch.num_attention_heads * arch.head_dim)])
_DOWN = _layout(1, lambda arch: [(arch.hidden_size, arch.ffn_hidden_size)])


@dataclass(frozen=True)
class Rule:
    """The tensors and the layout of one Megatron parameter.

    Attributes:
        megatron: name of the parameter; {layer} is the layer's index in the whole model, from 0.
        hugging_face: names of the Hugging Face tensors, in the order of the layout.
        layout: layout of the parameter.
        exists: function (architecture) -> whether the model has the parameter.
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
    """A rule applied to one layer. The names contain the index of the layer in the whole model."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout


def unfused_name(name: str) -> str:
    """Convert a parameter name of any backend to the unfused name that the table uses.

    Args:
        name: Megatron name in the whole model.
    """
    if not name.startswith("decoder.layers."):
        return name
    *layer, rest = name.split(".", 3)
    return ".".join((*layer, _UNFUSED_NAMES.get(rest, rest)))


def bindings(architecture: ModelArchitecture) -> Iterator[Binding]:
    """Yield the bindings of the whole model in file order: embedding, layers, final norm, output layer."""
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
    return Binding(rule.megatron.format(**number), tuple(name.format(**number) for name in rule.hugging_face), rule.layout)
