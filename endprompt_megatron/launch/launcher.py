"""Start the processes of a run. The run may start under torchrun, or under srun with one task per GPU. Without a launcher (a plain start),
the run starts its own local workers through torch's elastic launcher. In all three cases the workers have RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in their environment."""

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
from endprompt_megatron.errors import EXIT_INTERRUPTED, EXIT_RESUME, ConfigError
from endprompt_megatron.launch.processes import STOP_SIGNALS, end_with_parent
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import make_directory, writing

# The ports of job steps are [20000, 32007), below the ephemeral ports of Linux (32768 and up). The number of ports is prime, so that steps
# of one job and jobs with neighbouring ids get different ports.
_FIRST_PORT, _PORTS, _PORTS_A_JOB = 20_000, 12_007, 101
_FIRST_UNNUMBERED_STEP = 0xFFFFFFF0  # slurm.h: step ids from here on denote batch scripts, interactive shells and similar steps
_LAUNCHER = "ENDPROMPT_LAUNCHER"  # environment variable that a plain start sets for its workers, to its own process id


class Launched(Protocol):
    """Fields of a job's config that the launcher reads. RunConfig and EvaluateConfig have these fields."""

    launch: LaunchConfig
    output_dir: Any

    @property
    def accelerator(self) -> str:
        """Accelerator of the job: auto | gpu | cpu."""


def adopt_srun_environment() -> None:
    """Set torch's environment variables from Slurm's if srun started this process without another launcher.

    Raises:
        ConfigError: the first host of the job cannot be determined.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    step = os.environ.get("SLURM_STEP_ID") or os.environ.get("SLURM_STEPID")
    if not step or int(step) >= _FIRST_UNNUMBERED_STEP:
        return  # this process is the batch script or the shell of salloc, not a task of srun
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
    os.environ.setdefault("MASTER_PORT", str(_step_port(int(os.environ.get("SLURM_JOB_ID", "0")), int(step))))


def _step_port(job: int, step: int) -> int:
    """Return the port of a job step, computed from the ids of job and step so that all tasks agree. Two jobs or steps on one node must not
    share a port."""
    return _FIRST_PORT + (_PORTS_A_JOB * job + step) % _PORTS


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is: export MASTER_ADDR yourself.")
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
        return listed.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        match = re.match(r"([^\[,]+)\[(\d+)", nodes)  # node[03-07,12] -> node03; containers often lack scontrol
        if match is None:
            raise ConfigError(f"the first host of SLURM_STEP_NODELIST={nodes} cannot be determined: export MASTER_ADDR yourself.") from None
        return match.group(1) + match.group(2)


def planned_world_size(config: Launched) -> int:
    """Return the number of ranks of the run: WORLD_SIZE if a launcher set it, else the number of processes that the config starts."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return config.launch.num_nodes * local_processes(config)


def local_processes(config: Launched) -> int:
    """Return the number of processes on one host: `launch.nproc_per_node` if it is set, else one per GPU, or one on a CPU."""
    if config.launch.nproc_per_node is not None:
        return config.launch.nproc_per_node
    if config.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def is_worker() -> bool:
    """Return whether a launcher started this process as one rank of a job."""
    return "RANK" in os.environ


def launched_by_plain_start() -> bool:
    """Return whether `run_workers` of another process started this process. The other process waits for this process and holds the lock of
    the output directory."""
    return is_worker() and _LAUNCHER in os.environ


def starts_workers(config: Launched) -> bool:
    """Return whether this process is a plain start that must launch several workers.

    Raises:
        ConfigError: launch.num_nodes is greater than 1 and there is no launcher.
    """
    if is_worker():
        return False
    if config.launch.num_nodes > 1:
        raise ConfigError(
            f"launch.num_nodes={config.launch.num_nodes}: without a launcher a run uses this host only. Start the same command with srun "
            f"(one task per GPU) or torchrun on every node."
        )
    return local_processes(config) > 1


def run_workers(config: Launched, arguments: list[str]) -> int:
    """Run the current command in `local_processes` workers. Rank 0 writes to the terminal, the other ranks to `<output_dir>/logs/`.

    Args:
        config: config of the run.
        arguments: the script and its arguments, as in sys.argv.
    Returns:
        Exit status: 0 if all workers succeed, EXIT_RESUME if they stop after a stop signal, EXIT_INTERRUPTED after Ctrl-C, 128 + n if
        another signal n ends them, or that of the first worker that fails (1 if a signal killed it). The last lines of the failed worker's
        output are logged.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = local_processes(config)
    output_dir = Path(config.output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    logs = make_directory(output_dir / "logs")
    quiet = dict.fromkeys(range(1, count), Std.ALL)
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
        shutdown_timeout=10,  # seconds until the other workers are killed after one has failed; they cannot save without the failed one
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # these signals end the workers; stop signals are forwarded to the workers
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    get_logger().info(f"starting {count} local workers; logs of ranks 1 to {count - 1} in {logs}")
    received = _forward_stop_signals()
    try:
        elastic_launch(config=launch, entrypoint=sys.executable)("-u", "-W", "ignore", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_RESUME or (received and failure.exitcode in (-number for number in received)):
            return EXIT_RESUME  # rank 0 has logged the reason
        get_logger().error(f"rank {rank} failed with exit status {failure.exitcode}{_last_lines(logs, rank)}")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        get_logger().error(f"stopped by {error.sigval.name}; all workers were ended")
        return EXIT_INTERRUPTED if error.sigval == signal.SIGINT else 128 + error.sigval.value
    return 0


def _forward_stop_signals() -> list[int]:
    """Install handlers that forward SIGTERM and SIGUSR1 to every worker, which then saves and exits. Return a list to which the handlers
    append each received signal."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        """Forward a signal that the launcher received."""
        import psutil

        received.append(number)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    return received


def end_with_launcher() -> None:
    """Make a worker of `run_workers` end when its launcher ends for any reason. Other processes are not affected."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not is_worker():
        return
    end_with_parent()
    if os.getppid() != int(launcher):  # the launcher ended before the call above
        sys.exit(f"the launcher, process {launcher}, has ended")


def _last_lines(logs: Path, rank: int, lines: int = 30) -> str:
    """Return the last lines of a worker's standard error; "" for rank 0, whose output is on the terminal."""
    if rank == 0:
        return ""
    files = sorted(logs.glob(f"*/attempt_0/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    if not files:
        return ""
    return f"; the end of {files[-1]}:\n" + "\n".join(files[-1].read_text(errors="replace").splitlines()[-lines:])
