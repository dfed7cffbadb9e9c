"""The README's NeMo example, word for word, on a tiny model under the names that it uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.nemo_worker import indexed_prefix
from tests.support.tiny import ROOT


def example() -> str:
    section = (ROOT / "README.md").read_text().split("\n## NeMo and Megatron-Bridge\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_example_runs_as_it_stands(trained_by_us, tmp_path):
    # the example's window of 16,384 over samples of 512 fits a base of 8,192 positions
    shutil.copytree(trained_by_us["model"], tmp_path / "models/smollm2_135m")
    config = tmp_path / "models/smollm2_135m/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    (tmp_path / "datasets").mkdir()
    prefix = Path(indexed_prefix(trained_by_us["data"]))
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefix}.{ending}", tmp_path / f"datasets/my_text.{ending}")
    (tmp_path / "train.py").write_text(example())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    exported = json.loads((tmp_path / "extended/config.json").read_text())
    assert exported["max_position_embeddings"] == 16384 and exported["rope_scaling"]["factor"] == 2.0
    assert (tmp_path / "extended/model.safetensors").is_file() and (tmp_path / "extended/tokenizer.json").is_file()
