"""Rotary angles at explicit positions, against transformers' cos and sin, and against a cache that would serve stale ones."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.rope.embedding import PositionRotaryEmbedding
from endprompt_megatron.rope.scaling import RopeScaling

ROPE = RopeScaling("pi", 500000.0, 16, factor=8.0)


def angles(rope: RopeScaling, positions: torch.Tensor) -> torch.Tensor:
    rotary = PositionRotaryEmbedding(rope)
    with rotary.at(positions):
        return rotary(positions.shape[-1])


@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 16), (100000.0, 64), (500000.0, 128)])
@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("pi", 8.0)])
def test_cos_and_sin_equal_transformers_up_to_the_far_end(theta, dim, kind, factor):
    rope = RopeScaling(kind, theta, dim, factor=factor)
    positions = torch.cat([torch.arange(20), torch.tensor([4095, 8191, 8192, 32768, 65535, 131071])])
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, **rope.to_hf())
    cos, sin = LlamaRotaryEmbedding(config=config)(torch.zeros(1), positions[None])
    ours = angles(rope, positions)[:, 0, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cos(), cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.sin(), sin[0], rtol=0, atol=1e-5)


def test_shared_positions_make_one_table():
    positions = torch.tensor([0, 1, 2, 65534, 65535])
    table = angles(ROPE, positions)
    assert table.shape == (5, 1, 1, 16) and table.dtype == torch.float32
    expected = positions.float()[:, None] * torch.from_numpy(ROPE.inv_freq())
    torch.testing.assert_close(table[:, 0, 0], torch.cat([expected, expected], dim=1), rtol=0, atol=0)


def test_positions_by_sample_make_a_table_each():
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 98, 99], [5, 6, 7, 4000]])
    table = angles(ROPE, positions)
    assert table.shape == (4, 3, 1, 16) and table.dtype == torch.float32 and table.is_contiguous()
    for sample in range(3):
        torch.testing.assert_close(table[:, sample : sample + 1], angles(ROPE, positions[sample]), rtol=0, atol=0)


def test_no_stale_table_for_another_row_of_the_same_length():
    rotary = PositionRotaryEmbedding(ROPE)
    seen = []
    for positions in (torch.arange(6), torch.tensor([0, 1, 2, 3, 900, 901]), torch.arange(6)):
        with rotary.at(positions):
            seen.append(rotary(6))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_other_frequencies_from_the_next_call_on():
    rotary = PositionRotaryEmbedding(ROPE)
    positions = torch.arange(100, 108)
    with rotary.at(positions):
        stretched = rotary(8)
    rotary.set_scaling(RopeScaling("none", 500000.0, 16))
    with rotary.at(positions):
        native = rotary(8)
    assert rotary.scaling.type == "none"
    torch.testing.assert_close(stretched * 8, native, rtol=1e-6, atol=0)
    assert torch.equal(native, angles(RopeScaling("none", 500000.0, 16), positions))


def test_frequencies_stay_float32_in_a_bfloat16_model():
    rotary = PositionRotaryEmbedding(ROPE).bfloat16()
    with rotary.at(torch.tensor([65535])):
        table = rotary(1)
    assert table.dtype == torch.float32 and torch.equal(table, angles(ROPE, torch.tensor([65535])))


def test_megatrons_own_embedding_knows_no_positions(single_process):
    """What makes the class necessary: the stock module's table depends on the length alone."""
    stock = RotaryEmbedding(16, 1.0, rotary_base=500000, use_cpu_initialization=True)
    native = RopeScaling("none", 500000.0, 16)
    torch.testing.assert_close(stock(6), angles(native, torch.arange(6)), rtol=1e-6, atol=1e-6)


def test_outside_of_at_there_are_no_positions():
    rotary = PositionRotaryEmbedding(ROPE)
    with pytest.raises(RuntimeError, match="no positions"):
        rotary(6)
    with pytest.raises(ZeroDivisionError), rotary.at(torch.arange(6)):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="no positions"):  # nor after a forward pass that failed
        rotary(6)


@pytest.mark.parametrize("positions", [torch.arange(5), torch.arange(7), torch.arange(12).reshape(6, 2)])
def test_every_token_needs_its_position(positions):
    rotary = PositionRotaryEmbedding(ROPE)
    with rotary.at(positions), pytest.raises(RuntimeError, match=f"{positions.shape[-1]} position_ids for 6 tokens"):
        rotary(6)


@pytest.mark.parametrize("positions", [torch.tensor(3), torch.zeros(1, 2, 3, dtype=torch.int64)])
def test_positions_of_another_rank_are_refused(positions):
    with pytest.raises(ValueError, match="must be"), PositionRotaryEmbedding(ROPE).at(positions):
        pass
