"""Runs on a real Slurm of virtual nodes, submitted with tools/slurm/submit.sh: over two nodes, warned, requeued, with a node killed."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.log import read_metrics
from tests.support.checkout import CHECKOUT, SUBMIT
from tests.support.run_recipe import ROOT, tiny_overrides
from tests.support.slurm.cluster import Cluster, why_there_is_no_slurm

LACKING = why_there_is_no_slurm()
pytestmark = [pytest.mark.requires_slurm, pytest.mark.skipif(LACKING is not None, reason=f"no Slurm: {LACKING}")]
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("slurm")
    build_tiny_random(directory / "model")
    return directory


@pytest.fixture(scope="module")
def cluster(place) -> Iterator[Cluster]:
    with Cluster(place / "cluster") as running:
        yield running


class Job:
    """A job on two of the nodes, submitted as a user does."""

    def __init__(self, cluster: Cluster, place: Path, name: str, *overrides: str, python: str = sys.executable):
        self.cluster, self.output, self.log = cluster, place / name, place / "logs"
        command = [
            str(SUBMIT), "--shared", str(CHECKOUT), "--nodes", "2", "--gpus-per-node", "0", "--python", python, "--shared", str(place), "--local", str(place / "local"),
            "--log-dir", str(self.log), "--", *tiny_overrides(place, name, *overrides),
        ]  # fmt: skip
        said = cluster.run(*command, cwd=place).stdout
        self.number = said.split()[3]
        self.log /= f"{name}-{self.number}.out"

    @classmethod
    def training(cls, cluster: Cluster, place: Path, name: str) -> Job:
        """A run with tensor parallelism across the nodes, and steps long enough to be hit."""
        return cls(
            cluster, place, name, "parallel.tensor_model_parallel_size=2", "probes.enabled=false", "export.verify=false",
            "trainer.eval_interval=0", "trainer.micro_batch_size=1", "trainer.global_batch_size=16", f"trainer.max_steps={STEPS}",
            "trainer.save_interval=3",
        )  # fmt: skip

    @classmethod
    def standing_in(cls, cluster: Cluster, place: Path, name: str, *overrides: str) -> Job:
        """A job of seconds, without a library."""
        program = place / "stand_in"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {CHECKOUT}/tests/support/slurm/stand_in.py "$@"\n')
        program.chmod(0o755)
        return cls(cluster, place, name, *overrides, python=str(program))

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, what: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.told() + self.cluster.told()
            time.sleep(0.05)

    def wait_for_ranks(self, starts: int = 1) -> None:
        self.wait_until(lambda: self.told().count("temporary files in") == 2 * starts)

    def end(self, seconds: float = 600) -> dict[str, str]:
        return self.cluster.wait_for_end(self.number, seconds)

    def records(self) -> list[tuple[int, float, float]]:
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(self.output / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(cluster, place) -> list[tuple[int, float, float]]:
    job = Job.training(cluster, place, "undisturbed")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "0", "node[1-2]"), job.told()
    assert "2 process(es) over gloo" in job.told()
    records = job.records()
    assert [step for step, *_ in records] == list(range(1, STEPS + 1))
    return records


@pytest.mark.repeated
def test_run_that_is_warned_and_later_loses_a_node_ends_as_the_undisturbed_one(cluster, place, undisturbed):
    """Warned: it saves, goes back into the queue and resumes. Node killed: the other rank notices and fails long before Slurm knows, and the
    job must outlast that to be requeued."""
    job = Job.training(cluster, place, "disturbed")
    job.wait_until(lambda: len(job.records()) >= 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: "resuming from" in job.told() and len(job.records()) >= STEPS - 3)
    assert cluster.job(job.number)["Restarts"] == "1" and "stopped on request (exit status 75)" in job.told(), job.told()
    lost = cluster.nodes_of(job.number)[1]
    cluster.kill_node(lost)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "2", "0:0"), job.told()
    assert lost not in cluster.nodes_of(job.number) and job.told().count("resuming from") == 2
    assert job.records() == undisturbed


def test_preempted_job_is_requeued_and_leaves_no_temporary_files(cluster, place):
    job = Job.standing_in(cluster, place, "preempted")
    job.wait_for_ranks()
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=place
    )
    assert cluster.wait_for_end(urgent.stdout.strip(), 60)["JobState"] == "COMPLETED"
    job.wait_for_ranks(2)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.told()
    assert f"master {cluster.nodes_of(job.number)[0]}," in job.told() and list((place / "local").iterdir()) == []


def test_cancelled_job_stays_cancelled(cluster, place):
    job = Job.standing_in(cluster, place, "cancelled")
    job.wait_for_ranks()
    cluster.run("scancel", job.number)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.told()
    assert "requeued" not in job.told().replace("not requeued", "")


def test_job_that_makes_no_progress_ends(cluster, place):
    job = Job.standing_in(cluster, place, "stuck")
    job.wait_for_ranks()
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "75:0"), job.told()
    assert "no checkpoint was made since this start" in job.told()


def test_output_directory_that_one_node_sees_alone_is_refused(cluster, place):
    job = Job.standing_in(cluster, place, "unshared", f"output_dir={cluster.directory}/disk/unshared")
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), job.told()
    assert "disk is not the same directory on every node of" in job.told() and "rank 0" not in job.told()


def test_nothing_is_left_behind(place):
    """Also when the process that started the cluster is killed with tasks running."""
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from tests.support.slurm.cluster import Cluster\n"
        f"with Cluster(Path({str(place / 'left')!r})) as cluster:\n"
        f"    cluster.run('sbatch', '--nodes=2', '--output=/dev/null', '--wrap=srun sleep 4711')\n"
        f"    print('submitted', flush=True)\n    time.sleep(600)"
    )
    mounts, namespaces = (Path("/proc/mounts").read_text(), sorted(Path("/run/netns").glob("*")))
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout.readline() == "submitted\n"

    def running() -> list[psutil.Process]:
        mine = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if "sleep 4711" in command or str(place / "left") in command:
                mine.append(process)
        return [process for process in mine if process.pid != starter.pid]

    deadline = time.monotonic() + 30
    while sum("srun" not in " ".join(process.cmdline()) for process in running() if "sleep" in process.name()) < 2:
        assert time.monotonic() < deadline, running()
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while running():
        assert time.monotonic() < deadline, running()
        time.sleep(0.1)
    assert (Path("/proc/mounts").read_text(), sorted(Path("/run/netns").glob("*"))) == (mounts, namespaces)
