"""Trains like layout_worker and sends a signal at the n-th call of a named function, independent of timing.

A job has "signal": {"number": of the signal, "point": key of POINTS, "call": n >= 1, "ranks": list}. One rank counts the calls: rank 0 for
the functions that only rank 0 calls, else the first of "ranks". It sends the signal to all of "ranks", to itself last.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from endprompt_megatron.checkpoint import training, training_directory
from endprompt_megatron.training.trainer import Trainer
from tests.support import layout_worker

# name -> (object, name of its function, whether to send the signal before the call or after it)
POINTS: dict[str, tuple[Any, str, bool]] = {
    "before a step": (Trainer, "_step", True),
    "after a step": (Trainer, "_step", False),
    "before writing the tensors": (training, "begin_save", True),
    "after starting to write the tensors": (training, "begin_save", False),
    "before writing the checksums": (training_directory, "complete", True),
    "before updating latest": (training_directory, "point_latest_at", True),
    "before retiring old checkpoints": (training_directory, "_retire", True),
    "after completing a checkpoint": (training_directory, "complete", False),
}
OF_RANK_ZERO = tuple(name for name, (owner, *_) in POINTS.items() if owner is training_directory)


def signal_at(point: str, call: int, *, number: int = signal.SIGKILL, pids: Sequence[int] = ()) -> Callable[[], None]:
    """Send a signal at the n-th call of a point in this process.

    Args:
        point: key of POINTS.
        call: n, >= 1.
        number: signal to send.
        pids: processes to send it to, in this order; empty for this process.
    Returns:
        Function that removes the hook.
    """
    owner, name, before = POINTS[point]
    original, calls = getattr(owner, name), 0

    def count_call() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            for pid in pids or [os.getpid()]:
                os.kill(pid, signal.Signals(number))

    def hooked(*arguments: Any, **options: Any) -> Any:
        if before:
            count_call()
        result = original(*arguments, **options)
        if not before:
            count_call()
        return result

    setattr(owner, name, hooked)
    return lambda: setattr(owner, name, original)


def run_job(job: dict) -> None:
    """Train on this rank and send the signal of the job."""
    undo: list[Callable[[], None]] = []
    try:
        layout_worker.run_job(job, prepare=lambda trainer: undo.extend(_hook_job(trainer, **job["signal"])))
    finally:
        for each in undo:
            each()


def _hook_job(trainer: Trainer, number: int, point: str, call: int, ranks: list[int]) -> list[Callable[[], None]]:
    pids: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pids, os.getpid())
    sender = 0 if point in OF_RANK_ZERO else ranks[0]
    if trainer.runtime.rank != sender:
        return []
    return [signal_at(point, call, number=number, pids=[pids[rank] for rank in sorted(ranks, key=lambda rank: rank == sender)])]
