"""The figures of a step, reduced over the layout, and the machine's: tokens a second, memory."""

from __future__ import annotations

import resource
import time

import torch
from megatron.core import parallel_state

from endprompt_megatron.training.step import LOSS_FIGURES


def reduce_loss_figures(forward_data: list[dict[str, torch.Tensor]], num_micro_batches: int, device: torch.device) -> dict[str, float]:
    """Losses of one global batch, the same on every rank.

    Args:
        forward_data: what the schedule returned: one entry a micro-batch on the last pipeline stage, none elsewhere.
        num_micro_batches: a rank.
        device: for the reduction.
    Returns:
        loss (weighted, what is optimised), context_loss and prompt_loss (plain means over their tokens; NaN without such tokens).
    """
    total = torch.zeros(len(LOSS_FIGURES), dtype=torch.float64, device=device)
    for entry in forward_data:
        total += entry["figures"].double()
    replicas = parallel_state.get_data_parallel_world_size()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # all but the last stage add zeros
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    loss, context_sum, context_count, prompt_sum, prompt_count = total.tolist()
    return {
        "loss": loss / (num_micro_batches * replicas),
        "context_loss": context_sum / context_count if context_count else float("nan"),
        "prompt_loss": prompt_sum / prompt_count if prompt_count else float("nan"),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Seconds spent inside `with` blocks, the device's queued work included."""

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
