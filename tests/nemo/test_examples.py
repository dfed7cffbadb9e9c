"""The NeMo examples of docs/examples/ as they stand: nemo_pretrain.py runs on a tiny model under the names that it uses, and nemo_slurm.py up
to the call that would submit the job."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.nemo_worker import indexed_prefix
from tests.support.tiny import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def test_example_runs_as_it_stands(trained_by_us, tmp_path):
    # the example's window of 16,384 over samples of 512 fits a base of 8,192 positions
    shutil.copytree(trained_by_us["model"], tmp_path / "models/smollm2_135m")
    config = tmp_path / "models/smollm2_135m/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    (tmp_path / "datasets").mkdir()
    prefix = Path(indexed_prefix(trained_by_us["data"]))
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefix}.{ending}", tmp_path / f"datasets/my_text.{ending}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "nemo_pretrain.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    exported = json.loads((tmp_path / "extended/config.json").read_text())
    assert exported["max_position_embeddings"] == 16384 and exported["rope_scaling"]["factor"] == 2.0
    assert (tmp_path / "extended/model.safetensors").is_file() and (tmp_path / "extended/tokenizer.json").is_file()


def test_the_slurm_example_requests_the_nodes_of_its_recipe(monkeypatch):
    submitted = []
    monkeypatch.setattr("nemo_run.run", lambda recipe, *, executor: submitted.append((recipe, executor)))
    runpy.run_path(str(EXAMPLES / "nemo_slurm.py"), run_name="__main__")
    ((recipe, executor),) = submitted
    assert (executor.nodes, executor.gpus_per_node) == (recipe.trainer.num_nodes, recipe.trainer.devices)
    assert executor.ntasks_per_node == recipe.trainer.devices
