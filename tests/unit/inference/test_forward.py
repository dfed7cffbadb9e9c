"""Work split over data-parallel ranks: a failure on one rank ends it on all. Layouts are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.model import backends

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


@pytest.fixture
def forward(tiny_model_dir, single_process):
    return ForwardModel(load_model(tiny_model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU), device=CPU)


@pytest.fixture
def other_rank(monkeypatch):
    """A second rank, whose report is set by the test and which records the report of this rank."""
    recorded: list = []

    def gather(gathered, own):
        recorded.append(own)
        gathered[:] = [own, reports_of_other[0]]

    reports_of_other: list = [None]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return reports_of_other, recorded


def test_results_of_another_task_are_not_taken_for_those_of_this_one(forward, other_rank):
    """A rank that left a task out is at the next one, whose indices are the same."""
    other_rank[0][0] = ("task b", None, {1: "of b"})
    with pytest.raises(RuntimeError, match="rank 1 is at 'task b' while others are at 'task a'"):
        forward.map_over_data_parallel([0, 1], lambda item: f"{item} of a", label="task a")


def test_a_failure_on_another_rank_ends_the_task_here(forward, other_rank):
    other_rank[0][0] = ("task a", "OutOfMemoryError: 3 GiB", {})
    with pytest.raises(RuntimeError, match="rank 1: OutOfMemoryError: 3 GiB"):
        forward.map_over_data_parallel([0, 1], lambda item: item, label="task a")


def test_a_failure_here_is_reported_before_it_is_raised(forward, other_rank):
    other_rank[0][0] = ("task a", None, {1: "right"})

    def fail(item):
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        forward.map_over_data_parallel([0, 1], fail, label="task a")
    assert other_rank[1] == [("task a", "MemoryError: none left", {})]
