"""Rewrite the golden loss curves of tests/golden/losses: `python tools/golden_losses.py [NAME ...]`.

A golden curve is the loss of every step of a short run on the tiny random model, in float32 on one CPU thread. tests/golden/test_losses.py
compares the curves with new runs. A refactoring leaves them unchanged. A commit that changes the numbers rewrites them and explains why.
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
# name of a curve -> overrides of its run in addition to `overrides`
RUNS = {
    "endprompt": ["method=endprompt"],
    "full": ["method=full"],
    "lora": ["method=endprompt", "adapter=lora"],
}
KEYS = ("loss", "grad_norm")


def overrides(name: str, directory: Path) -> list[str]:
    """Overrides of recipes/extend.py for the run of one curve, which writes to `directory`."""
    return [
        "+experiment=tiny_random",
        *RUNS[name],
        f"trainer.max_steps={STEPS}",
        "trainer.eval_interval=0",
        "probes.enabled=false",
        "export.verify=false",
        f"output_dir={directory / name}",
        f"data.directory={directory / 'datasets'}",
        f"model.hf_path={directory / 'model'}",
    ]


def curve(directory: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step, from the output directory of a run."""
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
    return {key: [record[key] for record in records] for key in KEYS}


def main() -> int:
    """Compute the given curves, or all, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*RUNS, []], help="curves to rewrite (default: all)")
    names = parser.parse_args().name or list(RUNS)
    with tempfile.TemporaryDirectory() as made:
        for name in names:
            command = [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "extend.py"), *overrides(name, Path(made))]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found = curve(Path(made) / name)
            CURVES.mkdir(parents=True, exist_ok=True)
            (CURVES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: loss {found['loss'][0]:.6f} -> {found['loss'][-1]:.6f} in {len(found['loss'])} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
