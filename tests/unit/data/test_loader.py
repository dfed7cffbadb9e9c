"""The order of samples: the same in every data-parallel layout and after every interruption."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from itertools import islice

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from endprompt_megatron.data.loader import MicroBatchSampler, collate, micro_batches


def sampler(rank: int = 0, size: int = 1, *, samples: int = 1000, consumed: int = 0, micro: int = 2) -> MicroBatchSampler:
    return MicroBatchSampler(samples, consumed_samples=consumed, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size)


def steps(size: int, *, micro: int, batch: int, count: int, consumed: int = 0, samples: int = 1000) -> list[list[int]]:
    """The samples of `count` global batches over all ranks, in the order that the sampler documents."""
    each = batch // (micro * size)
    ranks = [iter(sampler(rank, size, samples=samples, consumed=consumed, micro=micro)) for rank in range(size)]
    found = []
    for _ in range(count):
        taken: list[int] = []
        for _ in range(each):
            for rank in ranks:
                taken += next(rank)
        found.append(taken)
    return found


def test_ranks_take_runs_in_turn():
    assert list(islice(sampler(0, 2), 3)) == [[0, 1], [4, 5], [8, 9]]
    assert list(islice(sampler(1, 2), 3)) == [[2, 3], [6, 7], [10, 11]]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_layout_trains_the_same_global_batches(size, micro):
    assert steps(size, micro=micro, batch=8, count=5) == [list(range(8 * step, 8 * step + 8)) for step in range(5)]


@given(
    size=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    done=st.integers(0, 6),
    samples=st.integers(1, 60),
)
def test_a_resumed_run_goes_on_where_it_stopped(size, micro, accumulation, done, samples):
    """Also past the end of the dataset, and in another layout than before the interruption."""
    batch = size * micro * accumulation
    whole = steps(1, micro=batch, batch=batch, count=done + 3, samples=samples)
    resumed = steps(size, micro=micro, batch=batch, count=3, consumed=done * batch, samples=samples)
    assert resumed == whole[done:]


def test_indices_wrap_at_the_end_of_the_dataset():
    assert list(islice(sampler(samples=5, micro=2), 4)) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def sample(index: int, positions: list[int]) -> dict:
    return {
        "tokens": torch.tensor([index, index + 1, index + 2]),
        "position_ids": torch.tensor(positions),
        "sample_index": torch.tensor(index),
        "dataset_id": 3,  # added by a blend
    }


def test_collate_makes_one_row_of_shared_positions():
    batch = collate([sample(0, [0, 1, 9]), sample(5, [0, 1, 9])])
    assert batch["position_ids"].tolist() == [0, 1, 9]
    assert batch["tokens"].tolist() == [[0, 1, 2], [5, 6, 7]] and batch["sample_index"].tolist() == [0, 5]
    assert set(batch) == {"tokens", "position_ids", "sample_index"}


def test_collate_keeps_positions_that_differ():
    batch = collate([sample(0, [0, 1, 9]), sample(5, [0, 1, 9]), sample(9, [0, 8, 9])])
    assert batch["position_ids"].tolist() == [[0, 1, 9], [0, 1, 9], [0, 8, 9]]


def test_collate_of_one_sample_shares_its_positions():
    batch = collate([sample(4, [0, 1, 9])])
    assert batch["position_ids"].shape == (3,) and batch["tokens"].shape == (1, 3)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict:
        return sample(index, [0, 1, 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_follow_the_sampler(workers):
    found = list(islice(micro_batches(Numbers(), sampler(1, 2, samples=20, consumed=8), num_workers=workers), 4))
    assert [batch["sample_index"].tolist() for batch in found] == [[10, 11], [14, 15], [18, 19], [2, 3]]
    assert found[0]["tokens"].tolist() == [[10, 11, 12], [11, 12, 13]]


def test_a_process_ends_though_its_loaders_ignore_stop_signals():
    """As when a propagating exception still references the iterator, so that the loader is not shut down."""
    script = """if True:
        import os, signal, sys
        from endprompt_megatron.data.loader import MicroBatchSampler, micro_batches
        import torch
        data = [{"position_ids": torch.arange(4)}] * 64
        sampler = MicroBatchSampler(64, consumed_samples=0, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
        batches = micro_batches(data, sampler, num_workers=1)
        held = [next(batches)]
        loader = batches._workers[0].pid
        held += [batches, held]  # a cycle: not collected before the exit
        os.kill(loader, signal.SIGTERM)
        next(batches), next(batches), next(batches), next(batches)
        print(loader)
        sys.exit(75)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert not psutil.pid_exists(int(done.stdout))


class _DeathSignals(torch.utils.data.Dataset):
    """Samples that hold the signal which the kernel sends to the process that reads them when its parent ends."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = ctypes.c_int()
        assert ctypes.CDLL(None).prctl(2, ctypes.byref(number)) == 0  # PR_GET_PDEATHSIG
        return {"position_ids": torch.arange(4), "number": torch.tensor(number.value)}


def test_a_loader_ends_with_the_process_that_it_serves():
    """And not up to 5 s later, while a next start may want the ports that it has inherited."""
    batch = next(micro_batches(_DeathSignals(), sampler(0, 1, samples=4, consumed=0), num_workers=1))
    assert set(batch["number"].tolist()) == {int(signal.SIGKILL)}
