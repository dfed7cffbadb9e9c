"""Layouts over NCCL: several GPUs train what one GPU trains. Each rank is a process of its own."""

from __future__ import annotations

import pytest
import torch

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.log import read_metrics
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires_gpu

LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "context": (2, {"context_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "data": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tensor and context": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Losses of 10 steps in a layout; each is trained once."""
    base = tmp_path_factory.mktemp("layouts")
    model = build_tiny_random(base / "model", vocab_size=512, tie=False)
    known: dict[tuple[str, str], list[float]] = {}

    def losses(layout: str, backend: str) -> list[float]:
        world_size, parallel = LAYOUTS[layout]
        if (layout, backend) not in known:
            output = base / f"{backend} {layout}"
            job = {
                "output": str(output), "model": str(model), "data": str(base / "data"), "scheme": "endprompt", "steps": 10, "precision": "bf16",
                "parallel": parallel, "accelerator": "gpu", "backend": backend,
            }  # fmt: skip
            run_ranks(world_size, [job])
            known[layout, backend] = [record["loss"] for record in read_metrics(output / "metrics.jsonl")]
        return known[layout, backend]

    return losses


@pytest.mark.parametrize("backend", ["torch", pytest.param("te", marks=pytest.mark.requires_te)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_losses_are_one_gpus(layout, backend, train):
    needed = LAYOUTS[layout][0]
    if torch.cuda.device_count() < needed:
        pytest.skip(f"{needed} GPUs are needed, {torch.cuda.device_count()} found")
    expected, found = train("one", backend), train(layout, backend)
    assert len(found) == 10 and expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=0.01)
