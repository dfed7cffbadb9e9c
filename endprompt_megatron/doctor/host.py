"""Check the host: processor, memory, disks, system limits, network and job launchers."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult
from endprompt_megatron.doctor.subprocess_checks import run_command

_GIB = 2**30
_BYTES_PER_PARAMETER = 14  # in a bf16 training checkpoint: 2 for the weight, 12 for the fp32 master weight and the two moments
_LOW_DISK_GIB = 10
_LOW_SHM_GIB = 1
_LOW_MEMORY_GIB = 10  # needed by the embedded default, which is `python recipes/extend.py` without overrides
_LOW_FILES = 4096
_TORCHRUN_PORT = 29500  # used if MASTER_PORT is not set
_HUB = "https://huggingface.co"


def check_host(directory: Path, *, proc: Path = Path("/proc"), sys: Path = Path("/sys"), shm: Path = Path("/dev/shm")) -> list[CheckResult]:
    """Run all checks of the machine except those of GPUs, packages and the Hugging Face hub.

    Args:
        directory: parent directory of outputs/, models/ and datasets/, which may not exist yet.
        proc, sys, shm: paths of these system directories.
    """
    return [
        _system(), _processor(proc), _memory(), _shared_memory(shm), _disk(directory), _open_files(), *_infiniband(sys), _port(),
        _slurm(), _containers(),
    ]  # fmt: skip


def _system() -> CheckResult:
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        found += ", in a container"
    if platform.system() != "Linux":
        return CheckResult("system", MISSING, found, "Only Linux is supported.", "Use the image of docker/Dockerfile.cpu.")
    return CheckResult("system", OK, found)


def _processor(proc: Path) -> CheckResult:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = next((line for line in (proc / "cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    found = f"{cores} core{'' if cores == 1 else 's'} for this process"
    for name in ("amx_bf16", "avx512_bf16"):
        if name in flags:
            return CheckResult("cpu", OK, f"{found}, {name}")
    return CheckResult(
        "cpu", LIMITS, f"{found}, no bf16 instructions", "bf16 is emulated on this processor.", "Use precision=fp32 on the CPU."
    )


def _memory() -> CheckResult:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * size / _GIB
    total = pages * size / _GIB
    found = f"{total:.1f} GiB, {available:.1f} GiB free"
    if total < _LOW_MEMORY_GIB:
        return CheckResult(
            "memory", LIMITS, found, f"The embedded default needs up to {_LOW_MEMORY_GIB} GiB.", "+experiment=tiny_random runs."
        )
    return CheckResult("memory", OK, found)


def _shared_memory(shm: Path) -> CheckResult:
    meaning = "Data loader processes, and NCCL within a node, transfer data through shared memory."
    if not shm.is_dir():
        return CheckResult("shm", MISSING, f"no {shm}", meaning, "Mount a tmpfs there.")
    total = shutil.disk_usage(shm).total / _GIB
    if total < _LOW_SHM_GIB:
        advice = "docker run --ipc=host, or --shm-size=16g"
        return CheckResult(
            "shm", LIMITS, f"{total * 1024:.0f} MiB in {shm}", f"{meaning} They fail with a bus error if it is full.", advice
        )
    return CheckResult("shm", OK, f"{total:.1f} GiB in {shm}")


def _disk(directory: Path) -> CheckResult:
    seen, unwritable = {}, []
    for name in ("outputs", "models", "datasets"):
        place = (directory / name).resolve()
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        seen[name] = shutil.disk_usage(existing).free / _GIB
        if not os.access(existing, os.W_OK):
            unwritable.append(name)
    found = ", ".join(f"{name}/ {free:.0f} GiB free" for name, free in seen.items())
    if unwritable:
        advice = "Set output_dir=, model.hf_path= and data.directory= to other directories."
        return CheckResult("disk", LIMITS, found, f"{', '.join(unwritable)} cannot be written in {directory}.", advice)
    if min(seen.values()) < _LOW_DISK_GIB:
        meaning = f"Weights, data and checkpoints of the embedded default need {_LOW_DISK_GIB} GiB."
        return CheckResult("disk", LIMITS, found, meaning, "Free disk space.")
    largest = seen["outputs"] * _GIB / _BYTES_PER_PARAMETER / 1e9
    return CheckResult("disk", OK, found, f"Enough for one training checkpoint of {largest:.1f} B parameters (14 bytes each in bf16).")


def _open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LOW_FILES:
        advice = "ulimit -n 65536, or docker run --ulimit nofile=65536"
        return CheckResult("nofile", LIMITS, f"{soft} open files (at most {hard})", "Ranks and their data loaders may need more.", advice)
    return CheckResult("nofile", OK, f"{soft} open files")


def _infiniband(sys: Path) -> list[CheckResult]:
    ports = sorted((sys / "class/infiniband").glob("*/ports/*/state"))
    active = sorted({port.parents[2].name for port in ports if "ACTIVE" in port.read_text()})
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    if not active:
        found = "no active port" if ports else "none"
        meaning = "Nodes communicate over TCP, which is slow. A single node does not need InfiniBand."
        return [CheckResult("infiniband", MISSING, found, meaning), CheckResult("memlock", OK, f"{locked} (only relevant with InfiniBand)")]
    infiniband = CheckResult("infiniband", OK, ", ".join(active))
    if soft != resource.RLIM_INFINITY:
        advice = "ulimit -l unlimited, or docker run --ulimit memlock=-1; for Slurm, PropagateResourceLimitsExcept=MEMLOCK."
        return [
            infiniband,
            CheckResult("memlock", LIMITS, locked, "NCCL registers memory with InfiniBand, which may fail under this limit.", advice),
        ]
    return [infiniband, CheckResult("memlock", OK, locked)]


def _port() -> CheckResult:
    port = int(os.environ.get("MASTER_PORT", _TORCHRUN_PORT))
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError as error:
            meaning = "torchrun uses this port for the rendezvous on one node."
            return CheckResult("port", LIMITS, f"{port}: {error.strerror}", meaning, "export MASTER_PORT=PORT with a free port.")
    return CheckResult("port", OK, f"{port} is free")


def _slurm() -> CheckResult:
    if shutil.which("sbatch") is None:
        return CheckResult("slurm", MISSING, "none", "Only needed for jobs on several nodes, which torchrun can start as well.")
    version = run_command("sbatch", "--version", timeout=20)
    if version.error:
        return CheckResult("slurm", LIMITS, version.error, "Slurm is installed but not configured here.", "Submit from a login node.")
    has_pyxis = "--container-image" in run_command("srun", "--help", timeout=20).text
    found = f"{version.text.strip()}, {'pyxis' if has_pyxis else 'no pyxis'}"
    return CheckResult("slurm", OK, found, "" if has_pyxis else "Without pyxis, srun cannot start containers.")


def _containers() -> CheckResult:
    found = [name for name in ("docker", "podman", "enroot", "apptainer", "singularity") if shutil.which(name)]
    if not found:
        return CheckResult("containers", MISSING, "none", "The images of docker/ do not run here; `make venv` needs no container.")
    return CheckResult("containers", OK, ", ".join(found))


def check_network(hub: str | None = None) -> CheckResult:
    """Check whether the Hugging Face hub answers.

    Args:
        hub: URL of the hub; None uses HF_ENDPOINT if it is set, else the public hub.
    """
    hub = hub or os.environ.get("HF_ENDPOINT", _HUB)
    advice = "Set HF_HUB_OFFLINE=1, model.hf_path=DIR and local data; the embedded default only needs package registries."
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return CheckResult("network", LIMITS, "HF_HUB_OFFLINE is set", "Models and data sets of the hub are not downloaded.", advice)
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10):
            return CheckResult("network", OK, f"{hub} answers")
    except urllib.error.HTTPError as error:
        return CheckResult("network", OK, f"{hub} answers ({error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return CheckResult(
            "network", LIMITS, f"{hub} does not answer: {reason}", "Models and data sets of the hub cannot be downloaded.", advice
        )
