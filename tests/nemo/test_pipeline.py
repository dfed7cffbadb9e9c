"""Pipeline, tensor and context parallelism under NeMo's own loop, with real ranks: the losses of one rank. NeMo's data step gives positions
to the first stage alone, so that three stages are needed to catch a middle one without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.mcore import runtime
from tests.support import layout_worker
from tests.support.ranks import run_ranks

STEPS = 6
LAYOUTS = {
    "pipeline": (3, {"pipeline_model_parallel_size": 3}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "context": (2, {"context_parallel_size": 2}),
    "data": (2, {}),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    """Our own trainer on one rank, three layers, positions that differ within a micro-batch."""
    folder = tmp_path_factory.mktemp("one")
    model = build_tiny_random(folder / "model", num_layers=3, vocab_size=300, tie=False)
    job = {"output": str(folder / "run"), "data": str(folder / "data"), "model": str(model), "scheme": "endprompt_pose", "steps": STEPS}
    layout_worker.run_job({**job, "parallel": {}})
    runtime.shut_down()
    return job


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_alike(one_rank, tmp_path, name):
    """Processes of their own for each: NeMo keeps the layout of the first job of a process."""
    world_size, parallel = LAYOUTS[name]
    job = {**one_rank, "worker": "tests.support.nemo_worker", "world_size": world_size, "output": str(tmp_path), "parallel": parallel}
    run_ranks(world_size, [job], preload=["tests.support.nemo_worker"])
    losses = json.loads((tmp_path / "losses.json").read_text())
    metrics = Path(one_rank["output"], "metrics.jsonl").read_text().splitlines()
    expected = [json.loads(line)["loss"] for line in metrics]
    print(f"{name}: largest relative difference {np.abs(np.array(losses) / expected - 1).max():.1e} over {STEPS} steps")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
