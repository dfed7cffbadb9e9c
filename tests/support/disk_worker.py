"""Trains like layout_worker; from a given step on, writes of one rank to the disk fail.

A job has "disk": {"rank": the failing rank, "step": the first failing step, "fault": "full" (files are limited to some kilobytes, so that
this rank cannot write its tensors), "metrics" (metrics.jsonl, which only rank 0 writes, is on a full disk), "in the way" (a file has the name
of the next checkpoint's directory, which only rank 0 creates) or "renamed" (the output directory gets another name, NAME_elsewhere)}.
"""

from __future__ import annotations

import resource

from endprompt_megatron.training.trainer import Trainer
from tests.support import layout_worker
from tests.support.disk_faults import fill_open_file

_ROOM = 20_000  # maximum bytes of a file: enough for logs and metrics, not for tensors


def run_job(job: dict) -> None:
    """Train on this rank, with the disk fault of the job."""
    layout_worker.run_job(job, prepare=lambda trainer: _inject_fault(trainer, **job["disk"]))


def _inject_fault(trainer: Trainer, rank: int, step: int, fault: str) -> None:
    original = trainer._step

    def step_with_fault(batches: list) -> tuple:
        if trainer.runtime.rank == rank and trainer.state.step + 1 == step:
            if fault == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, _ROOM))
            elif fault == "metrics":
                fill_open_file(trainer.output_dir / "metrics.jsonl")
            elif fault == "renamed":
                trainer.output_dir.rename(trainer.output_dir.with_name(f"{trainer.output_dir.name}_elsewhere"))
            else:
                (trainer.output_dir / "checkpoints" / f"step_{step:07d}.partial").write_text("no folder")
        return original(batches)

    trainer._step = step_with_fault
