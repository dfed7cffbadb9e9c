"""The rest of a machine: processor, memory, disks, the limits that the system sets, how it is connected, and what starts jobs on it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

from endprompt_megatron.doctor.finding import LIMITS, MISSING, OK, Finding
from endprompt_megatron.doctor.probes import run_command

_GIB = 2**30
_BYTES_PER_PARAMETER = 14  # of a training checkpoint in bf16: weight 2, fp32 master weight and two moments 12
_LOW_DISK_GIB = 10
_LOW_SHM_GIB = 1
_LOW_MEMORY_GIB = 10  # the embedded default, as README.md has it
_LOW_FILES = 4096
_TORCHRUN_PORT = 29500  # where MASTER_PORT names none
_HUB = "https://huggingface.co"


def host_findings(directory: Path, *, proc: Path = Path("/proc"), sys: Path = Path("/sys"), shm: Path = Path("/dev/shm")) -> list[Finding]:
    """Everything about the machine but its GPUs and packages.

    Args:
        directory: where outputs/, models/ and datasets/ are, or will be.
        proc, sys, shm: the system's own directories.
    """
    return [
        _system(), _processor(proc), _memory(), _shared_memory(shm), _disk(directory), _open_files(), *_infiniband(sys), _port(),
        _slurm(), _containers(),
    ]  # fmt: skip


def _system() -> Finding:
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        found += ", in a container"
    if platform.system() != "Linux":
        return Finding("system", MISSING, found, "Only Linux is supported.", "Use the image of docker/Dockerfile.cpu.")
    return Finding("system", OK, found)


def _processor(proc: Path) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = next((line for line in (proc / "cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    found = f"{cores} core{'' if cores == 1 else 's'} for this process"
    for name in ("amx_bf16", "avx512_bf16"):
        if name in flags:
            return Finding("cpu", OK, f"{found}, {name}")
    return Finding("cpu", LIMITS, f"{found}, no bf16 instructions", "bf16 is emulated on this processor.", "precision=fp32 on the CPU")


def _memory() -> Finding:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * size / _GIB
    total = pages * size / _GIB
    found = f"{total:.1f} GiB, {available:.1f} GiB free"
    if total < _LOW_MEMORY_GIB:
        return Finding("memory", LIMITS, found, f"The embedded default takes up to {_LOW_MEMORY_GIB} GiB.", "+experiment=tiny_random runs.")
    return Finding("memory", OK, found)


def _shared_memory(shm: Path) -> Finding:
    meaning = "Loader processes and NCCL within a node pass data through it."
    if not shm.is_dir():
        return Finding("shm", MISSING, f"no {shm}", meaning, "Mount a tmpfs there.")
    total = shutil.disk_usage(shm).total / _GIB
    if total < _LOW_SHM_GIB:
        advice = "docker run --ipc=host, or --shm-size=16g"
        return Finding("shm", LIMITS, f"{total * 1024:.0f} MiB in {shm}", f"{meaning} They fail with a bus error when it is full.", advice)
    return Finding("shm", OK, f"{total:.1f} GiB in {shm}")


def _disk(directory: Path) -> Finding:
    seen, unwritable = {}, []
    for name in ("outputs", "models", "datasets"):
        place = (directory / name).resolve()
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        seen[name] = shutil.disk_usage(existing).free / _GIB
        if not os.access(existing, os.W_OK):
            unwritable.append(name)
    found = ", ".join(f"{name}/ {free:.0f} GiB free" for name, free in seen.items())
    if unwritable:
        advice = "output_dir=, model.hf_path= and data.directory= name other places."
        return Finding("disk", LIMITS, found, f"{', '.join(unwritable)} cannot be written in {directory}.", advice)
    if min(seen.values()) < _LOW_DISK_GIB:
        meaning = f"Weights, data and checkpoints of the embedded default want {_LOW_DISK_GIB} GiB."
        return Finding("disk", LIMITS, found, meaning, "Make room.")
    largest = seen["outputs"] * _GIB / _BYTES_PER_PARAMETER / 1e9
    return Finding("disk", OK, found, f"Room for one training checkpoint of {largest:.1f} B parameters (14 bytes each in bf16).")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LOW_FILES:
        advice = "ulimit -n 65536, or docker run --ulimit nofile=65536"
        return Finding("nofile", LIMITS, f"{soft} open files (at most {hard})", "Ranks and their loaders may open more.", advice)
    return Finding("nofile", OK, f"{soft} open files")


def _infiniband(sys: Path) -> list[Finding]:
    ports = sorted((sys / "class/infiniband").glob("*/ports/*/state"))
    active = sorted({port.parents[2].name for port in ports if "ACTIVE" in port.read_text()})
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    if not active:
        found = "no active port" if ports else "none"
        meaning = "Nodes reach each other over TCP: enough for one node, slow for more."
        return [Finding("infiniband", MISSING, found, meaning), Finding("memlock", OK, f"{locked} (matters with InfiniBand)")]
    infiniband = Finding("infiniband", OK, ", ".join(active))
    if soft != resource.RLIM_INFINITY:
        advice = "ulimit -l unlimited, or docker run --ulimit memlock=-1; for Slurm, PropagateResourceLimitsExcept=MEMLOCK."
        return [infiniband, Finding("memlock", LIMITS, locked, "NCCL registers memory with InfiniBand and may fail to.", advice)]
    return [infiniband, Finding("memlock", OK, locked)]


def _port() -> Finding:
    port = int(os.environ.get("MASTER_PORT", _TORCHRUN_PORT))
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError as error:
            meaning = "Ranks meet on it when srun starts them."
            return Finding("port", LIMITS, f"{port}: {error.strerror}", meaning, "export MASTER_PORT=PORT with one that is free.")
    return Finding("port", OK, f"{port} is free")


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("slurm", MISSING, "none", "Only for jobs on several nodes; torchrun starts them as well.")
    version = run_command("sbatch", "--version", timeout=20)
    if version.error:
        return Finding("slurm", LIMITS, version.error, "Slurm is installed and not set up here.", "Submit from a login node.")
    has_pyxis = "--container-image" in run_command("srun", "--help", timeout=20).text
    found = f"{version.text.strip()}, {'pyxis' if has_pyxis else 'no pyxis'}"
    return Finding("slurm", OK, found, "" if has_pyxis else "Without pyxis srun cannot start containers by itself.")


def _containers() -> Finding:
    found = [name for name in ("docker", "podman", "enroot", "apptainer", "singularity") if shutil.which(name)]
    if not found:
        return Finding("containers", MISSING, "none", "The images of docker/ do not run here; `make venv` needs none.")
    return Finding("containers", OK, ", ".join(found))


def network_finding(hub: str | None = None) -> Finding:
    """Whether the Hugging Face hub answers.

    Args:
        hub: its address; by default HF_ENDPOINT's or the public one.
    """
    hub = hub or os.environ.get("HF_ENDPOINT", _HUB)
    advice = "HF_HUB_OFFLINE=1 with model.hf_path=DIR and local data; the embedded default comes from package registries."
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return Finding("network", LIMITS, "HF_HUB_OFFLINE is set", "Models and data sets of the hub are not fetched.", advice)
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10):
            return Finding("network", OK, f"{hub} answers")
    except urllib.error.HTTPError as error:
        return Finding("network", OK, f"{hub} answers ({error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("network", LIMITS, f"{hub} does not answer: {reason}", "Models and data sets of the hub are out of reach.", advice)
