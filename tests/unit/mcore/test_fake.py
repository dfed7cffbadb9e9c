"""Fake jobs of any size on one process: Megatron's groups against hand-worked members, and no state left afterwards."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import fake, runtime

# Megatron's order from the fastest: tensor, context, data, pipeline. 16 ranks = 2 x 2 x 2 x 2, so that each dimension is one bit of a rank.
SIXTEEN = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)


def test_groups_of_sixteen_ranks_by_hand():
    first = fake.groups_of_rank(SIXTEEN, world_size=16, rank=0)
    assert first == fake.RankGroups(
        rank=0, tensor=(0, 1), context=(0, 2), data=(0, 4), pipeline=(0, 8), optimizer=(0, 2, 4, 6), model=(0, 1, 8, 9)
    )
    last = fake.groups_of_rank(SIXTEEN, world_size=16, rank=15)
    assert last == fake.RankGroups(
        rank=15, tensor=(14, 15), context=(13, 15), data=(11, 15), pipeline=(7, 15), optimizer=(9, 11, 13, 15), model=(6, 7, 14, 15)
    )


def test_512_ranks():
    groups = fake.groups_of_rank(ParallelConfig(8, 4, None, 4), world_size=512, rank=511)
    assert groups.tensor == tuple(range(504, 512)) and groups.pipeline == (127, 255, 383, 511)
    assert groups.context == (487, 495, 503, 511) and groups.data == (415, 447, 479, 511)
    assert len(groups.optimizer) == 16 and len(groups.model) == 32


def test_nothing_is_left_of_a_job():
    current_device, tracker = torch.cuda.current_device, layers.get_cuda_rng_tracker
    with pytest.raises(KeyError), fake.fake_job(SIXTEEN, world_size=16, rank=3), fake.on_meta():
        assert torch.distributed.get_rank() == 3 and parallel_state.get_tensor_model_parallel_rank() == 1
        raise KeyError("a build that fails")
    assert not torch.distributed.is_initialized() and not parallel_state.model_parallel_is_initialized()
    assert torch.cuda.current_device is current_device and layers.get_cuda_rng_tracker is tracker
    assert torch.zeros(1).device.type == "cpu"


def test_a_job_does_not_start_in_the_midst_of_another():
    with fake.fake_job(SIXTEEN, world_size=16, rank=0), pytest.raises(AssertionError, match="fake job must run before the real one"):
        fake.groups_of_rank(SIXTEEN, world_size=16, rank=0)


def test_a_real_job_starts_afterwards():
    fake.groups_of_rank(SIXTEEN, world_size=16, rank=9)
    runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)
    try:
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        total = torch.ones(2)
        torch.distributed.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    finally:
        runtime.shut_down()


@pytest.mark.parametrize("device", [None, "cuda", "cuda:3", torch.device("cuda"), "meta"])
def test_on_meta_tensors_have_no_memory(device):
    with fake.on_meta():
        made = torch.empty(10**15, device=device)
        assert made.is_meta and made.cuda().is_meta
        assert torch.zeros(1, device="cpu").device.type == "cpu", "what is asked for on the CPU is there"
        assert torch.cuda.current_device() == torch.device("meta")
