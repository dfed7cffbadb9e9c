"""What a transformer layer keeps between its forward and its backward pass, tensor by tensor: the widths that the memory plan adds up,
and that a measured run is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape
from endprompt_megatron.planning.layout import Layout

# How a tensor is split besides context parallelism, which splits every one of them.
INSIDE = "inside"  # by tensor parallelism
RESIDUAL = "residual"  # by tensor parallelism where sequence_parallel is on
POSITION = "position"  # not at all, and there is one for all samples of a micro-batch

BACKENDS = ("te", "torch")


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that autograd keeps.

    Attributes:
        name: what it is.
        bytes_per_token: before any split.
        split: INSIDE, RESIDUAL or POSITION.
    """

    name: str
    bytes_per_token: float
    split: str

    def bytes_on_rank(self, layout: Layout, *, seq_length: int) -> float:
        """Bytes of one micro-batch on one rank."""
        positions = seq_length / layout.context_parallel_size
        if self.split == POSITION:
            return self.bytes_per_token * positions
        split = layout.tensor_model_parallel_size if self.split == INSIDE else layout.residual_split
        return self.bytes_per_token * positions * layout.micro_batch_size / split


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of a number, by its use.

    Attributes:
        activation: residuals, norms' inputs, the MLP's first product.
        attention: query, key, value and output of attention.
        linear_input: what a linear layer keeps of its input for the gradient of its weight.
    """

    activation: float
    attention: float
    linear_input: float


@lru_cache(maxsize=256)  # a search asks the same for thousands of layouts
def layer_tensors(shape: ModelShape, element: ElementBytes, backend: str, *, context_parallel_size: int = 1) -> tuple[SavedTensor, ...]:
    """Everything one layer keeps without recomputation.

    "te": Transformer Engine's fused norm and linear layer, fused rotary embedding and SwiGLU, flash attention (read in its sources, not
    yet measured here). "torch": this project's RMSNorm, Megatron's linear layers, unfused rotary embedding and SwiGLU, SDPA (measured:
    tests/distributed/test_memory_plan.py). The differences: the value that attention keeps is a part of the qkv product, so that all of
    it stays; SwiGLU in plain torch keeps two halves more; each call of the rotary embedding keeps its cosine and sine. With context
    parallelism plain torch gathers key and value of all tokens, and attends in two pieces whose outputs it joins.

    Args:
        shape: of the model.
        element: bytes a number.
        backend: "te" or "torch".
        context_parallel_size: ranks that share a sequence.
    Raises:
        ConfigError: no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend}: the memory of {' and '.join(BACKENDS)} is known. Choose one of them.")
    hidden, query, key_value, ffn = shape.hidden_size, shape.query_size, shape.key_value_size, shape.ffn_hidden_size
    first_product = (2 if shape.gated else 1) * ffn
    tensors = [
        SavedTensor("input of the first norm", element.activation * hidden, RESIDUAL),
        SavedTensor("scale of the first norm", 4, RESIDUAL),
        SavedTensor("input of the query, key and value projection", element.linear_input * hidden, RESIDUAL),
        SavedTensor("query", element.attention * query, INSIDE),
        SavedTensor("row statistics of attention", 4 * shape.num_attention_heads, INSIDE),
        SavedTensor("output of attention", element.attention * query, INSIDE),
        SavedTensor("input of the second norm", element.activation * hidden, RESIDUAL),
        SavedTensor("scale of the second norm", 4, RESIDUAL),
        SavedTensor("input of the MLP", element.linear_input * hidden, RESIDUAL),
        SavedTensor("first product of the MLP", element.activation * first_product, INSIDE),
        SavedTensor("input of the MLP's second product", element.linear_input * ffn, INSIDE),
    ]
    if element.linear_input != element.activation:  # FP8: a copy of attention's output; else the very same tensor
        tensors.append(SavedTensor("input of the output projection", element.linear_input * query, INSIDE))
    if shape.qk_norm:
        heads = shape.num_attention_heads + shape.num_query_groups
        tensors.append(SavedTensor("scales of the norms of query and key", 4 * heads, INSIDE))
    if backend == "te":
        if shape.qk_norm:
            tensors.append(SavedTensor("product of query, key and value", element.activation * (query + key_value), INSIDE))
        return (*tensors, SavedTensor("key and value", element.attention * key_value, INSIDE))
    if context_parallel_size > 1:
        tensors.append(SavedTensor("gathered key and value", element.attention * key_value * context_parallel_size, INSIDE))
        tensors.append(SavedTensor("outputs of attention's two pieces", element.attention * query, INSIDE))
    else:
        tensors.append(SavedTensor("key", element.attention * key_value / 2, INSIDE))
        tensors.append(SavedTensor("product of query, key and value", element.activation * (query + key_value), INSIDE))
    factors = 2 * ffn if shape.gated else ffn
    return (
        *tensors,
        SavedTensor("what the activation keeps besides", element.activation * factors, INSIDE),
        SavedTensor("cosine and sine, for query and for key", 4 * element.activation * shape.head_dim, POSITION),
    )


# what recompute_granularity=selective makes anew: core attention's own
SELECTIVE_DROPS = ("row statistics of attention", "output of attention")


@lru_cache(maxsize=256)
def kept_by_layer(
    shape: ModelShape, element: ElementBytes, backend: str, recompute_granularity: str | None, *, context_parallel_size: int = 1
) -> tuple[SavedTensor, ...]:
    """What of `layer_tensors` a layer keeps until its backward pass.

    Full recomputation keeps the layer's input; selective recomputation drops what core attention keeps for itself. Its output stays,
    because the output projection keeps its input, in FP8 that projection's own copy.

    Raises:
        ConfigError: no such backend or granularity.
    """
    if recompute_granularity not in (None, "selective", "full"):
        raise ConfigError(f"parallel.recompute_granularity={recompute_granularity}: choose null, selective or full.")
    tensors = layer_tensors(shape, element, backend, context_parallel_size=context_parallel_size)
    if recompute_granularity == "full":
        return tensors[:1]
    if recompute_granularity is None:
        return tensors
    kept = [tensor for tensor in tensors if tensor.name not in SELECTIVE_DROPS]
    if not any(tensor.name == "input of the output projection" for tensor in kept):
        kept.append(SavedTensor("input of the output projection", element.linear_input * shape.query_size, INSIDE))
    return tuple(kept)
