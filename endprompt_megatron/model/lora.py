"""LoRA on the attention projections q, k, v and o. The adapters are mixins for the linear classes of any backend. The base parameters keep
their names. This module also freezes the parameters that do not train.

Shapes: s sequence, b micro-batch, h hidden size, r rank, n query heads and g key/value groups of the whole model, d head dimension,
t tensor-parallel size. The output sizes of the projections are n d (q), g d (k and v) and h (o).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.model.adapters import OUTPUT_TARGET, QKV_TARGETS, adapter_name, is_adapter, low_rank_product, merge


def with_adapters(block: TransformerBlockSubmodules, adapter: AdapterConfig) -> TransformerBlockSubmodules:
    """Add adapters to the attention projections of the layers of `block`.

    Args:
        block: layer specs of a backend; changed in place.
        adapter: settings of the adapters, with type lora.
    """
    for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers may share one spec
        attention = layer.submodules.self_attention.submodules
        if set(QKV_TARGETS) & set(adapter.target_modules):
            attention.linear_qkv = _adapted(attention.linear_qkv, _QKVAdapters, adapter)
        if OUTPUT_TARGET in adapter.target_modules:
            attention.linear_proj = _adapted(attention.linear_proj, _OutputAdapter, adapter)
    return block


def _adapted(linear: Any, mixin: type, adapter: AdapterConfig) -> ModuleSpec:
    base, params = (linear.module, linear.params) if isinstance(linear, ModuleSpec) else (linear, {})
    if "LayerNorm" in base.__name__:
        raise AssertionError(f"{base.__name__} includes a norm, but adapters need a linear layer without a fused norm")
    return ModuleSpec(module=type(f"LoRA{base.__name__}", (mixin, base), {}), params={**params, "adapter": adapter})


class AdaptedLinear(torch.nn.Module):
    """Mixin for a linear layer of Megatron. With the mixin, the layer computes y = W x + alpha / r B A x.

    Args:
        args, config, options: arguments of the linear layer.
        adapter: settings of the adapters.
    """

    def __init__(self, *args: Any, config: TransformerConfig, adapter: AdapterConfig, **options: Any):
        super().__init__(*args, config=config, **options)
        self.adapter = adapter
        self._tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
        self._sequence_parallel = config.sequence_parallel and self._tensor_parallel_size > 1

    @property
    def targets(self) -> tuple[str, ...]:
        """Projections of this layer that have an adapter."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.adapter.alpha / self.adapter.rank

    def _add(self, target: str, matrix: str, shape: tuple[int, int], *, dim: int | None, sequence_parallel: bool) -> None:
        """Register a parameter.

        Args:
            shape: shape of this rank's shard.
            dim: dimension that is split over tensor-parallel ranks; None if the parameter is replicated.
            sequence_parallel: whether this rank computes the gradient only from its part of the sequence.
        """
        like = self.weight
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        parameter.allreduce = True
        if dim is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
        elif sequence_parallel:
            parameter.sequence_parallel = True
        self.register_parameter(adapter_name(target, matrix), parameter)

    def matrix(self, target: str, matrix: str) -> torch.nn.Parameter:
        """Return this rank's shard of A or B of a target."""
        return getattr(self, adapter_name(target, matrix))

    def adapters(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """Yield (target, matrix, parameter) for each adapter parameter."""
        for target in self.targets:
            for matrix in "AB":
                yield target, matrix, self.matrix(target, matrix)

    @torch.no_grad()
    def initialize(self, seed: int, layer_number: int) -> None:
        """Initialise A uniformly in [-1 / sqrt(input size), 1 / sqrt(input size)], as peft does, and B with zeros. At the start, the
        layer therefore computes W x. Each rank draws the whole matrix A and keeps its shard, so that every layout starts with the same
        weights.

        Args:
            seed: seed of the run.
            layer_number: number of the layer in the whole model.
        """
        for target, matrix, parameter in self.adapters():
            if matrix == "B":
                parameter.zero_()
                continue
            rank, width = parameter.shape
            dim = getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None
            shares = self._tensor_parallel_size if dim == 1 else 1
            digest = hashlib.sha256(f"{seed}/{layer_number}/{target}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            bound = 1.0 / math.sqrt(width * shares)
            whole = torch.empty(rank, width * shares).uniform_(-bound, bound, generator=generator)
            first = parallel_state.get_tensor_model_parallel_rank() * width if shares > 1 else 0
            parameter.copy_(whole[:, first : first + width])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return this rank's shard of W + alpha / r B A, computed in float32 and rounded to the dtype of W."""
        return merge(self.weight, self._update(), self.scale)

    def _update(self) -> Tensor:
        raise NotImplementedError

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict[str, Any]:
        """Return the sharded state of the linear layer and of the adapters."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        adapters = {adapter_name(target, matrix): parameter for target, matrix, parameter in self.adapters()}
        cut = {name: parameter.partition_dim for name, parameter in adapters.items() if getattr(parameter, "tensor_model_parallel", False)}
        return state | make_sharded_tensors_for_checkpoint(adapters, prefix, cut, sharded_offsets)


class _QKVAdapters(AdaptedLinear):
    """Adapters of q, k and v on a column-parallel fused projection. A is replicated on every rank. B is split by rows."""

    def __init__(self, input_size: int, *args: Any, config: TransformerConfig, adapter: AdapterConfig, **options: Any):
        super().__init__(input_size, *args, config=config, adapter=adapter, **options)
        self._groups = config.num_query_groups // self._tensor_parallel_size
        queries = config.num_attention_heads // config.num_query_groups
        self._widths = dict(zip(QKV_TARGETS, (queries * config.kv_channels, config.kv_channels, config.kv_channels), strict=True))
        for target in self.targets:
            self._add(target, "A", (adapter.rank, input_size), dim=None, sequence_parallel=self._sequence_parallel)
            self._add(target, "B", (self._groups * self._widths[target], adapter.rank), dim=0, sequence_parallel=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Projections of this layer that have an adapter."""
        return tuple(target for target in QKV_TARGETS if target in self.adapter.target_modules)

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output of the linear layer plus the output of the adapters, and the bias.

        Args:
            input_: [s, b, h], or [s / t, b, h] with sequence parallelism.
        Returns:
            (output [s, b, (n + 2 g) d / t], bias or None).
        """
        output, bias = super().forward(input_, *args, **options)
        hidden = F.linear(input_, torch.cat([self.matrix(target, "A") for target in self.targets]))
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        elif self._tensor_parallel_size > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden)  # the backward pass sums the gradient of A over the ranks
        parts = zip(self.targets, hidden.split(self.adapter.rank, dim=-1), strict=True)
        deltas = {target: F.linear(part, self.matrix(target, "B")) for target, part in parts}
        return output + self.scale * self._interleave(deltas, -1), bias

    def _interleave(self, parts: dict[str, Tensor], dim: int) -> Tensor:
        """Concatenate q, k and v along `dim` in the order of Megatron's fused projection, which stores the query heads, the key and the
        value of one key/value group after another. Projections without an adapter become zeros."""
        one = next(iter(parts.values()))
        rows = []
        for target, width in self._widths.items():
            part = parts.get(target)
            if part is None:
                shape = list(one.shape)
                shape[dim] = self._groups * width
                part = one.new_zeros(shape)
            rows.append(part.unflatten(dim, (self._groups, width)))
        inner = dim if dim < 0 else dim + 1
        return torch.cat(rows, dim=inner).flatten(*((dim - 1, dim) if dim < 0 else (dim, dim + 1)))

    def _update(self) -> Tensor:
        products = {target: low_rank_product(self.matrix(target, "B"), self.matrix(target, "A")) for target in self.targets}
        return self._interleave(products, 0)


class _OutputAdapter(AdaptedLinear):
    """Adapter of o on a row-parallel projection. A is split by columns. B is replicated on every rank."""

    def __init__(self, input_size: int, output_size: int, *args: Any, config: TransformerConfig, adapter: AdapterConfig, **options: Any):
        super().__init__(input_size, output_size, *args, config=config, adapter=adapter, **options)
        self._add(OUTPUT_TARGET, "A", (adapter.rank, input_size // self._tensor_parallel_size), dim=1, sequence_parallel=False)
        self._add(OUTPUT_TARGET, "B", (output_size, adapter.rank), dim=None, sequence_parallel=self._sequence_parallel)

    @property
    def targets(self) -> tuple[str, ...]:
        """Projections of this layer that have an adapter."""
        return (OUTPUT_TARGET,)

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output of the linear layer plus the output of the adapter, and the bias.

        Args:
            input_: [s, b, n d / t].
        Returns:
            (output, bias or None). The output is [s, b, h], or [s / t, b, h] with sequence parallelism.
        """
        output, bias = super().forward(input_, *args, **options)
        hidden = F.linear(input_, self.matrix(OUTPUT_TARGET, "A"))
        if self._sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden)
        elif self._tensor_parallel_size > 1:
            hidden = reduce_from_tensor_model_parallel_region(hidden)
        return output + self.scale * F.linear(hidden, self.matrix(OUTPUT_TARGET, "B")), bias

    def _update(self) -> Tensor:
        return low_rank_product(self.matrix(OUTPUT_TARGET, "B"), self.matrix(OUTPUT_TARGET, "A"))


def adapted_layers(model: torch.nn.Module) -> dict[str, AdaptedLinear]:
    """Return {name in the model: layer} of all linear layers with adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def prepare_adapters(model: torch.nn.Module, adapter: AdapterConfig, *, seed: int) -> None:
    """Initialise the adapters of a model chunk and freeze all other parameters, except the norms and the embedding if the config trains
    them. A tied output layer trains together with the embedding. An untied output layer is always frozen.

    Args:
        model: chunk with adapters.
        adapter: adapter settings, including which other parameters train.
        seed: seed of the run.
    """
    for layer in model.decoder.layers:
        for module in adapted_layers(layer).values():
            module.initialize(seed, layer.layer_number)
    tied = model.share_embeddings_and_output_weights
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith("embedding.") or (tied and name.startswith("output_layer."))
        # input_layernorm, pre_mlp_layernorm, q_layernorm, k_layernorm, final_layernorm, or layer_norm_weight of a fused linear layer
        is_norm = any("norm" in part for part in name.split(".")[-2:])
        trains = is_adapter(name) or (adapter.train_embeddings and is_embedding) or (adapter.train_norms and is_norm)
        parameter.requires_grad_(trains)
    if model.pre_process and not adapter.train_embeddings:
        # with recomputation, the adapters of a layer get gradients only if the input of the layer requires a gradient
        model.embedding.register_forward_hook(_require_grad)


def _require_grad(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def count_parameters(chunks: list[torch.nn.Module]) -> tuple[int, int]:
    """Return (trainable, total) parameter counts of the whole model, including vocabulary padding. All ranks must call this function."""
    counts = [0, 0]
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter):
                counts[0] += parameter.numel() if parameter.requires_grad else 0
                counts[1] += parameter.numel()
    total = torch.tensor(counts, device=next(chunks[0].parameters()).device)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total[0]), int(total[1])
