"""S2-attention against dense attention with a mask that follows its definition.

Shapes: b micro-batch, s sequence, n query heads, g key/value heads, d head dim; Megatron order [s, b, n, d].
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.model.build import transformer_config
from endprompt_megatron.model.sdpa import TorchSDPA
from endprompt_megatron.model.shifted_sparse import ShiftedSparseAttention
from tests.support.tiny import architecture_of, load_model, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

DIM = 4
HEADS = [
    (4, 4),
    (4, 2),
    (8, 2),
    (9, 3),
    (6, 2),
    (2, 1),
    (3, 1),
]  # query heads, key/value heads; in the last four the first shifted head is inside a group


@pytest.fixture(scope="module")
def attention_of(single_process, tiny_model_dir):
    architecture = architecture_of(tiny_model_dir)

    def build(heads: int, kv_heads: int, groups: int) -> ShiftedSparseAttention:
        sizes = dataclasses.replace(architecture, num_attention_heads=heads, num_query_groups=kv_heads, head_dim=DIM)
        config = transformer_config(sizes, parallel=ParallelConfig(), precision="fp32")
        return ShiftedSparseAttention(config, 1, AttnMaskType.causal, "self", inner=TorchSDPA, num_groups=groups)

    return build


def inputs(sequence: int, batch: int, heads: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequence, batch, count, DIM, generator=generator).requires_grad_() for count in (heads, kv_heads, kv_heads)]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int) -> torch.Tensor:
    """A token attends to the tokens of its group up to itself; the upper half of the heads uses groups shifted by half a group."""
    sequence, batch, heads, dim = query.shape
    key, value = (tensor.repeat_interleave(heads // key.shape[2], dim=2) for tensor in (key, value))
    size = sequence // groups
    tokens = torch.arange(sequence)
    outputs = []
    for head in range(heads):
        shifted = head >= heads // 2 and groups > 1
        group = (tokens + (size // 2 if shifted else 0)) // size
        sees = (group[:, None] == group[None, :]) & (tokens[:, None] >= tokens[None, :])
        scores = torch.einsum("ibd,jbd->bij", query[:, :, head], key[:, :, head]) / dim**0.5
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bij,jbd->ibd", weights, value[:, :, head]))
    return torch.stack(outputs, dim=2).reshape(sequence, batch, heads * dim)


@settings(max_examples=40)
@given(
    heads=st.sampled_from(HEADS), groups=st.integers(1, 6), half=st.integers(1, 5), batch=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_equals_the_definition_forward_and_backward(attention_of, heads, groups, half, batch, seed):
    attention = attention_of(*heads, groups)
    sequence = 2 * half * groups
    found_inputs, expected_inputs = inputs(sequence, batch, *heads, seed), inputs(sequence, batch, *heads, seed)
    found = attention(*found_inputs, None, attn_mask_type=AttnMaskType.causal)
    expected = reference(*expected_inputs, groups)
    assert found.shape == (sequence, batch, heads[0] * DIM)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slope = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * slope).sum().backward()
    (expected * slope).sum().backward()
    for mine, other in zip(found_inputs, expected_inputs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", ["one group", "evaluation"])
def test_is_full_attention_with_one_group_and_in_evaluation(attention_of, heads, case):
    attention = attention_of(*heads, 1 if case == "one group" else 4).train(case == "one group")
    query, key, value = inputs(16, 2, *heads)
    full = TorchSDPA(attention.config, 1, AttnMaskType.causal, "self")
    found, expected = attention(query, key, value, None), full(query, key, value, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if heads[0] // 2 % (heads[0] // heads[1]) else 0)


@pytest.mark.parametrize(("heads", "ranks"), [((4, 4), 2), ((8, 2), 2), ((9, 3), 3), ((4, 4), 4), ((12, 6), 3)])
def test_ranks_of_a_tensor_parallel_group_make_the_whole(attention_of, heads, ranks, monkeypatch):
    """The upper half of the heads of all ranks is shifted, independent of which heads a rank holds."""
    whole = attention_of(*heads, 4)
    tensors = inputs(24, 2, *heads)
    expected = whole(*tensors, None)
    config = whole.config
    config.tensor_model_parallel_size = ranks
    outputs = []
    for rank in range(ranks):
        monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_rank", lambda rank=rank: rank)
        share = ShiftedSparseAttention(config, 1, AttnMaskType.causal, "self", inner=TorchSDPA, num_groups=4)
        outputs.append(share(*(tensor.chunk(ranks, dim=2)[rank] for tensor in tensors), None))
    torch.testing.assert_close(torch.cat(outputs, dim=-1), expected, rtol=0, atol=1e-6)


def test_nothing_wraps_around(attention_of):
    """In a shifted head the first half group attends only to itself, and no earlier token attends to the last half group."""
    attention = attention_of(4, 4, 4)
    query, key, value = inputs(32, 1, 4, 4)
    before = attention(query, key, value, None).view(32, 4, DIM)
    with torch.no_grad():
        key[-4:], value[-4:] = 3.0, -7.0
    after = attention(query, key, value, None).view(32, 4, DIM)
    assert torch.equal(before[:28], after[:28])
    with torch.no_grad():
        value[:4] = 5.0
    moved = (attention(query, key, value, None).view(32, 4, DIM) != after).any(-1)
    assert moved[:4].all() and not moved[4:, 2:].any(), "a shifted group of half the size at the start"
    assert moved[4:8, :2].all() and not moved[8:, :2].any()


def test_neighbouring_groups_exchange_what_they_know(tiny_model_dir):
    """Through two layers a change of the first token reaches two and a half groups; with full attention it would reach the end."""
    model = load_model(tiny_model_dir, attention_groups=4).train()
    tokens = tokens_of(64)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 300
    with torch.no_grad():
        moved = (model(tokens, torch.arange(64), None) != model(other, torch.arange(64), None)).any(-1)[0]
        assert moved[:24].all() and not moved[32:].any()
        model.eval()
        assert (model(tokens, torch.arange(64), None) != model(other, torch.arange(64), None)).any(-1).all()


def test_model_with_one_group_is_the_model_with_full_attention(tiny_model_dir):
    tokens = tokens_of(64, batch=2)
    full, one_group = load_model(tiny_model_dir).train(), load_model(tiny_model_dir, attention_groups=1).train()
    with torch.no_grad():
        assert torch.equal(full(tokens, torch.arange(64), None), one_group(tokens, torch.arange(64), None))


def test_work_grows_with_the_group_and_not_with_the_sequence(attention_of):
    """The inner attention gets m + 1 groups as samples: S (m + 1) / m rows of G columns."""
    attention = attention_of(4, 2, 4)
    seen = []
    attention.inner.register_forward_pre_hook(lambda module, args: seen.append([tuple(tensor.shape) for tensor in args[:3]]))
    attention(*inputs(64, 2, 4, 2), None)
    assert seen == [[(16, 10, 4, DIM), (16, 10, 2, DIM), (16, 10, 2, DIM)]]


def test_inner_attention_has_as_many_keys_as_queries_where_a_group_is_cut(attention_of):
    assert attention_of(9, 3, 4).inner.config.num_query_groups == 9
    assert attention_of(8, 2, 4).inner.config.num_query_groups == 2
    assert attention_of(9, 3, 1).inner.config.num_query_groups == 3


def test_context_parallelism_is_refused(attention_of):
    config = attention_of(4, 2, 4).config
    config.context_parallel_size = 2
    with pytest.raises(ConfigError, match="context_parallel_size=2"):
        ShiftedSparseAttention(config, 1, AttnMaskType.causal, "self", inner=TorchSDPA, num_groups=4)
