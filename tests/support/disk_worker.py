"""Trains as layout_worker does; before a given step the disk of one rank begins to fail.

A job has "disk": {"rank": whose, "step": before which step, "fault": "full" (the kernel refuses files beyond some kilobytes: this rank's
tensors) or "in the way" (what stands where the folder of the next checkpoint should: rank 0 alone makes it)}.
"""

from __future__ import annotations

import resource

from endprompt_megatron.training.trainer import Trainer
from tests.support import layout_worker

_ROOM = 20_000  # bytes of a file: logs and metrics fit, tensors do not


def run_job(job: dict) -> None:
    """Train on this rank."""
    layout_worker.run_job(job, prepare=lambda trainer: _fail_at(trainer, **job["disk"]))


def _fail_at(trainer: Trainer, rank: int, step: int, fault: str) -> None:
    take = trainer._step

    def step_on_a_bad_disk(batches: list) -> tuple:
        if trainer.runtime.rank == rank and trainer.state.step + 1 == step:
            if fault == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, _ROOM))
            else:
                (trainer.output_dir / "checkpoints" / f"step_{step:07d}.partial").write_text("no folder")
        return take(batches)

    trainer._step = step_on_a_bad_disk
