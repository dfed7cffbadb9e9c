"""Run the recipes as a user does: in a process of their own, in a directory of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def recipe_command(*overrides: str, recipe: str = "extend.py") -> list[str]:
    """The command line of a recipe with overrides, on this interpreter."""
    return [sys.executable, "-W", "ignore", str(ROOT / "recipes" / recipe), *overrides]


def tiny_overrides(directory: Path, name: str, *more: str) -> list[str]:
    """Overrides that keep a tiny run's files under `directory`, its output under `directory/name`."""
    return [
        "+experiment=tiny_random",
        f"output_dir={directory / name}",
        f"data.directory={directory / 'datasets'}",
        f"model.hf_path={directory / 'model'}",
        *more,
    ]


def run_recipe(*overrides: str, cwd: Path, timeout: int = 180) -> subprocess.CompletedProcess[str]:
    """Run extend.py to its end and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        recipe_command(*overrides), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
