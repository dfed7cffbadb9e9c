"""What clusters do to a job: kill one rank or all of them, also while a checkpoint is being written. Real processes, as srun starts
them."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.directory import damage
from endprompt_megatron.checkpoint.hf_sources import build_tiny_random
from endprompt_megatron.errors import EXIT_HUNG, EXIT_RESUME
from endprompt_megatron.log import read_metrics
from tests.support.ranks import end_of, start_ranks

KILLS = 20
STEPS = 24
LAYOUT = {"use_distributed_optimizer": True}
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    build_tiny_random(directory / "model")
    return directory


def _job(place: Path, name: str, **trainer: object) -> dict:
    options = {"save_interval": 1, "keep_last": 2, **trainer}
    return {
        "output": str(place / name), "model": str(place / "model"), "data": str(place / "datasets"), "scheme": "endprompt", "steps": STEPS,
        "parallel": LAYOUT, "trainer": options,
    }  # fmt: skip


def _start(job: dict) -> list[BaseProcess]:
    return start_ranks(WORLD_SIZE, [job])


def _losses(place: Path, name: str) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(place / name / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(place) -> list[tuple[int, float, float]]:
    assert end_of(_start(_job(place, "undisturbed"))) == [0, 0]
    losses = _losses(place, "undisturbed")
    assert len(losses) == STEPS
    return losses


def _wait_for_progress(output: Path, ranks: list[BaseProcess], steps: int) -> None:
    """Until the metrics hold `steps` records more than the newest checkpoint of the last sitting."""
    known = output / "checkpoints" / "latest"
    before = known.read_text() if known.exists() else ""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.is_alive() for process in ranks):
        if known.exists() and known.read_text() != before:
            steps -= 1
            before = known.read_text()
            if steps <= 0:
                return
        time.sleep(0.002)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_random_moments(place, undisturbed, asynchronous):
    """SIGKILL of one rank and of all, in turn: every run ends as the undisturbed one, and what `latest` names is always whole."""
    generator = random.Random(5 + asynchronous)
    killed = {"one rank": 0, "all ranks": 0}
    during_a_save = runs = 0
    while sum(killed.values()) < KILLS // 2:
        name = f"killed_{'async' if asynchronous else 'sync'}_{runs}"
        runs += 1
        finished = False
        while not finished:
            ranks = _start(_job(place, name, async_save=asynchronous))
            if sum(killed.values()) < KILLS // 2:
                _wait_for_progress(place / name, ranks, generator.randint(1, 3))
                time.sleep(generator.uniform(0, 0.3))
                victims = "one rank" if sum(killed.values()) % 2 else "all ranks"
                writing = list((place / name / "checkpoints").glob("*.partial"))
                alive = all(process.is_alive() for process in ranks)
                for process in ranks if victims == "all ranks" else [generator.choice(ranks)]:
                    process.kill()
                if alive:
                    killed[victims] += 1
                    during_a_save += bool(writing)
            finished = end_of(ranks) == [0, 0]
            latest = place / name / "checkpoints" / "latest"
            if latest.exists():
                assert damage(latest.parent / latest.read_text().strip()) is None
        assert _losses(place, name) == undisturbed
        assert not list((place / name / "checkpoints").glob("*.damaged")), "no kill damaged a checkpoint"
    print(
        f"\n{'asynchronous' if asynchronous else 'synchronous'} saves: SIGKILL of one rank {killed['one rank']} times, of all "
        f"{killed['all ranks']} times, {during_a_save} of these during a save; {runs} run(s) of {STEPS} steps ended bit for bit as undisturbed"
    )
    assert during_a_save >= 2


def test_one_rank_is_asked_and_all_save_and_stop(place, undisturbed):
    name = "asked"
    ranks = _start(_job(place, name, save_interval=0))
    metrics = place / name / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    seen = len(read_metrics(metrics))
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert end_of(ranks) == [EXIT_RESUME, EXIT_RESUME]
    stopped = len(_losses(place, name))
    assert seen <= stopped <= seen + 3
    assert (place / name / "checkpoints" / "latest").read_text().strip() == f"step_{stopped:07d}", "nothing is lost"
    assert end_of(_start(_job(place, name, save_interval=0))) == [0, 0]
    assert _losses(place, name) == undisturbed


def test_a_hung_rank_ends_the_job_with_the_reason(place):
    """A rank that the kernel has stopped answers nobody: the other one says so, shows where it waits, and ends."""
    job = _job(place, "hung", save_interval=0) | {"hang_timeout_minutes": 0.05}
    ranks = _start(job)
    metrics = place / "hung" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    ranks[0].join(60)
    waited = time.monotonic() - stopped
    ranks[1].kill()
    assert ranks[0].exitcode == EXIT_HUNG and waited < 20
    told = ranks[0].log.read_text()
    assert "rank 0 has not finished step" in told and "launch.hang_timeout_minutes=0.05" in told
    assert "trainer.py" in told.split("Where it stands follows")[1], "the stack of the waiting rank"
