"""A real Slurm of virtual nodes on this machine, for tests. It lives in namespaces of its own and ends with the process that started
it, however that ends."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
_UNSHARE = ("unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child=KILL", "--mount-proc")
_FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


def why_there_is_no_slurm() -> str | None:
    """What a virtual cluster lacks on this machine, in words; None if it lacks nothing."""
    if sys.platform != "linux":
        return f"virtual nodes are Linux namespaces, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "virtual nodes need root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} missing: bash tests/support/slurm/install.sh (Debian, Ubuntu)"
    tried = subprocess.run([*_UNSHARE, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    return f"no namespaces with a network here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """The running cluster. Use as a context manager.

    Args:
        directory: for its files; a short path, because sockets lie in it.
        nodes: how many there are.
    Attributes:
        process: the one whose end is the cluster's.
    """

    def __init__(self, directory: Path, *, nodes: int = 4):
        self.directory, self.nodes = directory, nodes

    def __enter__(self) -> Cluster:
        self.directory.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None)  # loaded here: nothing may be loaded between fork and exec
        with (self.directory / "cluster.log").open("w") as log:
            self.process = subprocess.Popen(
                [*_UNSHARE, "bash", str(_HERE / "cluster.sh"), str(self.directory), str(self.nodes)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: libc.prctl(1, int(signal.SIGKILL)),  # PR_SET_PDEATHSIG: as in launch/processes.py
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (self.directory / "ready").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.told()
                self.stop()
                raise RuntimeError(f"the virtual Slurm did not start\n{said}")
            time.sleep(0.05)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self._first = int(children.split()[0])  # its first process, seen from here
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the cluster, tasks included."""
        self.process.kill()
        self.process.wait()

    def told(self) -> str:
        """The ends of its logs."""
        logs = [self.directory / "cluster.log", *sorted((self.directory / "log").glob("*.log"))]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())

    def run(self, *command: str, cwd: Path | None = None, attempts: int = 1) -> subprocess.CompletedProcess[str]:
        """Run a command where the controller is: a login node, with Slurm's clients. It has to succeed, at one of so many attempts."""
        inside = ["nsenter", f"--target={self._first}", "--mount", "--pid", "--net", "--uts", f"--wdns={cwd or self.directory}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "PYTEST_"))}
        environment["SLURM_CONF"] = str(self.directory / "slurm.conf")
        for _ in range(attempts):
            done = subprocess.run([*inside, *command], capture_output=True, text=True, env=environment, timeout=120)
            if done.returncode == 0:
                return done
        raise AssertionError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}{self.told()}")

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, Restarts, ExitCode, NodeList, BatchHost, ..."""
        told = self.run("scontrol", "show", "job", "--oneliner", number, attempts=5).stdout
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait_for_end(self, number: str, seconds: float) -> dict[str, str]:
        """`job` once it has ended."""
        deadline = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in _FINISHED:
            assert time.monotonic() < deadline, f"job {number} is {found['JobState']} after {seconds} s\n{self.told()}"
            time.sleep(0.5)
        return found

    def nodes_of(self, number: str) -> list[str]:
        """Names of the nodes that a job runs on, or ran on last; the first holds rank 0."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).stdout.split()

    def kill_node(self, node: str) -> None:
        """Kill a node: its slurmd, and all tasks on it."""
        self.run("bash", "-c", f"kill -KILL $(cat {self.directory}/{node}.pid)")
