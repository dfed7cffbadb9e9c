"""Rewrite the golden loss curves of tests/golden/losses: `python tools/golden_losses.py [NAME ...]`.

A golden curve contains the loss and the gradient norm of every step of a short run on the tiny random model, in float32 on one CPU thread.
tests/golden/test_losses.py compares the curves with new runs. A refactoring must leave the curves unchanged. A commit that changes the
numbers rewrites the curves and explains why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from endprompt_megatron.log import read_metrics  # noqa: E402

CURVES = ROOT / "tests" / "golden" / "losses"
STEPS = 10
# maps the name of a curve to the specific overrides of its run; the function `overrides` adds the common overrides
RUNS = {
    "endprompt": ["method=endprompt"],
    "full": ["method=full"],
    "lora": ["method=endprompt", "adapter=lora"],
}
KEYS = ("loss", "grad_norm")


# keys of summary.json whose values differ between two runs of the same code
_UNEQUAL = {"wall_seconds", "sittings", "stage_seconds", "tokens_per_second", "peak_memory_gib", "hf_checkpoint"}


def overrides(name: str, directory: Path, *, probes: bool = False) -> list[str]:
    """Return the overrides of recipes/extend.py for the run of one curve. The run writes to `directory`."""
    return [
        "+experiment=tiny_random",
        *RUNS[name],
        f"trainer.max_steps={STEPS}",
        "trainer.eval_interval=0",
        *([] if probes else ["probes.enabled=false"]),
        "export.verify=false",
        f"output_dir={directory / name}",
        f"data.directory={directory / 'datasets'}",
        f"model.hf_path={directory / 'model'}",
    ]


def curve(directory: Path) -> dict[str, list[float]]:
    """Read the loss and the gradient norm of every step from the output directory of a run."""
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
    return {key: [record[key] for record in records] for key in KEYS}


def _run(tree: Path, name: str, directory: Path, *, probes: bool = False) -> None:
    command = [sys.executable, "-W", "ignore", str(tree / "recipes" / "extend.py"), *overrides(name, directory, probes=probes)]
    subprocess.run(command, check=True, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"})


def differences(tree: Path, name: str, directory: Path) -> list[str]:
    """Run one experiment, with its probes, in this checkout and in another one, and compare them bit by bit.

    Args:
        tree: root of the other checkout.
        name: key of RUNS.
        directory: directory for the outputs of both runs.
    Returns:
        Keys of summary.json that differ, and "metrics.jsonl" if the loss or the gradient norm of a step differs.
    """
    outputs = []
    for number, root in enumerate((tree, ROOT)):
        place = directory / str(number)
        place.mkdir()
        _run(root, name, place, probes=True)
        outputs.append(place / name)
    before, after = (json.loads((output / "summary.json").read_text()) for output in outputs)
    found = [key for key in sorted(before.keys() | after.keys()) if key not in _UNEQUAL and before.get(key) != after.get(key)]
    return found + ["metrics.jsonl"] * (curve(outputs[0]) != curve(outputs[1]))


def main() -> int:
    """Write the given curves, or compare this checkout with another checkout. Return the exit status: 1 if the checkouts differ, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*RUNS, []], help="curves to rewrite (default: all)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="write no curves, and compare the runs with those of the checkout DIR")
    arguments = parser.parse_args()
    names = arguments.name or list(RUNS)
    if arguments.against is not None:
        changed = False
        for name in names:
            with tempfile.TemporaryDirectory() as made:
                found = differences(arguments.against.resolve(), name, Path(made))
            changed = changed or bool(found)
            print(f"{name}: {'differs in ' + ', '.join(found) if found else 'bit-equal'}")
        return int(changed)
    with tempfile.TemporaryDirectory() as made:
        for name in names:
            _run(ROOT, name, Path(made))
            found = curve(Path(made) / name)
            CURVES.mkdir(parents=True, exist_ok=True)
            (CURVES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: loss {found['loss'][0]:.6f} -> {found['loss'][-1]:.6f} in {len(found['loss'])} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
