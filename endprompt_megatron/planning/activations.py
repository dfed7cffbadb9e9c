"""The tensors that a transformer layer keeps from its forward to its backward pass. The memory plan adds up their sizes; a test compares
the sum with a measured run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout import Layout

# How tensor parallelism splits a tensor. Context parallelism splits every tensor in addition.
INSIDE = "inside"  # split
RESIDUAL = "residual"  # split if sequence_parallel is on
POSITION = "position"  # not split; all samples of a micro-batch share one tensor

BACKENDS = ("te", "torch")


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that autograd keeps for the backward pass.

    Attributes:
        name: description of the tensor.
        bytes_per_token: size in bytes per token, before any split.
        split: INSIDE, RESIDUAL or POSITION.
    """

    name: str
    bytes_per_token: float
    split: str

    def bytes_on_rank(self, layout: Layout, *, seq_length: int) -> float:
        """Return the bytes of this tensor for one micro-batch on one rank."""
        positions = seq_length / layout.context_parallel_size
        if self.split == POSITION:
            return self.bytes_per_token * positions
        split = layout.tensor_model_parallel_size if self.split == INSIDE else layout.residual_split
        return self.bytes_per_token * positions * layout.micro_batch_size / split


@dataclass(frozen=True)
class ElementBytes:
    """Bytes per element of three groups of tensors.

    Attributes:
        activation: for residuals, the inputs of norms, and the first product of the MLP.
        attention: for query, key, value and output of attention.
        linear_input: for the input that a linear layer keeps for its weight gradient.
    """

    activation: float
    attention: float
    linear_input: float


@lru_cache(maxsize=256)  # a layout search calls this with the same arguments thousands of times
def layer_tensors(
    architecture: ModelArchitecture, element: ElementBytes, backend: str, *, context_parallel_size: int = 1
) -> tuple[SavedTensor, ...]:
    """Return all tensors that one layer keeps without recomputation.

    The backend "te" uses Transformer Engine's fused norm and linear layer, fused rotary embedding and SwiGLU, and flash attention. Its list
    is derived from the source code of Transformer Engine and not yet measured here. The backend "torch" uses this project's RMSNorm,
    Megatron's linear layers, unfused rotary embedding and SwiGLU, and SDPA. Its list is measured (tests/distributed/test_memory_plan.py).

    The backend "torch" keeps more tensors than "te". The value that attention keeps is a view of the qkv product, so the whole product
    stays in memory. SwiGLU keeps two more tensors of width ffn_hidden_size. Each call of the rotary embedding keeps its cosine and sine.
    With context parallelism, attention gathers key and value of all tokens, runs in two pieces and concatenates their outputs.

    Args:
        architecture: sizes of the model.
        element: bytes per element.
        backend: "te" or "torch".
        context_parallel_size: number of ranks that share a sequence.
    Raises:
        ConfigError: the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend}: no memory estimate for it. Choose {' or '.join(BACKENDS)}.")
    hidden, query, key_value, ffn = (
        architecture.hidden_size,
        architecture.query_size,
        architecture.key_value_size,
        architecture.ffn_hidden_size,
    )
    first_product = 2 * ffn
    tensors = [
        SavedTensor("input of the first norm", element.activation * hidden, RESIDUAL),
        SavedTensor("scale of the first norm", 4, RESIDUAL),
        SavedTensor("input of the query, key and value projection", element.linear_input * hidden, RESIDUAL),
        SavedTensor("query", element.attention * query, INSIDE),
        SavedTensor("row statistics of attention", 4 * architecture.num_attention_heads, INSIDE),
        SavedTensor("output of attention", element.attention * query, INSIDE),
        SavedTensor("input of the second norm", element.activation * hidden, RESIDUAL),
        SavedTensor("scale of the second norm", 4, RESIDUAL),
        SavedTensor("input of the MLP", element.linear_input * hidden, RESIDUAL),
        SavedTensor("first product of the MLP", element.activation * first_product, INSIDE),
        SavedTensor("input of the MLP's second product", element.linear_input * ffn, INSIDE),
    ]
    if element.linear_input != element.activation:  # in FP8 the projection keeps its own copy of the output of attention
        tensors.append(SavedTensor("input of the output projection", element.linear_input * query, INSIDE))
    if architecture.qk_norm:
        heads = architecture.num_attention_heads + architecture.num_query_groups
        tensors.append(SavedTensor("scales of the norms of query and key", 4 * heads, INSIDE))
    if backend == "te":
        if architecture.qk_norm:
            tensors.append(SavedTensor("product of query, key and value", element.activation * (query + key_value), INSIDE))
        return (*tensors, SavedTensor("key and value", element.attention * key_value, INSIDE))
    if context_parallel_size > 1:
        tensors.append(SavedTensor("gathered key and value", element.attention * key_value * context_parallel_size, INSIDE))
        tensors.append(SavedTensor("outputs of attention's two pieces", element.attention * query, INSIDE))
    else:
        tensors.append(SavedTensor("key", element.attention * key_value / 2, INSIDE))
        tensors.append(SavedTensor("product of query, key and value", element.activation * (query + key_value), INSIDE))
    return (
        *tensors,
        SavedTensor("other inputs of SwiGLU", element.activation * 2 * ffn, INSIDE),
        SavedTensor("cosine and sine, for query and for key", 4 * element.activation * architecture.head_dim, POSITION),
    )


# tensors of core attention, which recompute_granularity=selective recomputes
SELECTIVE_DROPS = ("row statistics of attention", "output of attention")


@lru_cache(maxsize=256)
def kept_by_layer(
    architecture: ModelArchitecture,
    element: ElementBytes,
    backend: str,
    recompute_granularity: str | None,
    *,
    context_parallel_size: int = 1,
) -> tuple[SavedTensor, ...]:
    """Return the tensors of `layer_tensors` that a layer keeps for the backward pass under this recomputation.

    Full recomputation keeps only the layer's input. Selective recomputation drops the tensors of core attention, but the output projection
    still keeps its input, which is the output of attention (in FP8, a copy of it).

    Raises:
        ConfigError: the backend or recompute_granularity is unknown.
    """
    if recompute_granularity not in (None, "selective", "full"):
        raise ConfigError(f"parallel.recompute_granularity={recompute_granularity}: choose null, selective or full.")
    tensors = layer_tensors(architecture, element, backend, context_parallel_size=context_parallel_size)
    if recompute_granularity == "full":
        return tensors[:1]
    if recompute_granularity is None:
        return tensors
    kept = [tensor for tensor in tensors if tensor.name not in SELECTIVE_DROPS]
    if not any(tensor.name == "input of the output projection" for tensor in kept):
        kept.append(SavedTensor("input of the output projection", element.linear_input * architecture.query_size, INSIDE))
    return tuple(kept)
