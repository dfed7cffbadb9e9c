"""Ranks of a job as srun starts them: real processes that meet over TCP and that no launcher watches. They are forked from a server that
has imported everything, so that a start costs a second and not ten."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.run_recipe import fork_checkpoint_helper, fork_server


def start_ranks(world_size: int, jobs: Iterable[dict], *, preload: Iterable[str] = ()) -> list[BaseProcess]:
    """Start `world_size` processes that do the jobs one after the other: train (layout_worker.py), or what the module job["worker"] does.
    `preload` names modules that are imported once for all of them."""
    context = fork_server(*preload)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = tempfile.mkdtemp(prefix="ranks")
    ranks = [
        context.Process(target=_rank, name=f"rank {rank}", args=(rank, world_size, port, json.dumps(list(jobs)), log))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.log = Path(log) / f"{process.name}.log"  # type: ignore[attr-defined]
        process.start()
    return ranks


def end_of(ranks: list[BaseProcess], seconds: float = 300) -> list[int]:
    """Exit statuses, once all have ended."""
    for process in ranks:
        process.join(seconds)
        assert process.exitcode is not None, f"{process.name} outlives its job"
    return [process.exitcode for process in ranks]


def run_ranks(world_size: int, jobs: Iterable[dict], *, preload: Iterable[str] = ()) -> None:
    """Train the jobs; a failed rank fails the test with the end of what it said."""
    ranks = start_ranks(world_size, jobs, preload=preload)
    statuses = end_of(ranks)
    for process, status in zip(ranks, statuses, strict=True):
        assert status == 0, f"{process.name} of {world_size}: exit status {status}\n{process.log.read_text()[-4000:]}"


def _rank(rank: int, world_size: int, port: int, jobs: str, log: str) -> None:
    descriptor = os.open(Path(log) / f"rank {rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    import torch

    from endprompt_megatron.errors import EXIT_RESUME, EXIT_USER_ERROR, USER_ERRORS, RunInterrupted

    torch.set_num_threads(1)
    fork_checkpoint_helper()
    try:
        for job in json.loads(jobs):
            importlib.import_module(job.get("worker", "tests.support.layout_worker")).run_job(job)
    except RunInterrupted:
        sys.exit(EXIT_RESUME)
    except USER_ERRORS as error:  # as the recipes end
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    torch.distributed.destroy_process_group()
