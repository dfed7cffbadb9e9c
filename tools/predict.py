"""Update the line `# Predicted: ...` in the header of every GPU experiment with the result of a dry run. tests/conf checks these lines."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = "# Predicted: "


def predicted(lines: list[str]) -> str:
    """Return the header line with memory and time.

    Args:
        lines: lines printed by a dry run.
    Raises:
        ValueError: the lines contain no memory or no time.
    """
    plan = "\n".join(lines)
    memory = re.search(r"^ +memory +about ([\d.]+ GiB) per rank", plan, flags=re.MULTILINE)
    time = re.search(r"^ +time +(.+? per step), (.+?) in total", plan, flags=re.MULTILINE)
    if memory is None or time is None:
        raise ValueError(f"the plan has no line with memory or time:\n{plan}")
    return f"{HEADER}{memory[1]} per GPU, {time[1]}, {time[2]} in total (dry_run=true)."


def main() -> int:
    """Update the headers of the given experiments and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments to update (default: all that have the line)")
    arguments = parser.parse_args()
    files = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
    paths = {path.stem: path for path in files if f"\n{HEADER}" in path.read_text()}
    names = arguments.names or list(paths)
    recipe = [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "extend.py")]
    command = [*recipe, "--multirun", "dry_run=true", f"+experiment={','.join(names)}"]
    with (
        tempfile.TemporaryDirectory() as nowhere
    ):  # Hydra's multirun writes to the working directory; a dry run needs neither models/ nor datasets/
        done = subprocess.run(command, cwd=nowhere, capture_output=True, text=True)
    plans = re.split(r"^Plan of .*\n", done.stdout, flags=re.MULTILINE)[1:]
    if done.returncode or len(plans) != len(names):
        print(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr}", file=sys.stderr)
        return 1
    for name, plan in zip(names, plans, strict=True):
        line = predicted(plan.splitlines())
        paths[name].write_text(re.sub(rf"^{HEADER}.*$", line, paths[name].read_text(), flags=re.MULTILINE))
        print(f"{name}: {line.removeprefix(HEADER)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
