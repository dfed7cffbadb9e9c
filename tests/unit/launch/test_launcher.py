"""The environment that a task of srun sets from Slurm's variables; the exit status of local workers."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

from endprompt_megatron.config.schema import LaunchConfig, RunConfig
from endprompt_megatron.errors import EXIT_INTERRUPTED, ConfigError
from endprompt_megatron.launch import launcher
from endprompt_megatron.launch.processes import STOP_SIGNALS
from tests.support.run_recipe import ROOT

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}


@pytest.fixture
def task(monkeypatch):
    """The environment after `adopt_srun_environment` with the given variables of Slurm."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")  # no scontrol, as in most containers

    def adopt(**variables: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {**os.environ, **TASK, **variables})
            launcher.adopt_srun_environment()
            return dict(os.environ)

    return adopt


@pytest.mark.parametrize(
    ("nodes", "first"), [("node7", "node7"), ("gpu[003-007,012]", "gpu003"), ("a1,a2", "a1")], ids=["one", "range", "list"]
)
def test_a_task_knows_its_rank_and_the_first_node(task, nodes, first):
    found = task(SLURM_STEP_NODELIST=nodes, SLURM_JOB_NODELIST="other[1-9]")
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("5", "16", "1", first)


def test_no_two_steps_near_each_other_share_a_port(task):
    """Steps of one job run on the same nodes at once, and so do jobs that were submitted one after the other."""
    ports = {
        (job, step): int(task(SLURM_JOB_NODELIST="node1", SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"])
        for job, step in itertools.product(range(123_400, 123_440), range(16))
    }
    assert len(set(ports.values())) == len(ports)
    assert min(ports.values()) > 16384 and max(ports.values()) < 32768, "below the ports that Linux gives to clients"


def test_every_task_of_a_step_finds_the_same_port_and_a_given_one_stays(task):
    ports = {task(SLURM_JOB_NODELIST="node[1-2]", SLURM_PROCID=str(rank), SLURM_LOCALID="0")["MASTER_PORT"] for rank in range(16)}
    assert len(ports) == 1
    assert task(SLURM_JOB_NODELIST="node1", MASTER_PORT="29999")["MASTER_PORT"] == "29999"
    old_name = {"SLURM_STEP_ID": "", "SLURM_STEPID": "3"}
    assert task(SLURM_JOB_NODELIST="node1", **old_name)["MASTER_PORT"] == task(SLURM_JOB_NODELIST="node1", SLURM_STEP_ID="3")["MASTER_PORT"]


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "0"}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_ID": str(0xFFFFFFFA)}, {"SLURM_STEP_ID": str(0xFFFFFFFB)}, {"SLURM_STEP_ID": ""}],
    ids=["torchrun", "one task", "shell of salloc", "batch script", "no step"],
)
def test_what_is_no_rank_of_srun_stays_as_it_is(task, variables):
    assert "MASTER_PORT" not in task(SLURM_JOB_NODELIST="node1", **variables)


def test_an_unknown_first_node_is_an_error_with_the_way_out(task):
    with pytest.raises(ConfigError, match="export MASTER_ADDR yourself"):
        task()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGHUP, 129)])
def test_workers_that_ctrl_c_ends_have_the_exit_status_of_one_process(tmp_path, monkeypatch, number, status):
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.launcher import api

    def interrupted(*arguments: str) -> None:
        raise SignalException("", number)

    monkeypatch.setattr(api, "elastic_launch", lambda config, entrypoint: interrupted)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    (tmp_path / "logs").write_text("")  # is set aside
    try:
        config = RunConfig(output_dir=str(tmp_path), launch=LaunchConfig(nproc_per_node=2))
        assert launcher.run_workers(config, ["recipe"]) == status
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)


def test_ctrl_c_in_one_process_ends_it_in_a_sentence(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    before = signal.getsignal(signal.SIGINT)
    from _entry import exit_on_errors

    try:
        with pytest.raises(SystemExit) as ended, exit_on_errors():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == EXIT_INTERRUPTED and "start the same command again" in capsys.readouterr().err
