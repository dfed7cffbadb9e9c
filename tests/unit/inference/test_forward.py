"""Work shared out over ranks: one that fails is heard of everywhere. The layouts themselves are in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from endprompt_megatron.evaluation.ruler.offline import load_model
from endprompt_megatron.inference.forward import Replica
from endprompt_megatron.model import backends

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


@pytest.fixture
def replica(tiny_model_dir, single_process):
    return Replica(load_model(tiny_model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU), device=CPU)


@pytest.fixture
def other_rank(monkeypatch):
    """A second rank that says what is set, and hears what this one says."""
    heard: list = []

    def gather(told, own):
        heard.append(own)
        told[:] = [own, heard_from[0]]

    heard_from: list = [None]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return heard_from, heard


def test_results_of_another_task_are_not_taken_for_those_of_this_one(replica, other_rank):
    """A rank that left a task out is at the next one, whose indices are the same."""
    other_rank[0][0] = ("task b", None, {1: "of b"})
    with pytest.raises(RuntimeError, match="rank 1 is at 'task b' while others are at 'task a'"):
        replica.share_out([0, 1], lambda item: f"{item} of a", label="task a")


def test_a_failure_elsewhere_ends_the_task_here(replica, other_rank):
    other_rank[0][0] = ("task a", "OutOfMemoryError: 3 GiB", {})
    with pytest.raises(RuntimeError, match="rank 1: OutOfMemoryError: 3 GiB"):
        replica.share_out([0, 1], lambda item: item, label="task a")


def test_a_failure_here_is_told_before_it_is_raised(replica, other_rank):
    other_rank[0][0] = ("task a", None, {1: "right"})

    def fail(item):
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        replica.share_out([0, 1], fail, label="task a")
    assert other_rank[1] == [("task a", "MemoryError: none left", {})]
