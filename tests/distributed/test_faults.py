"""What clusters do to a job: kill one rank or all of them, also while a checkpoint is being written. Real processes, as srun starts
them."""

from __future__ import annotations

import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.checkpoint.training_directory import damage
from endprompt_megatron.errors import EXIT_HUNG, EXIT_RESUME, EXIT_USER_ERROR
from endprompt_megatron.log import read_metrics
from tests.support.ranks import end_of, start_ranks
from tests.support.signal_worker import POINTS

STEPS = 16
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


def _signalled(job: dict, number: int, point: str, call: int, ranks: list[int]) -> list[BaseProcess]:
    """Start the job; at that call of that point these ranks get the signal."""
    signalled = {"number": int(number), "point": point, "call": call, "ranks": ranks}
    return start_ranks(WORLD_SIZE, [{**job, "worker": "tests.support.signal_worker", "signal": signalled}])


def _sittings(count: int) -> list[tuple[str, int, list[int]]]:
    """(point, call, ranks that are killed) of so many sittings: every point in turn, one rank and all ranks in turn, the first or second call."""
    return [(list(POINTS)[number % len(POINTS)], 1 + number // 2 % 2, [[0, 1], [number // 2 % 2]][number % 2]) for number in range(count)]


@pytest.mark.parametrize(
    ("asynchronous", "kills"),
    [
        (False, len(POINTS)),
        (True, len(POINTS) // 2),
        pytest.param(False, 2 * len(POINTS), marks=pytest.mark.repeated),
        pytest.param(True, 2 * len(POINTS), marks=pytest.mark.repeated),
    ],
)
def test_killed_at_every_point_of_a_save(place, undisturbed, asynchronous, kills):
    """SIGKILL of one rank and of all, in turn: every run ends as the undisturbed one, and what `latest` names is always whole."""
    name = f"killed_{'async' if asynchronous else 'sync'}_{kills}"
    checkpoints = place / name / "checkpoints"
    for point, call, ranks in _sittings(kills):
        statuses = end_of(_signalled(_job(place, name, async_save=asynchronous), signal.SIGKILL, point, call, ranks))
        assert all(statuses[rank] == -signal.SIGKILL for rank in ranks) and 0 not in statuses, (point, call, ranks, statuses)
        if (checkpoints / "latest").exists():
            assert damage(checkpoints / (checkpoints / "latest").read_text().strip()) is None, (point, call, ranks)
    assert end_of(_start(_job(place, name, async_save=asynchronous))) == [0, 0]
    assert _losses(place, name) == undisturbed
    assert not list(checkpoints.glob("*.damaged")), "no kill damaged a checkpoint"


def test_one_signalled_rank_makes_all_ranks_save_and_stop(place, undisturbed):
    name = "asked"
    assert end_of(_signalled(_job(place, name, save_interval=0), signal.SIGUSR1, "before a step", 4, [1])) == [EXIT_RESUME, EXIT_RESUME]
    assert len(_losses(place, name)) == 4, "the step is finished and nothing is begun"
    assert (place / name / "checkpoints" / "latest").read_text().strip() == "step_0000004", "nothing is lost"
    assert end_of(_start(_job(place, name, save_interval=0))) == [0, 0]
    assert _losses(place, name) == undisturbed


def test_a_hung_rank_ends_the_job_with_the_reason(place):
    """A rank that the kernel has stopped answers nobody: the other one says so, shows where it waits, and ends."""
    job = _job(place, "hung", save_interval=0) | {"hang_timeout_minutes": 0.05}
    ranks = _signalled(job, signal.SIGSTOP, "before a step", 3, [1])
    ranks[0].join(300)
    ranks[1].kill()
    assert ranks[0].exitcode == EXIT_HUNG
    told = ranks[0].log.read_text()
    assert "rank 0 has not finished step" in told and "launch.hang_timeout_minutes=0.05" in told
    assert "trainer.py" in told.split("Its stack traces follow")[1], "the stack of the waiting rank"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("rank", "fault", "cause"), [(0, "in the way", "Not a directory"), (0, "full", "File too large"), (1, "full", "File too large")]
)
def test_a_rank_that_fails_alone_ends_the_job_with_its_error_on_every_rank(place, rank, fault, cause, asynchronous):
    """Long before the time-out, which is minutes, every rank ends with the error of the one that failed, and the checkpoint before is whole."""
    name = f"{fault}_{rank}_{asynchronous}"
    job = _job(place, name, async_save=asynchronous) | {
        "worker": "tests.support.disk_worker",
        "disk": {"rank": rank, "step": 3, "fault": fault},
    }
    ranks = start_ranks(WORLD_SIZE, [job])
    assert end_of(ranks) == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    for process in ranks:
        told = process.log.read_text()
        assert "CheckpointError: rank 0: " in told, told  # which gathers what tensors could not be written
        assert "could not be written" in told and cause in told and "earlier checkpoints are intact" in told, told
    checkpoints = place / name / "checkpoints"
    assert damage(checkpoints / (checkpoints / "latest").read_text().strip()) is None


def test_rank_zero_that_finds_no_room_for_its_metrics_ends_every_rank_with_the_path(place, undisturbed):
    """The other rank waits in a collective for rank 0, which writes alone."""
    job = _job(place, "no_metrics")
    ranks = start_ranks(WORLD_SIZE, [job | {"worker": "tests.support.disk_worker", "disk": {"rank": 0, "step": 3, "fault": "metrics"}}])
    assert end_of(ranks) == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    for process in ranks:
        told = process.log.read_text()
        expected = (
            f"OutputError: rank 0: {place / 'no_metrics' / 'metrics.jsonl'} could not be written ([Errno 28] No space left on device)"
        )
        assert expected in told, told
    assert end_of(_start(job)) == [0, 0]
    assert _losses(place, "no_metrics") == undisturbed


def test_a_renamed_directory_is_the_same_error_on_every_rank_and_goes_on_under_its_name(place, undisturbed):
    job = _job(place, "renamed", save_interval=2)
    ranks = start_ranks(WORLD_SIZE, [job | {"worker": "tests.support.disk_worker", "disk": {"rank": 0, "step": 4, "fault": "renamed"}}])
    assert end_of(ranks) == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    for process in ranks:
        told = process.log.read_text()
        assert "CheckpointError: rank 0: " in told and "renamed was renamed or removed while the job was writing to it" in told, told
    assert not (place / "renamed").exists(), "it is not created anew"
    (place / "renamed_elsewhere").rename(place / "renamed")
    assert end_of(_start(job)) == [0, 0]
    assert _losses(place, "renamed") == undisturbed
