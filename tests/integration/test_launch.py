"""Local workers that extend.py starts itself: signals, killed processes, probes, and resuming with another number of workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.errors import EXIT_INTERRUPTED, EXIT_RESUME
from endprompt_megatron.launch.processes import STOP_SIGNALS
from endprompt_megatron.log import read_metrics
from tests.support.run_recipe import recipe_command, run_recipe, start_recipe, tiny_overrides


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("launch")
    build_tiny_random(directory / "model")
    return directory


class Job:
    """A running recipe with two workers, whose steps are long enough for a signal to arrive during a step.

    Args:
        place: directory of the test's files.
        name: name of the run and of its log file.
        more: further overrides.
        forked: fork the recipe and its workers from the server; False starts a new interpreter for each of them, as a shell does.
    """

    def __init__(self, place: Path, name: str, *more: str, forked: bool = True):
        self.output = place / name
        self.log = place / f"{name}.log"
        overrides = self.overrides(place, name, *more)
        if forked:
            self._process = start_recipe(*overrides, cwd=place, stdout=self.log, stderr=self.log)
        else:
            with self.log.open("w") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                self._process = subprocess.Popen(recipe_command(*overrides), cwd=place, env=environment, stdout=log, stderr=log)
        self.process = psutil.Process(self._process.pid)
        self.workers: list[psutil.Process] = []

    @staticmethod
    def overrides(place: Path, name: str, *more: str) -> list[str]:
        return tiny_overrides(
            place, name, "launch.nproc_per_node=2", "probes.enabled=false", "export.verify=false", "trainer.eval_interval=0",
            "trainer.micro_batch_size=1", "trainer.global_batch_size=48", "trainer.max_steps=6", "trainer.save_interval=0", *more,
        )  # fmt: skip

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + 300
        while len(self.losses()) < count:
            assert time.monotonic() < deadline and psutil.pid_exists(self.process.pid), self.log.read_text()
            time.sleep(0.01)
        self.workers = self.process.children(recursive=True)
        assert len(self.workers) >= 2

    def losses(self) -> list[float]:
        return [record["loss"] for record in read_metrics(self.output / "metrics.jsonl") if "loss" in record]

    def end(self, seconds: float = 240) -> int:
        """Wait for the recipe and return its exit status. Fails if one of its processes is still running."""
        if isinstance(self._process, subprocess.Popen):
            status = self._process.wait(seconds)
        else:
            self._process.join(seconds)
            status = self._process.exitcode
            assert status is not None, f"still running after {seconds} s: {self.log.read_text()}"
        _, left = psutil.wait_procs(self.workers, timeout=10)
        assert not left, f"left behind: {left}"
        return status


@pytest.fixture(scope="module")
def undisturbed(place) -> list[float]:
    job = Job(place, "undisturbed")
    job.wait_for_steps(1)
    assert job.end() == 0, job.log.read_text()
    assert "starting 2 local workers" in job.log.read_text() and len(list((job.output / "logs").glob("*/*/1/std*.log"))) == 2
    return job.losses()


def test_sigterm_in_the_middle_of_an_accumulation(place, undisturbed):
    """The run saves a checkpoint within one step and exits with EXIT_RESUME. The resumed run has the losses of an undisturbed run.

    Slurm signals every process of a job, so the test also signals the helper processes of the workers (data loaders, checkpoint queue).
    """
    name = "terminated"
    job = Job(place, name, "trainer.save_interval=1", "data.num_workers=1")
    job.wait_for_steps(2)
    time.sleep(0.1)
    for process in [*job.workers, job.process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    assert job.end() == EXIT_RESUME, job.log.read_text()
    done = len(job.losses())
    assert done < 6 and "which is saved; start the same command again" in job.log.read_text()
    assert (job.output / "checkpoints" / "latest").read_text().strip() == f"step_{done:07d}"
    again = Job(place, name)
    assert again.end() == 0, again.log.read_text()
    assert again.losses() == undisturbed


def test_one_process_goes_on_where_two_stood(place, undisturbed):
    """One process continues a run of two workers: it loads the finished training, and its probes give the same results."""
    output = place / "undisturbed"
    assert json.loads((output / "summary.json").read_text())["needle_after"] == {}
    found = {}
    for workers in (2, 1):
        again = run_recipe(
            *Job.overrides(place, "undisturbed", f"launch.nproc_per_node={workers}", "probes.enabled=true"), cwd=place, timeout=300
        )
        assert again.returncode == 0 and ("was saved in another layout" in again.stderr) == (workers == 1), again.stderr
        summary = json.loads((output / "summary.json").read_text())
        assert summary["world_size"] == workers and set(summary["needle_after"]) == {"256"}
        found[workers] = json.loads((output / "evaluation.json").read_text())["systems"]
        shutil.rmtree(output / "probes")  # so that the next start computes the probes again
    assert found[1] == found[2] and set(found[2]) == {"base", "untrained", "trained"}
    refused = run_recipe(*Job.overrides(place, "undisturbed", "parallel.use_distributed_optimizer=true"), cwd=place)
    assert refused.returncode == 2 and "parallel.use_distributed_optimizer: False there, True now" in refused.stderr


@pytest.mark.parametrize(
    "layout",
    [
        # after the last step a rank has only its own shard of the updated weights
        ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
        pytest.param(["parallel.pipeline_model_parallel_size=2"], marks=pytest.mark.repeated),
    ],
    ids=["gathered parameters", "pipeline"],
)
def test_two_workers_probe_what_they_trained_as_one_process_does(place, layout):
    name = f"probed_{len(layout)}"
    overrides = [*Job.overrides(place, name, "probes.enabled=true", "trainer.max_steps=2", "trainer.global_batch_size=8"), *layout]
    found = []
    for again in ([], ["launch.nproc_per_node=1", "parallel.pipeline_model_parallel_size=1"]):
        done = run_recipe(*overrides, *again, cwd=place, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((place / name / "evaluation.json").read_text())["systems"])
        shutil.rmtree(place / name / "probes")
    for system, (two, one) in ((system, [each[system] for each in found]) for system in ("base", "untrained", "trained")):
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6), system
        assert two["needle"]["256"]["key_log_probability"] == pytest.approx(one["needle"]["256"]["key_log_probability"], rel=1e-6), system
    assert found[0]["trained"]["perplexity"] != found[0]["untrained"]["perplexity"]


def test_probes_are_skipped_with_context_parallelism_and_the_log_names_the_remedy(place):
    overrides = Job.overrides(place, "cut", "probes.enabled=true", "trainer.max_steps=1", "parallel.context_parallel_size=2")
    done = run_recipe(*overrides, cwd=place, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no probes: parallel.context_parallel_size=2" in done.stderr and "parallel.context_parallel_size=1 afterwards" in done.stderr


@pytest.mark.parametrize(
    ("number", "forked"),
    [(signal.SIGINT, True), (signal.SIGKILL, True), pytest.param(signal.SIGKILL, False, marks=pytest.mark.repeated)],
)
def test_no_process_is_left_behind(place, number, forked):
    """After Ctrl-C, and after SIGKILL of the launcher."""
    job = Job(place, f"ended_{number.name}", forked=forked)
    job.wait_for_steps(1)
    job.process.send_signal(number)
    assert job.end() == (EXIT_INTERRUPTED if number == signal.SIGINT else -number)
    assert "Traceback" not in job.log.read_text()


def test_a_failed_ranks_traceback_is_shown_once(place):
    job = Job(place, "failed")
    job.wait_for_steps(1)
    next(process for process in job.workers if process.name() == "rank 1").kill()
    assert job.end() not in (0, EXIT_RESUME)
    text = job.log.read_text()
    assert text.count("failed with exit status") == 1
    assert text.count("Traceback (most recent call last)") <= 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_during_imports(place, number):
    """A stop signal during the imports, which can take minutes on a shared disk, ends the run with EXIT_RESUME and without a traceback."""
    process = subprocess.Popen(
        recipe_command(*tiny_overrides(place, "early")),
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():  # megatron.core and transformers are imported after torch
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_RESUME and f"stopped by {number.name}" in said and "Traceback" not in said, said
    assert not (place / "early").exists()
