"""Probes, generation and log-probabilities in parallel layouts: what one process finds, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from tests.support.ranks import run_ranks

LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context_parallel_size": 2}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "TP2+SPxPP2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "PP2xDP2": (4, {"pipeline_model_parallel_size": 2}),
}
# 0: whole contexts; 37 divides none of them and is odd, so that sequence parallelism has to pad
CHUNKS = {"TP1": (0, 37), "TP2+SP": (0, 37)}
TOLERANCE = 1e-5
# each kind of parallelism once in `make test`, every layout in `make test-all`
FEW = ("TP1", "TP2+SP", "PP2xVPP2", "DP2", "CP2")


@pytest.fixture(scope="module", params=[pytest.param(FEW, id="few"), pytest.param(tuple(LAYOUTS), id="all", marks=pytest.mark.repeated)])
def found(tmp_path_factory, request) -> dict[tuple[str, int], list[dict]]:
    """{(layout, chunk): what each rank got}"""
    place = tmp_path_factory.mktemp("probes")
    build_tiny_random(place / "model", num_layers=4, vocab_size=509, tie=False)
    runs = {
        (layout, chunk): ranks for layout, (ranks, _) in LAYOUTS.items() if layout in request.param for chunk in CHUNKS.get(layout, (37,))
    }
    for world_size in sorted(set(runs.values())):
        run_ranks(
            world_size,
            [
                {
                    "worker": "tests.support.probe_worker", "output": str(place / layout / str(chunk)), "model": str(place / "model"),
                    "parallel": LAYOUTS[layout][1], "prefill_chunk": chunk,
                }
                for (layout, chunk), ranks in runs.items()
                if ranks == world_size
            ],
        )  # fmt: skip
    return {
        (layout, chunk): [json.loads(Path(place / layout / str(chunk) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        for (layout, chunk), ranks in runs.items()
    }


def _numbers(value, path: str = "") -> dict[str, float | str]:
    if isinstance(value, dict):
        return {key: leaf for name, inner in value.items() for key, leaf in _numbers(inner, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {key: leaf for index, inner in enumerate(value) for key, leaf in _numbers(inner, f"{path}/{index}").items()}
    return {path: value}


def test_every_layout_and_chunk_gives_the_figures_and_texts_of_one_process(found):
    reference = _numbers(found["TP1", 0][0])
    assert len(reference) > 200
    print("\nlargest difference to one process that reads everything whole")
    for (layout, chunk), ranks in found.items():
        if layout == "CP2":
            continue
        mine = _numbers(ranks[0])
        assert mine.keys() == reference.keys(), (layout, chunk)
        worst = 0.0
        for path, value in mine.items():
            if isinstance(value, float) and not isinstance(value, bool):
                worst = max(worst, abs(value - reference[path]) / max(1.0, abs(reference[path])))
            else:
                assert value == reference[path], (layout, chunk, path)
        print(f"  {layout:12s} chunk {chunk:3d} {worst:.1e}")
        assert worst < TOLERANCE, (layout, chunk)


def test_every_rank_gets_the_same(found):
    for (layout, chunk), ranks in found.items():
        assert all(one == ranks[0] for one in ranks), (layout, chunk)


def test_an_answer_is_not_trivial(found):
    """Else equal answers would say nothing."""
    one = found["TP1", 0][0]
    assert len({token for text in one["written"] for token in text}) > 5
    assert len(set(_numbers(one["probes"]).values())) > 30
    assert one["probes"][0] == one["probes"][1], "the second time from the file"


def test_context_parallelism_is_refused_in_words(found):
    for one in found["CP2", 37]:
        assert "parallel.context_parallel_size=2" in one["refused"] and "Set parallel.context_parallel_size=1" in one["refused"]
