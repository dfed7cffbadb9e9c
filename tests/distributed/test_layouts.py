"""Every parallel layout trains the same model as one process, and a checkpoint of one layout goes on in another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf_sources import build_tiny_random
from endprompt_megatron.log import read_metrics
from tests.support.ranks import run_ranks

STEPS = 20
LAYOUTS = {
    "TP1": (1, {}),
    "recompute full": (1, {"recompute_granularity": "full"}),
    "recompute selective": (1, {"recompute_granularity": "selective"}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2": (2, {}),
    "DP2+DistributedOptimizer": (2, {"use_distributed_optimizer": True}),
    "DP2+DistributedOptimizer+overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
# scheme -> tied embeddings: both kinds are trained in every layout
SCHEMES = {"endprompt": True, "scattered": False}


def _figures(output: str) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(Path(output) / "metrics.jsonl") if "loss" in record]


def _largest_relative_difference(ours: list[tuple[float, float]], reference: list[tuple[float, float]], column: int) -> float:
    assert len(ours) == len(reference) > 0
    return max(abs(a[column] - b[column]) / abs(b[column]) for a, b in zip(ours, reference, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    for scheme, tied in SCHEMES.items():
        build_tiny_random(directory / f"model_{scheme}", num_layers=4, vocab_size=509, tie=tied)
    return directory


def _job(place: Path, scheme: str, output: str, parallel: dict, **more) -> dict:
    return {
        "output": str(place / output), "model": str(place / f"model_{scheme}"), "data": str(place / "datasets"), "scheme": scheme,
        "steps": STEPS, "parallel": parallel, "global_batch_size": 4, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(place) -> dict[tuple[str, str], list[tuple[float, float]]]:
    for world_size in (1, 2, 4):
        jobs = [
            _job(place, scheme, f"{scheme}/{layout}", parallel)
            for layout, (ranks, parallel) in LAYOUTS.items()
            if ranks == world_size
            for scheme in SCHEMES
        ]
        if world_size == 4:
            jobs.append(_job(place, "endprompt", "again/TP2xPP2", LAYOUTS["TP2xPP2"][1]))
        run_ranks(world_size, jobs)
    return {(scheme, layout): _figures(str(place / scheme / layout)) for scheme in SCHEMES for layout in LAYOUTS}


def test_every_layout_trains_the_same_model(trained):
    print(f"\nlargest relative difference to one process over {STEPS} steps, fp32: loss, gradient norm")
    failures = []
    for layout in LAYOUTS:
        row = []
        for scheme in SCHEMES:
            ours, reference = trained[scheme, layout], trained[scheme, "TP1"]
            loss = _largest_relative_difference(ours, reference, 0)
            norm = _largest_relative_difference(ours, reference, 1)
            row.append(f"{scheme} {loss:.1e} {norm:.1e}")
            if loss > 1e-4 or norm > 1e-4:
                failures.append((layout, scheme, loss, norm))
        print(f"  {layout:34s} {'   '.join(row)}")
    assert not failures
    for scheme in SCHEMES:
        losses = [loss for loss, _ in trained[scheme, "TP1"]]
        assert losses[-1] < losses[0] - 0.3, "the model does learn"
    assert trained["endprompt", "TP1"][0] != trained["scattered", "TP1"][0]


def test_two_runs_of_one_layout_are_bit_identical(place, trained):
    assert _figures(str(place / "again" / "TP2xPP2")) == trained["endprompt", "TP2xPP2"]


_SAVED = {name: LAYOUTS[name] for name in ("TP1", "PP2xVPP2", "TP2xPP2", "DP2+DistributedOptimizer", "DP2+DistributedOptimizer+overlap")}
_RESUMED = {name: LAYOUTS[name] for name in ("TP1", "TP2", "PP2")}  # one process is DP1 too

_RESUMED_ALONE = ("PP2xVPP2", "DP2+DistributedOptimizer+overlap")  # variants of layouts that go everywhere


def _optimizer_kind(layout: str) -> dict:
    return {key: value for key, value in LAYOUTS[layout][1].items() if key == "use_distributed_optimizer"}


def test_a_checkpoint_goes_on_in_another_layout(place, trained):
    """Save at step 5, resume elsewhere: the next 5 losses are the uninterrupted run's; in the same layout bit for bit.

    The kind of optimizer stays what it was: Megatron's distributed and plain optimizers store different things.
    """
    for name, (ranks, parallel) in _SAVED.items():
        run_ranks(ranks, [_job(place, "endprompt", f"saved/{name}", parallel, steps=5)])
    targets = {
        (saved, resumed): _RESUMED[resumed]
        for saved in _SAVED
        for resumed in (["TP1"] if saved in _RESUMED_ALONE else _RESUMED)
    }
    targets |= {(saved, saved): _SAVED[saved] for saved in _SAVED}
    for saved, resumed in targets:
        shutil.copytree(place / "saved" / saved, place / "resumed" / saved / resumed)
    for world_size in (1, 2, 4):
        jobs = [
            _job(place, "endprompt", f"resumed/{saved}/{resumed}", {**parallel, **_optimizer_kind(saved)}, steps=10)
            for (saved, resumed), (ranks, parallel) in targets.items()
            if ranks == world_size
        ]
        if jobs:
            run_ranks(world_size, jobs)
    print("\nlargest relative difference of losses 6 to 10 to the uninterrupted run")
    worst = 0.0
    for saved, resumed in targets:
        ours = _figures(str(place / "resumed" / saved / resumed))[5:]
        difference = _largest_relative_difference(ours, trained["endprompt", "TP1"][5:10], 0)
        same = ours == trained["endprompt", saved][5:10] if saved == resumed else None
        print(f"  saved at {saved:34s} resumed at {resumed:34s} {difference:.1e}{'  bit for bit' if same else ''}")
        worst = max(worst, difference)
        assert same is not False, f"{saved}: resuming in the same layout must be bit for bit"
    assert worst <= 1e-4
