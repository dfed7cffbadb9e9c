"""Which tokens a context-parallel rank holds, against hand-worked cases and Megatron's own batch slicing. Tests with several ranks are in
tests/distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state

from endprompt_megatron.mcore.context_parallel import chunks_of_rank, gather_sequence, token_indices


def test_two_ranks_by_hand():
    assert token_indices(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert token_indices(8, 1, 2).tolist() == [2, 3, 4, 5]


def test_one_rank_holds_everything():
    assert token_indices(6, 0, 1).tolist() == list(range(6))


@given(size=st.integers(1, 8), chunk=st.integers(1, 20))
def test_every_token_is_held_once_and_causal_work_is_shared_evenly(size, chunk):
    shares = [token_indices(2 * size * chunk, rank, size) for rank in range(size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(2 * size * chunk))
    assert all((share.diff() > 0).all() for share in shares), "in physical order on each rank"
    work = {sum(number + 1 for number in chunks_of_rank(rank, size)) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_equals_megatrons_own_slicing(size):
    """megatron.core.utils.get_batch_on_this_cp_rank, by the formula of its source: view into 2c chunks, take r and 2c-1-r."""
    batch = torch.arange(16)
    for rank in range(size):
        theirs = batch.view(2 * size, -1).index_select(0, torch.tensor([rank, 2 * size - rank - 1])).flatten()
        assert torch.equal(batch[token_indices(16, rank, size)], theirs)


def test_gathering_over_one_rank_changes_nothing(single_process):
    local = torch.randn(6, 2, 3, requires_grad=True)
    whole = gather_sequence(local, parallel_state.get_context_parallel_group())
    assert torch.equal(whole, local)
    (whole * torch.arange(6.0)[:, None, None]).sum().backward()
    assert torch.equal(local.grad, torch.arange(6.0)[:, None, None].expand(6, 2, 3))
