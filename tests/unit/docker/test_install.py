"""docker/install.sh on a machine like NVIDIA's image: torch and its like are there already, in builds that no index has."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

SCRIPT = ROOT / "docker" / "install.sh"
PYTHON = getattr(sys, "_base_executable", sys.executable)  # an environment made from ours would not see what an image's sees
IMAGE = {"torch": "2.11.0a0+a6c236b9fd.nv26.3", "transformer-engine": "2.13.0+abc123", "apex": "0.1", "triton": "3.6.0"}

# a build backend in the tree, so that an editable installation needs no index
BACKEND = """
import pathlib, zipfile
def _build(directory):
    name = "endprompt_megatron-0.1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\\nName: endprompt-megatron\\nVersion: 0.1.0\\nRequires-Dist: torch>=2.9\\nRequires-Dist: megatron-core>=0.16\\nProvides-Extra: dev\\nRequires-Dist: an-extra; extra == 'dev'\\n"
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as wheel:
        wheel.writestr("endprompt_megatron-0.1.0.dist-info/METADATA", metadata)
        wheel.writestr("endprompt_megatron-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("endprompt_megatron-0.1.0.dist-info/RECORD", "")
    return name
def build_wheel(directory, config_settings=None, metadata_directory=None):
    return _build(directory)
def build_editable(directory, config_settings=None, metadata_directory=None):
    return _build(directory)
"""


def _wheel(folder: Path, name: str, version: str, *, requires: str = "") -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{stem}.dist-info/RECORD", f"{record}{stem}.dist-info/RECORD,,\n")


@pytest.fixture
def install(tmp_path):
    """Run the script in a project of its own, on an index of its own, in an image of its own: (finished process, environment)."""
    if subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no pip")
    project, index, image = tmp_path / "project", tmp_path / "index", tmp_path / "image"
    for folder in (project / "docker", index, image):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, project / "docker")
    (project / "constraints.txt").write_text('# pins\ntorch==2.13.0; python_version < "3.99"\ntransformers==5.12.1\n')
    (project / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (project / "backend.py").write_text(BACKEND)
    for name, version in (("torch", "2.13.0"), ("megatron-core", "0.18.0"), ("megatron-core", "0.19.2"), ("an-extra", "1.0")):
        _wheel(index, name, version)
    _wheel(index, "greedy", "1.0", requires="Requires-Dist: torch>=2.12\n")
    for name, version in IMAGE.items():
        info = image / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (image / "constraint.txt").write_text("megatron-core==0.18.0\n")

    def run(*arguments: str, python: str = PYTHON, **more: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")} | {
            "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PYTHONPATH": str(image), **more,
        }  # fmt: skip
        venv = tmp_path / "venv"
        command = [str(project / "docker" / "install.sh"), "--venv", str(venv), "--python", python, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300), venv

    run.image = image
    return run


def _inside(venv: Path) -> set[str]:
    return {path.name.removesuffix(".dist-info") for path in venv.rglob("*.dist-info")}


def test_an_images_builds_stay(install):
    """Our own pin of torch gives way, the image's list of everything does not bind us, and what is missing comes from the index."""
    done, venv = install(
        "--system-site-packages", "--extras", "dev", "--with", "megatron-core==0.19.2", PIP_CONSTRAINT=str(install.image / "constraint.txt")
    )
    assert done.returncode == 0, done.stderr
    assert _inside(venv) == {"endprompt_megatron-0.1.0", "megatron_core-0.19.2", "an_extra-1.0"}


def test_torchrun_of_an_image_starts_the_new_environment(install, tmp_path):
    done, venv = install("--system-site-packages")
    assert done.returncode == 0, done.stderr
    fake = tmp_path / "fake" / "torch" / "distributed"
    fake.mkdir(parents=True)
    (fake / "run.py").write_text("import sys; print(sys.prefix, sys.argv[1:])")
    out = subprocess.run(
        [venv / "bin/torchrun", "a b"], env={**os.environ, "PYTHONPATH": str(fake.parents[1])}, capture_output=True, text=True
    )
    assert out.stdout == f"{venv} ['a b']\n", out.stderr


def test_a_requirement_that_would_replace_torch_is_refused(install):
    done, venv = install("--system-site-packages", "--with", "greedy")
    assert done.returncode == 2
    assert "Cannot install greedy" in done.stderr
    assert f"held at the image's versions: apex==0.1 torch=={IMAGE['torch']} transformer-engine==" in done.stderr
    assert not {name for name in _inside(venv) if name.startswith("torch")}


def test_a_build_that_is_out_of_sight_afterwards_is_an_error(install, tmp_path):
    """The base interpreter sees the image's packages, the environment does not: as if something had replaced them."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{install.image}" exec "{PYTHON}" "$@"\n')
    python.chmod(0o755)
    done, _ = install("--system-site-packages", python=str(python), PYTHONPATH="", PIP_NO_DEPS="1")
    assert done.returncode == 2
    assert "docker/install.sh: the image has apex==0.1, the environment now sees none. Leave out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extras"], "--extras needs a value."),
        (["--venv", "x", "--colour", "red"], "--colour is no option; they are --venv, --python"),
        ([], "--venv DIR is missing"),
        (["--venv", "x", "--python", "no_such_python"], "no_such_python is no Python 3.11 or later. Name one"),
    ],
)
def test_wrong_options(tmp_path, arguments, said):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and f"docker/install.sh: {said}" in done.stderr
    assert list(tmp_path.iterdir()) == []
