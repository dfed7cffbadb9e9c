"""Checks of the host, with system directories that the tests create."""

from __future__ import annotations

import resource
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from endprompt_megatron.doctor import host
from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK

MIB = 2**20


@pytest.fixture
def machine(tmp_path):
    """Results by key of a machine with these system directories; directories that are not given are empty."""
    for name in ("proc", "sys", "shm", "work"):
        (tmp_path / name).mkdir()

    def check(cpuinfo: str = "flags\t\t: fpu avx2\n"):
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
        found = host.check_host(tmp_path / "work", proc=tmp_path / "proc", sys=tmp_path / "sys", shm=tmp_path / "shm")
        return {result.key: result for result in found}

    check.root = tmp_path
    return check


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [("fpu amx_bf16 avx512_bf16", OK, "amx_bf16"), ("fpu avx512_bf16", OK, "avx512_bf16"), ("fpu avx2", LIMITS, "no bf16")],
)
def test_processor(machine, flags, level, words):
    found = machine(f"processor\t: 0\nflags\t\t: {flags}\n")["cpu"]
    assert found.level == level and words in found.found


def test_shared_memory(machine, monkeypatch):
    monkeypatch.setattr(host.shutil, "disk_usage", lambda place: _Usage(64 * MIB))
    found = machine()["shm"]
    assert found.level == LIMITS and found.found.startswith("64 MiB in ") and "--ipc=host" in found.advice
    (machine.root / "shm").rmdir()
    assert machine()["shm"].level == MISSING


class _Usage:
    def __init__(self, size: int):
        self.total = self.free = size


@pytest.mark.parametrize(("gib", "level", "words"), [(5, LIMITS, "need 10 GiB"), (1043.081, OK, "80.0 B parameters")])
def test_disk(machine, monkeypatch, gib, level, words):
    """1,043.081 GiB = 1.12e12 bytes = 80e9 parameters of 14 bytes."""
    monkeypatch.setattr(host.shutil, "disk_usage", lambda place: _Usage(round(gib * 2**30)))
    found = machine()["disk"]
    assert found.level == level and words in found.meaning


def test_disk_that_cannot_be_written(machine, monkeypatch):
    monkeypatch.setattr(host.os, "access", lambda place, mode: not str(place).endswith("outputs"))
    (machine.root / "work/outputs").mkdir()
    found = machine()["disk"]
    assert found.level == LIMITS and found.meaning.startswith("outputs cannot be written")


def test_memory(machine, monkeypatch):
    monkeypatch.setattr(host.os, "sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 2**18}.__getitem__)
    found = machine()["memory"]
    assert found.level == LIMITS and found.found == "4.0 GiB, 1.0 GiB free" and "tiny_random" in found.advice


@pytest.mark.parametrize(("state", "limit", "levels"), [
    ("4: ACTIVE", 8 * MIB, (OK, LIMITS)), ("4: ACTIVE", resource.RLIM_INFINITY, (OK, OK)), ("1: DOWN", 8 * MIB, (MISSING, OK)),
])  # fmt: skip
def test_infiniband_requires_locked_memory(machine, monkeypatch, state, limit, levels):
    port = machine.root / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (limit, limit))
    found = machine()
    assert (found["infiniband"].level, found["memlock"].level) == levels
    assert levels[0] == MISSING or found["infiniband"].found == "mlx5_0"


def test_open_files(machine, monkeypatch):
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (1024, 524288))
    found = machine()["nofile"]
    assert found.level == LIMITS and "1024 open files (at most 524288)" in found.found and "ulimit -n" in found.advice


def test_port(machine, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        found = machine()["port"]
        assert found.level == LIMITS and "in use" in found.found
    assert machine()["port"].level == OK


def test_default_port_is_torchruns():
    from torch.distributed.run import get_args_parser

    (port,) = [action for action in get_args_parser()._actions if action.dest == "master_port"]
    assert f"Defaults to {host._TORCHRUN_PORT}." in port.help


def test_what_starts_jobs(machine, monkeypatch):
    monkeypatch.setenv("PATH", str(machine.root))
    found = machine()
    assert found["slurm"].level == found["containers"].level == MISSING

    def install(name: str, script: str) -> None:
        (machine.root / name).write_text(f"#!/bin/sh\n{script}\n")
        (machine.root / name).chmod(0o755)

    install("sbatch", "echo slurm 24.05.3")
    install("srun", "echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'")
    install("enroot", "true")
    found = machine()
    assert found["slurm"].found == "slurm 24.05.3, pyxis" and found["containers"].found == "enroot"
    install("srun", "echo usage")
    found = machine()["slurm"]
    assert found.found == "slurm 24.05.3, no pyxis" and "cannot start containers" in found.meaning
    install("sbatch", "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    assert machine()["slurm"].level == LIMITS


def test_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Hub(BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self) -> None:
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert host.check_network(address).level == OK
        Hub.status = 401
        assert "(401)" in host.check_network(address).found
    finally:
        server.shutdown()
        server.server_close()
    found = host.check_network(address)
    assert found.level == LIMITS and "refused" in found.found and "HF_HUB_OFFLINE=1" in found.advice
    assert host.check_network("no address").level == LIMITS
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert host.check_network(address).found == "HF_HUB_OFFLINE is set"


def test_this_machine(tmp_path):
    found = {result.key: result for result in host.check_host(tmp_path)}
    assert found["system"].level == OK and list(tmp_path.iterdir()) == []
