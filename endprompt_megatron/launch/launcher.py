"""The three ways a run starts: under torchrun, under srun with one task a GPU, or plainly, when it starts its own local workers through
torch's elastic launcher. Each ends with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from endprompt_megatron.config.schema import LaunchConfig
from endprompt_megatron.errors import EXIT_RESUME, ConfigError
from endprompt_megatron.launch.processes import STOP_SIGNALS, end_with_parent
from endprompt_megatron.log import get_logger

# Ports of job steps: [20000, 32007), below those that Linux lends to clients (32768 and up). Their number is a prime: steps of one job, and
# jobs that were submitted near each other, land apart.
_FIRST_PORT, _PORTS, _PORTS_A_JOB = 20_000, 12_007, 101
_FIRST_UNNUMBERED_STEP = 0xFFFFFFF0  # slurm.h: from here on batch scripts, interactive shells and the like
_LAUNCHER = "ENDPROMPT_LAUNCHER"  # process id of the plain start, for its workers


class Launched(Protocol):
    """What a job's configuration has to have to be launched: RunConfig has it, and EvaluateConfig."""

    launch: LaunchConfig
    output_dir: Any

    @property
    def accelerator(self) -> str:
        """auto | gpu | cpu."""


def adopt_srun_environment() -> None:
    """Under srun (and no other launcher) translate Slurm's variables into torch's.

    Raises:
        ConfigError: the job's hosts cannot be told.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    step = os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID")
    if not step or int(step) >= _FIRST_UNNUMBERED_STEP:
        return  # the batch script itself or the shell of salloc, not a task of srun
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
    os.environ.setdefault("MASTER_PORT", str(_step_port(int(os.environ.get("SLURM_JOB_ID", "0")), int(step))))


def _step_port(job: int, step: int) -> int:
    """The port of a job step, which all its tasks know without asking: two jobs, or two steps of one, must not meet on a node."""
    return _FIRST_PORT + (_PORTS_A_JOB * job + step) % _PORTS


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST: export MASTER_ADDR yourself.")
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
        return listed.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        match = re.match(r"([^\[,]+)\[(\d+)", nodes)  # node[03-07,12] -> node03; containers often lack scontrol
        if match is None:
            raise ConfigError(f"the first host of SLURM_STEP_NODELIST={nodes} cannot be told: export MASTER_ADDR yourself.") from None
        return match.group(1) + match.group(2)


def planned_world_size(config: Launched) -> int:
    """Ranks of the run: what a launcher announced, else what the config will start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return config.launch.num_nodes * local_processes(config)


def local_processes(config: Launched) -> int:
    """Processes of one host: `launch.nproc_per_node`, else one a GPU, else one."""
    if config.launch.nproc_per_node is not None:
        return config.launch.nproc_per_node
    if config.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def is_worker() -> bool:
    """Whether a launcher started this process as one rank of a job."""
    return "RANK" in os.environ


def launched_by_plain_start() -> bool:
    """Whether `run_workers` of another process started this one, which waits for it and has taken the output directory."""
    return is_worker() and _LAUNCHER in os.environ


def starts_workers(config: Launched) -> bool:
    """Whether this process is a plain start that has to launch several workers.

    Raises:
        ConfigError: more than one node without a launcher.
    """
    if is_worker():
        return False
    if config.launch.num_nodes > 1:
        raise ConfigError(
            f"launch.num_nodes={config.launch.num_nodes}: a plain start reaches this host only. Start the same command with srun (one "
            f"task a GPU) or torchrun on every node."
        )
    return local_processes(config) > 1


def run_workers(config: Launched, arguments: list[str]) -> int:
    """Run this very command in `local_processes` workers; rank 0 writes to the terminal, the others to `<output_dir>/logs/`.

    Args:
        config: of the run.
        arguments: script and its arguments, as in sys.argv.
    Returns:
        Exit status: 0; EXIT_RESUME if the workers were asked to stop and did; else the first failed worker's, whose last lines are
        shown once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = local_processes(config)
    logs = Path(config.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    quiet = {rank: Std.ALL for rank in range(1, count)}
    os.environ[_LAUNCHER] = str(os.getpid())
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="endprompt",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
        shutdown_timeout=10,  # seconds that the others have after one failed; they cannot save without it
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # these end the workers; the others are passed on to them
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    get_logger().info(f"starting {count} local workers; logs of ranks 1 to {count - 1} in {logs}")
    asked = _pass_on_stop_signals()
    try:
        elastic_launch(config=launch, entrypoint=sys.executable)("-u", "-W", "ignore", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_RESUME or (asked and failure.exitcode in (-number for number in asked)):
            return EXIT_RESUME  # rank 0 has said so
        get_logger().error(f"rank {rank} failed with exit status {failure.exitcode}{_last_lines(logs, rank)}")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        get_logger().error(f"stopped by {error.sigval.name}; every worker was ended")
        return 128 + error.sigval.value
    return 0


def _pass_on_stop_signals() -> list[int]:
    """Hand SIGTERM and SIGUSR1 to every worker, which saves and ends by itself; the list fills with what came."""
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        """Signal handler of the launcher."""
        import psutil

        asked.append(number)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    return asked


def end_with_launcher() -> None:
    """In a worker that `run_workers` started: end when the launcher ends, however it ends."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not is_worker():
        return
    end_with_parent()
    if os.getppid() != int(launcher):  # it ended before the call
        sys.exit(f"the launcher, process {launcher}, has ended")


def _last_lines(logs: Path, rank: int, lines: int = 30) -> str:
    """The end of a quiet worker's error output; rank 0's is on the terminal already."""
    if rank == 0:
        return ""
    files = sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ""
    return f"; the end of {files[-1]}:\n" + "\n".join(files[-1].read_text(errors="replace").splitlines()[-lines:])
