"""Trains as layout_worker does, and gets a signal at a named point: after the n-th call of it in this sitting, not after some seconds.

A job has "signal": {"number": of the signal, "point": one of POINTS, "call": n >= 1, "ranks": list}. The rank that comes to the point first
among those that count it (rank 0 for a checkpoint's last touches, else the first of "ranks") signals all of "ranks", itself last.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from endprompt_megatron.checkpoint import training, training_directory
from endprompt_megatron.training.trainer import Trainer
from tests.support import layout_worker

# name -> (object, its function, whether the signal comes before the function or after it)
POINTS: dict[str, tuple[Any, str, bool]] = {
    "a step begins": (Trainer, "_step", True),
    "a step has ended": (Trainer, "_step", False),
    "the folder of a checkpoint is made": (training, "begin_save", True),
    "the tensors are written, or about to be": (training, "begin_save", False),
    "the checksums are to be written": (training_directory, "complete", True),
    "the checkpoint is to be named": (training_directory, "point_latest_at", True),
    "old checkpoints are to go": (training_directory, "_retire", True),
    "a checkpoint is complete": (training_directory, "complete", False),
}
OF_RANK_ZERO = tuple(name for name, (owner, *_) in POINTS.items() if owner is training_directory)


def kill_here_at(point: str, call: int) -> None:
    """Arm SIGKILL of this very process, which is no rank of a job, e.g. a recipe."""
    owner, name, _ = POINTS[point]
    real, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and POINTS[point][2]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, watched)


def run_job(job: dict) -> None:
    """Train on this rank, with the signal armed."""
    undo: list[Callable[[], None]] = []
    try:
        layout_worker.run_job(job, prepare=lambda trainer: undo.append(_arm(trainer, **job["signal"])))
    finally:
        for each in undo:
            each()


def _arm(trainer: Trainer, number: int, point: str, call: int, ranks: list[int]) -> Callable[[], None]:
    pids: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pids, os.getpid())
    owner, name, before = POINTS[point]
    real, calls = getattr(owner, name), 0
    counting = 0 if point in OF_RANK_ZERO else ranks[0]

    def reached() -> None:
        nonlocal calls
        calls += 1
        if calls == call and trainer.runtime.rank == counting:
            for rank in sorted(ranks, key=lambda rank: rank == counting):
                os.kill(pids[rank], signal.Signals(number))

    def watched(*arguments: Any, **options: Any) -> Any:
        if before:
            reached()
        result = real(*arguments, **options)
        if not before:
            reached()
        return result

    setattr(owner, name, watched)
    return lambda: setattr(owner, name, real)
