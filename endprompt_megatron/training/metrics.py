"""Metrics of a step: losses reduced over all ranks, memory, time."""

from __future__ import annotations

import resource
import time

import torch
from megatron.core import parallel_state

from endprompt_megatron.training.step import LOSS_FIGURES


def reduce_loss_figures(forward_data: list[dict[str, torch.Tensor]], num_micro_batches: int, device: torch.device) -> dict[str, float]:
    """Losses of one global batch, equal on every rank.

    Args:
        forward_data: output of the schedule: one entry per micro-batch on the last pipeline stage, none on other stages.
        num_micro_batches: micro-batches per rank.
        device: device of the reduction.
    Returns:
        loss (weighted; the optimised one), context_loss and prompt_loss (unweighted means over their tokens; NaN without such tokens).
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
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Seconds spent inside `with` blocks, including the queued work of the device."""

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
