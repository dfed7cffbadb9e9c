"""Every parallel layout trains the same model as one process, and a checkpoint of one layout goes on in another."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.log import read_metrics
from tests.support.ranks import run_ranks

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
# scheme -> tied embeddings
SCHEMES = {"endprompt": True, "scattered": False}


@dataclass(frozen=True)
class Extent:
    """How much is trained: `make test` takes the short way, `make test-all` the long one too.

    Attributes:
        steps: of a run from its start.
        schemes: each of the layouts trains with; the short way takes them in turn.
        learnt: by how much the loss must fall over the steps.
    """

    steps: int
    every_scheme: bool
    learnt: float

    def schemes(self, layout: str) -> list[str]:
        """Schemes that a layout is trained with; one process, to which all are compared, with each."""
        every = list(SCHEMES)
        return every if self.every_scheme or layout == "TP1" else [every[list(LAYOUTS).index(layout) % len(every)]]


EXTENTS = [
    pytest.param(Extent(8, False, 0.05), id="short"),
    pytest.param(Extent(20, True, 0.3), id="long", marks=pytest.mark.repeated),
]


def _figures(output: str) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(Path(output) / "metrics.jsonl") if "loss" in record]


def _largest_relative_difference(ours: list[tuple[float, float]], reference: list[tuple[float, float]], column: int) -> float:
    assert len(ours) == len(reference) > 0
    return max(abs(a[column] - b[column]) / abs(b[column]) for a, b in zip(ours, reference, strict=True))


@pytest.fixture(scope="module", params=EXTENTS)
def extent(request) -> Extent:
    """Of every test here."""
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory, extent) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    for scheme, tied in SCHEMES.items():
        build_tiny_random(directory / f"model_{scheme}", num_layers=4, vocab_size=509, tie=tied)
    return directory


def _job(place: Path, scheme: str, output: str, parallel: dict, steps: int, **more) -> dict:
    return {
        "output": str(place / output), "model": str(place / f"model_{scheme}"), "data": str(place / "datasets"), "scheme": scheme,
        "steps": steps, "parallel": parallel, "global_batch_size": 4, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(place, extent) -> dict[tuple[str, str], list[tuple[float, float]]]:
    for world_size in (1, 2, 4):
        jobs = [
            _job(place, scheme, f"{scheme}/{layout}", parallel, extent.steps)
            for layout, (ranks, parallel) in LAYOUTS.items()
            if ranks == world_size
            for scheme in extent.schemes(layout)
        ]
        if world_size == 4:
            jobs.append(_job(place, "endprompt", "again/TP2xPP2", LAYOUTS["TP2xPP2"][1], extent.steps))
        run_ranks(world_size, jobs)
    return {(scheme, layout): _figures(str(place / scheme / layout)) for layout in LAYOUTS for scheme in extent.schemes(layout)}


def test_every_layout_trains_the_same_model(trained, extent):
    print(f"\nlargest relative difference to one process over {extent.steps} steps, fp32: loss, gradient norm")
    failures = []
    for layout in LAYOUTS:
        row = []
        for scheme in extent.schemes(layout):
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
        assert losses[-1] < losses[0] - extent.learnt, "the model does learn"
    assert trained["endprompt", "TP1"][0] != trained["scattered", "TP1"][0]


def test_two_runs_of_one_layout_are_bit_identical(place, trained):
    assert _figures(str(place / "again" / "TP2xPP2")) == trained["endprompt", "TP2xPP2"]


_SAVED = ("TP1", "PP2xVPP2", "TP2xPP2", "DP2+DistributedOptimizer", "DP2+DistributedOptimizer+overlap")
_RESUMED = ("TP1", "TP2", "PP2")  # one process is DP1 too
_RESUMED_ALONE = ("PP2xVPP2", "DP2+DistributedOptimizer+overlap")  # variants of layouts that go everywhere


def _optimizer_kind(layout: str) -> dict:
    return {key: value for key, value in LAYOUTS[layout][1].items() if key == "use_distributed_optimizer"}


def _resumptions(extent: Extent) -> list[tuple[str, str]]:
    """(layout of the save, layout that goes on)"""
    if not extent.every_scheme:
        return [("TP2xPP2", "TP1"), ("TP2xPP2", "TP2xPP2"), ("DP2+DistributedOptimizer", "TP2")]
    elsewhere = [(saved, resumed) for saved in _SAVED for resumed in (["TP1"] if saved in _RESUMED_ALONE else _RESUMED)]
    return list(dict.fromkeys([*elsewhere, *((saved, saved) for saved in _SAVED)]))


def test_a_checkpoint_goes_on_in_another_layout(place, trained, extent):
    """Save, resume elsewhere: the next losses are the uninterrupted run's; in the same layout bit for bit.

    The kind of optimizer stays what it was: Megatron's distributed and plain optimizers store different things.
    """
    halfway, pairs = extent.steps // 4, _resumptions(extent)
    scheme = {saved: extent.schemes(saved)[0] for saved, _ in pairs}
    for saved in scheme:
        ranks, parallel = LAYOUTS[saved]
        run_ranks(ranks, [_job(place, scheme[saved], f"saved/{saved}", parallel, halfway)])
    for saved, resumed in pairs:
        shutil.copytree(place / "saved" / saved, place / "resumed" / saved / resumed)
    for world_size in (1, 2, 4):
        jobs = [
            _job(place, scheme[saved], f"resumed/{saved}/{resumed}", {**LAYOUTS[resumed][1], **_optimizer_kind(saved)}, 2 * halfway)
            for saved, resumed in pairs
            if LAYOUTS[resumed][0] == world_size
        ]
        if jobs:
            run_ranks(world_size, jobs)
    print(f"\nlargest relative difference of losses {halfway + 1} to {2 * halfway} to the uninterrupted run")
    worst, next_ones = 0.0, slice(halfway, 2 * halfway)
    for saved, resumed in pairs:
        ours = _figures(str(place / "resumed" / saved / resumed))[next_ones]
        difference = _largest_relative_difference(ours, trained[scheme[saved], "TP1"][next_ones], 0)
        same = ours == trained[scheme[saved], saved][next_ones] if saved == resumed else None
        print(f"  saved at {saved:34s} resumed at {resumed:34s} {difference:.1e}{'  bit for bit' if same else ''}")
        worst = max(worst, difference)
        assert same is not False, f"{saved}: resuming in the same layout must be bit for bit"
    assert worst <= 1e-4
