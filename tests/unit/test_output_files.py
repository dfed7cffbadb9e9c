"""One process at a time in an output directory: who holds it is named, and a lock that is left over does not block."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from endprompt_megatron.errors import CheckpointError, ConfigError
from endprompt_megatron.output_files import claimed, hold, is_lock, release, replace_text, set_aside
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


def test_the_second_process_learns_who_the_first_is(tmp_path, holder):
    with pytest.raises(ConfigError) as caught:
        hold(tmp_path, doing="runs there")
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
