"""Sampler and data loader. The order of samples depends only on the number of consumed samples and is the same in every parallel layout.

A global batch consists of the next `global_batch_size` samples. Each group of micro_batch_size x data_parallel_size consecutive samples is
split into micro-batches of micro_batch_size samples, and data-parallel rank r reads the r-th micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from endprompt_megatron.launch.processes import kill_helpers_at_exit, own_multiprocessing_directory, serve_parent


class MicroBatchSampler:
    """Iterates forever over the micro-batches of this rank, as lists of sample indices. The iteration starts after `consumed_samples`
    samples and wraps around at the end of the dataset.

    Args:
        num_samples: number of samples in the dataset.
        consumed_samples: number of samples that all ranks together have consumed.
        micro_batch_size: number of samples per micro-batch.
        data_parallel_rank, data_parallel_size: data-parallel rank of this process, and size of the data-parallel group.
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
    """Stack the tensors of the samples to [b, S]. If all samples have the same position_ids, the batch has only one row of them, [S], so
    that the rotary tables are computed once.

    Entries that are not tensors are dropped, such as the corpus index that Megatron's BlendedDataset adds.
    """
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if torch.is_tensor(samples[0][key])}
    positions = batch["position_ids"]
    if bool((positions == positions[:1]).all()):
        batch["position_ids"] = positions[0]
    return batch


def micro_batches(dataset: Dataset[Any], sampler: MicroBatchSampler, *, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Return an infinite iterator of collated micro-batches.

    Args:
        dataset: dataset whose samples have the format of EndPromptDataset.
        sampler: sampler that defines the order of the samples.
        num_workers: number of loader processes; 0 loads in this process.
    """
    if num_workers:
        own_multiprocessing_directory()
        kill_helpers_at_exit()
    return iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=serve_parent,
            pin_memory=torch.cuda.is_available() and num_workers > 0,
        )
    )
