"""The order of samples: a pure function of how many were consumed, the same in every parallel layout.

A global batch holds the next `global_batch_size` samples; data-parallel rank r takes, of each group of micro_batch_size x
data_parallel_size samples, the r-th run of micro_batch_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from endprompt_megatron.launch.processes import kill_helpers_at_exit, outlast_stop_signals


class MicroBatchSampler:
    """Sample indices of this rank's micro-batches, from `consumed_samples` on, without end (indices wrap at the dataset's length).

    Args:
        num_samples: length of the dataset.
        consumed_samples: samples all ranks have consumed before.
        micro_batch_size: samples of one micro-batch.
        data_parallel_rank, data_parallel_size: of this rank.
    """

    def __init__(self, num_samples: int, *, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int):
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.data_parallel_size
        start = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        while True:
            yield [(start + offset) % self.num_samples for offset in range(self.micro_batch_size)]
            start += stride


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples to [b, S]; positions that all samples share become one row [S], so that rotary tables are made once.

    What Megatron's BlendedDataset adds to a sample (the number of its corpus) is left out.
    """
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if torch.is_tensor(samples[0][key])}
    positions = batch["position_ids"]
    if bool((positions == positions[:1]).all()):
        batch["position_ids"] = positions[0]
    return batch


def micro_batches(dataset: Dataset[Any], sampler: MicroBatchSampler, *, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """An endless iterator of collated micro-batches.

    Args:
        dataset: of samples as EndPromptDataset yields them.
        sampler: their order.
        num_workers: loader processes; 0 loads in this one.
    """
    if num_workers:
        kill_helpers_at_exit()
    return iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=outlast_stop_signals,
            pin_memory=torch.cuda.is_available() and num_workers > 0,
        )
    )
