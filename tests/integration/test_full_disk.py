"""The main job on a real disk that is too small: it ends with exit status 2 and the path, and on a larger disk the same command goes on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from endprompt_megatron.errors import EXIT_USER_ERROR
from endprompt_megatron.log import read_metrics
from tests.support.run_recipe import run_recipe, tiny_overrides

pytestmark = pytest.mark.repeated


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """(bytes) -> a disk of this size, with the files of an earlier call."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs root, to mount a small disk")

    def resized(size: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        return place

    yield resized
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    done = run_recipe(*tiny_overrides(directory, "run"), cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


def _losses(output: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(output / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 0.8, 0.9, 0.98])
def test_a_disk_too_small(undisturbed, disk, share):
    needed = sum(path.stat().st_size for path in (undisturbed / "run").rglob("*") if path.is_file())
    overrides = [*tiny_overrides(undisturbed, "run"), f"output_dir={disk(4096 + int(share * needed)) / 'run'}"]
    done = run_recipe(*overrides, cwd=undisturbed)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    output = disk(4 * needed) / "run"
    last = done.stderr.strip().splitlines()[-1]
    assert (
        re.match(r"(Output|Checkpoint|Config)Error: ", last)
        and str(output) in last
        and re.search(r"No space left on device|\b0\.\d MiB are free", last)
    ), done.stderr
    resumed = run_recipe(*overrides, cwd=undisturbed)
    assert resumed.returncode == 0, resumed.stderr
    assert _losses(output) == _losses(undisturbed / "run")
    assert {path.name for path in output.iterdir()} == {path.name for path in (undisturbed / "run").iterdir()}, "nothing is left over"
