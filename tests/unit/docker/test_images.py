"""The images, as far as that goes without an engine: linted, consistent with the project, and what they run tried on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from endprompt_megatron.doctor.check_result import release
from endprompt_megatron.doctor.packages import RESILIENCY_LOWEST
from endprompt_megatron.mcore.version import SUPPORTED
from tests.support.tiny import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
SCRIPTS = [*sorted(DOCKER.glob("*.sh")), ROOT / ".ci" / "run"]
ENTRYPOINT = DOCKER / "entrypoint.sh"


def _linter(name: str) -> str:
    beside = Path(sys.executable).parent / name  # the dev extra's
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path):
    done = subprocess.run([_linter("hadolint"), "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_faults(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp\n")
    done = subprocess.run([_linter("hadolint"), "--no-color", str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3006" in done.stdout and "DL3003" in done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    done = subprocess.run([_linter("shellcheck"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK)


def _arguments(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(.*)$", path.read_text(), re.MULTILINE))


def test_pinned_versions_are_supported():
    gpu = _arguments(DOCKER / "Dockerfile")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", gpu["BASE_IMAGE"])
    assert release(gpu["MEGATRON_CORE_VERSION"])[:2] == SUPPORTED[1]  # Python 3.12 gets the newest
    assert release(gpu["NVIDIA_RESILIENCY_EXT_VERSION"]) >= RESILIENCY_LOWEST
    assert _arguments(DOCKER / "Dockerfile.cpu")["BASE_IMAGE"].startswith("python:3.11-")


def test_every_installation_runs_the_one_script():
    """What the images do is what `make venv`, and so every test run, has done."""
    assert "docker/install.sh --venv $(VENV) --python $(PYTHON) --extras dev" in (ROOT / "Makefile").read_text()
    for path in DOCKERFILES:
        assert "docker/install.sh --venv /opt/venv " in path.read_text()
        assert not re.search(r"\bpip3? install\b", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_paths_in_the_image_are_the_checkouts(path):
    text = path.read_text()
    assert "WORKDIR /opt/endprompt_megatron\nCOPY . .\n" in text
    inside = set(re.findall(r"\b((?:docker|tools|recipes)/[a-z_]+\.\w+)", text))
    assert {"docker/entrypoint.sh", "tools/doctor.py", "docker/install.sh"} <= inside
    assert all((ROOT / name).is_file() for name in inside)


def test_the_build_runs_the_doctor_with_known_arguments():
    text = "".join(path.read_text() for path in DOCKERFILES)
    called = [arguments.split() for arguments in re.findall(r"tools/doctor\.py ([^\\\n]+)", text)]
    assert called == [["--strict-build"], ["--require", "python,torch,megatron_core,transformers"]]


def test_what_git_ignores_stays_out_of_images():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= left_out and ".git" in left_out


def _environment(**more: str) -> dict[str, str]:
    """As in the images: the project's python first on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def _run(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ENTRYPOINT), *arguments], cwd=cwd, env=_environment(**more), capture_output=True, text=True, timeout=300)


def test_entrypoint_lists_recipes_and_tools(tmp_path):
    for arguments in ((), ("help",), ("--help",)):
        out = _run(*arguments, cwd=tmp_path).stdout
        for folder in ("recipes", "tools"):
            listed = next(line for line in out.splitlines() if line.strip().startswith(f"{folder}:")).split()[1:]
            assert listed == sorted(path.stem for path in (ROOT / folder).glob("*.py"))


@pytest.fixture
def echo(tmp_path):
    """Run the entry point with a python that prints its arguments."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    python.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{program}' \"$@\"\n")  # no path with a space stands after #!
    python.chmod(0o755)

    def run(*arguments: str) -> list[str]:
        return json.loads(_run(*arguments, cwd=tmp_path, PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}").stdout)

    return run


@pytest.mark.parametrize(
    ("arguments", "program", "rest"),
    [
        (("extend", "+experiment=tiny_random"), "recipes/extend.py", ["+experiment=tiny_random"]),
        (("+experiment=tiny_random", "name=with a space"), "recipes/extend.py", ["+experiment=tiny_random", "name=with a space"]),
        (("trainer.max_steps=2",), "recipes/extend.py", ["trainer.max_steps=2"]),
        (("evaluate", "--help"), "recipes/evaluate.py", ["--help"]),
        (("doctor", "--json"), "tools/doctor.py", ["--json"]),
        (("python", "tools/own.py", "a=b"), None, ["tools/own.py", "a=b"]),
    ],
)
def test_entrypoint_runs_the_recipe_tool_or_command(echo, arguments, program, rest):
    assert echo(*arguments) == ([str(ROOT / program)] if program else []) + rest


def test_entrypoint_runs_any_command_and_passes_its_status_on(tmp_path):
    assert _run("sh", "-c", "exit 75", cwd=tmp_path).returncode == 75
    assert _run("no_such_program", cwd=tmp_path).returncode == 127


def test_entrypoint_passes_signals_on(tmp_path):
    """It becomes the program: a SIGTERM of `docker stop` or Slurm arrives there, and not at a shell in front of it."""
    code = "import os, signal; signal.signal(15, lambda *_: os._exit(75)); print(os.getpid(), flush=True); signal.pause()"
    process = subprocess.Popen([str(ENTRYPOINT), "python", "-c", code], cwd=tmp_path, env=_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="takes another user id: needs root and setpriv")
def test_entrypoint_for_a_user_without_a_name_or_a_home(tmp_path):
    """docker run --user 54321:54321. The copy lies where that user may read."""
    place = Path("/tmp") / f"endprompt_entrypoint_{os.getpid()}"
    place.mkdir()
    try:
        shutil.copy(ENTRYPOINT, place / "entrypoint.sh")
        place.chmod(0o755)
        done = subprocess.run(
            ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "env", "--unset=HOME", "--unset=USER", "--unset=LOGNAME",
             str(place / "entrypoint.sh"), "sh", "-c", 'touch "$HOME/written" && echo "$USER $LOGNAME" && rm -r "$HOME"'],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
    finally:
        shutil.rmtree(place)
    assert done.stdout == "user54321 user54321\n", done.stderr
