"""Metrics of a step: losses averaged over all ranks, peak memory, and time."""

from __future__ import annotations

import resource
import time

import torch
from megatron.core import parallel_state

from endprompt_megatron.training.step import LOSS_FIGURES


def reduce_loss_figures(forward_data: list[dict[str, torch.Tensor]], num_micro_batches: int, device: torch.device) -> dict[str, float]:
    """Return the losses of one global batch. All ranks must call this function, and all get the same result.

    Args:
        forward_data: output of the schedule. It has one entry per micro-batch on the last pipeline stage, and none on other stages.
        num_micro_batches: number of micro-batches per rank.
        device: device on which the losses are reduced.
    Returns:
        `loss` is the weighted loss that training optimises. `context_loss` and `prompt_loss` are unweighted means over context and prompt
        tokens, or NaN without such tokens.
    """
    total = torch.zeros(len(LOSS_FIGURES), dtype=torch.float64, device=device)
    for entry in forward_data:
        total += entry["figures"].double()
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # only the last pipeline stage adds values other than zero
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    loss, context_sum, context_count, prompt_sum, prompt_count = total.tolist()
    return {
        "loss": loss / (num_micro_batches * data_parallel_size),
        "context_loss": context_sum / context_count if context_count else float("nan"),
        "prompt_loss": prompt_sum / prompt_count if prompt_count else float("nan"),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Measures the seconds spent inside `with` blocks, including work that is queued on the device.

    Attributes:
        seconds: total over all blocks.
        last: seconds of the last block.
    """

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self.last = 0.0
        self._device = device

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.last = time.perf_counter() - self._started
        self.seconds += self.last
