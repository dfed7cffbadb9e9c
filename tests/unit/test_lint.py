"""`make lint` as a test, and what has to agree between the files that describe the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / command[0]  # the dev extra's
    found = str(beside) if beside.exists() else shutil.which(command[0])
    if found is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e '.[dev]'")
    return subprocess.run([found, *command[1:]], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("command", [("check", "."), ("format", "--check", ".")], ids=lambda command: command[0])
def test_ruff(command):
    done = _run("ruff", *command, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(tmp_path):
    done = _run("mypy", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_finds_faults(tmp_path):
    """The project's settings hold for a function without types too."""
    (tmp_path / "faulty.py").write_text("def half(number):\n    return number / 2\n\n\ntext: str = 1\n")
    done = _run("mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache"), "faulty.py", cwd=tmp_path)
    assert done.returncode == 1 and "[no-untyped-def]" in done.stdout and "[assignment]" in done.stdout, done.stdout + done.stderr


def test_mypy_leaves_no_module_of_ours_out():
    for entry in PROJECT["tool"]["mypy"]["overrides"]:
        assert not entry.get("ignore_errors") and not any(name.startswith("endprompt_megatron") for name in entry["module"])


def test_every_ignored_type_error_has_its_reason():
    """`# type: ignore[code] # reason`"""
    for path in (ROOT / "endprompt_megatron").rglob("*.py"):
        for line in path.read_text().splitlines():
            if "# type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z-]+\] # \w", line), f"{path.relative_to(ROOT)}: {line.strip()}"


def test_hooks_and_make_run_the_same():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "a hook of another place would be fetched"
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert hooks == {line.removesuffix(" .") for line in re.findall(r"\$\(BIN\)/(.+)", recipe)}


def test_the_workflow_runs_the_projects_own_script_on_every_supported_python():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["timeout-minutes"] == 90 and job["steps"][-1] == {"run": ".ci/run"}
    versions = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert versions.split() == ["3.12", "3.11"]


def test_one_version():
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1] == version


def test_the_changelog_keeps_its_form():
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_package_carries_its_types():
    assert (ROOT / "endprompt_megatron" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["endprompt_megatron"]
