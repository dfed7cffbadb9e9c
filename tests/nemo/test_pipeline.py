"""Pipeline, tensor and context parallelism under NeMo's own loop, with real ranks: the losses of one rank. NeMo's data step gives positions
to the first stage alone, so that three stages are needed to catch a middle one without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from endprompt_megatron.checkpoint.hf_sources import build_tiny_random
from endprompt_megatron.mcore import runtime
from tests.support import layout_worker
from tests.support.ranks import run_ranks

STEPS = 6
LAYOUTS = {
    3: {"pipeline": {"pipeline_model_parallel_size": 3}},
    2: {
        "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "context": {"context_parallel_size": 2},
        "data": {},
    },
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


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_train_alike(one_rank, tmp_path, world_size):
    common = {**one_rank, "worker": "tests.support.nemo_worker", "world_size": world_size}
    jobs = [{**common, "output": str(tmp_path / name), "parallel": parallel} for name, parallel in LAYOUTS[world_size].items()]
    run_ranks(world_size, jobs, preload=["tests.support.nemo_worker"])
    for name in LAYOUTS[world_size]:
        losses = json.loads((tmp_path / name / "losses.json").read_text())
        metrics = Path(one_rank["output"], "metrics.jsonl").read_text().splitlines()
        expected = [json.loads(line)["loss"] for line in metrics]
        print(f"{name}: largest relative difference {np.abs(np.array(losses) / expected - 1).max():.1e} over {STEPS} steps")
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
