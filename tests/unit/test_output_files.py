"""One process at a time in an output directory: who holds it is named, and a lock that is left over does not block. Temporary files that
dead processes left are deleted, and no others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from endprompt_megatron import output_files
from endprompt_megatron.errors import CheckpointError, ConfigError
from endprompt_megatron.output_files import (
    claimed,
    final_name,
    hold,
    is_lock,
    owner,
    release,
    replace_text,
    scratch_directory,
    set_aside,
    sweep_leftovers,
    temporary_name,
)
from tests.support.tiny import ROOT, run_python

_HOLDER = (
    "import sys; from pathlib import Path; from endprompt_megatron.output_files import hold; hold(Path(sys.argv[1]), doing='runs there'); "
    "print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def _hold(place: Path) -> None:
    hold(place, doing="runs there")


def _claim(place: Path) -> None:
    with claimed(place, doing="runs there"):
        pass


@pytest.mark.parametrize("lock", [_hold, _claim])
def test_the_second_process_learns_who_the_first_is(lock, tmp_path, holder):
    with pytest.raises(ConfigError) as caught:
        lock(tmp_path)
    said = str(caught.value)
    assert f"another process runs there: process {holder.pid} on {socket.gethostname()}, started 20" in said and "set output_dir" in said
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid  # the first lost nothing


def test_a_lock_of_a_process_that_is_gone_does_not_block(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").is_file()
    hold(tmp_path, doing="runs there")
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    release(tmp_path)


def test_holding_twice_and_giving_back(tmp_path):
    hold(tmp_path, doing="runs there")
    hold(tmp_path / ".", doing="runs there")
    code = "import sys; from pathlib import Path; from endprompt_megatron.output_files import hold; hold(Path(sys.argv[1]), doing='x')"
    assert "ConfigError" in run_python(code, str(tmp_path)).stderr
    release(tmp_path)
    release(tmp_path)
    assert run_python(code, str(tmp_path)).returncode == 0
    assert is_lock(tmp_path / ".lock") and not is_lock(tmp_path / "config.yaml")


def test_a_directory_that_is_renamed_meanwhile_is_one_error(tmp_path):
    place = tmp_path / "run"
    with pytest.raises(CheckpointError, match="run was renamed or removed while the job was writing to it.*same command again"):  # noqa: SIM117
        with claimed(place, doing="runs there"):
            place.rename(tmp_path / "elsewhere")
            replace_text(place / "results.json", "{}")
    assert not place.exists()
    with pytest.raises(ZeroDivisionError), claimed(place, doing="runs there"):
        raise ZeroDivisionError


def test_damaged_files_get_names_of_their_own(tmp_path):
    for number in ("", "2", "3"):
        (tmp_path / "state.json").write_text(f"the {number}.")
        assert set_aside(tmp_path / "state.json", "is no JSON").name == f"state.json.damaged{number}"
    assert (tmp_path / "state.json.damaged2").read_text() == "the 2."


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="output_dir=.*cannot be written"):
        hold(Path(tmp_path / "missing"), doing="runs there")


DEAD = 4194305  # one more than the largest process id of Linux


def as_if_by(path: Path, *, pid: int | None = None, host: str | None = None) -> Path:
    """The temporary name that another process would use."""
    name = temporary_name(path).name.replace(f".{os.getpid()}.tmp", f".{pid or os.getpid()}.tmp")
    return path.with_name(name.replace(owner().split(".")[0], host) if host else name)


def test_what_a_dead_process_left_is_swept(tmp_path):
    target = tmp_path / "with.dots [and] more"
    file, folder, link = (as_if_by(tmp_path / name, pid=DEAD) for name in (target.name, "folder", "link"))
    Path(f"{file}.bin").write_text("x")
    file.write_text("x")
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    link.symlink_to(tmp_path / "kept")
    assert final_name(file) == target and final_name(Path(f"{file}.bin")) is None and final_name(target) is None
    sweep_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_may_be_in_use_is_not_swept(tmp_path):
    """A running process, another host or container, this process, and names of other programs."""
    mine = temporary_name(tmp_path / "mine")
    stay = [
        as_if_by(tmp_path / "a", pid=os.getppid()),
        as_if_by(tmp_path / "b", pid=1),
        as_if_by(tmp_path / "c", pid=DEAD, host="0" * 8),
        mine,
        Path(f"{mine}.bin"),
        tmp_path / f".former.{DEAD}.tmp",  # of earlier releases: the host is not known
        tmp_path / ".x.tmp",
        tmp_path / as_if_by(tmp_path / "d", pid=DEAD).name[1:],
    ]
    for path in stay:
        path.write_text("x")
    sweep_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == set(stay)
    sweep_leftovers(tmp_path / "missing")


def test_a_zombie_and_an_earlier_process_of_the_same_id_are_dead(tmp_path):
    child = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
        (tmp_path / "x").write_text("")
        for path in (as_if_by(tmp_path / "a", pid=child.pid), as_if_by(tmp_path / "b")):
            path.write_text("x")
        output_files._in_use.discard((tmp_path / as_if_by(tmp_path / "b").name).absolute())
        sweep_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
    finally:
        child.wait()


def test_scratch_directories_are_deleted_after_use_and_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory("text") as first:
        (first / "file").write_text("x")
        (left := tmp_path / first.name.replace(f".{os.getpid()}.", f".{DEAD}.")).mkdir()
        (other := tmp_path / "text_of_another_program").mkdir()
        with scratch_directory("text") as second:
            assert second != first and (first / "file").exists() and not left.exists()
            assert second.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [other]
