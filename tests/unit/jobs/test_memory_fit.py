"""The smallest change, with made-up rules of what works, so that the right answer is known."""

from __future__ import annotations

import copy

import pytest

from endprompt_megatron.config.schema import LaunchConfig, ParallelConfig, RunConfig, TrainerConfig
from endprompt_megatron.jobs.memory_fit import smallest_change


def _config(micro_batch_size: int = 1, **parallel: object) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(**parallel), trainer=TrainerConfig(1, micro_batch_size, 64), launch=LaunchConfig(nproc_per_node=8)
    )


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        (lambda p, t: p.use_distributed_optimizer, ["parallel.use_distributed_optimizer=true"]),
        (lambda p, t: t.micro_batch_size <= 2, ["trainer.micro_batch_size=2"]),
        (lambda p, t: p.tensor_model_parallel_size >= 3, ["parallel.tensor_model_parallel_size=3", "parallel.sequence_parallel=true"]),
        (lambda p, t: p.context_parallel_size == 4, ["parallel.context_parallel_size=4"]),
        # one change that costs more goes before two that cost less
        (
            lambda p, t: p.pipeline_model_parallel_size == 8 or (p.use_distributed_optimizer and t.micro_batch_size == 1),
            ["parallel.pipeline_model_parallel_size=8"],
        ),
        # of several changes the cheapest: recomputation costs a third, tensor parallelism communication in every layer
        (lambda p, t: p.recompute_granularity == "full" or p.tensor_model_parallel_size == 2, ["parallel.recompute_granularity=full"]),
        (
            lambda p, t: p.recompute_granularity and p.use_distributed_optimizer,
            ["parallel.use_distributed_optimizer=true", "parallel.recompute_granularity=selective"],
        ),
    ],
)
def test_the_fewest_keys_and_the_cheapest_values(works, expected):
    config = _config(micro_batch_size=4)
    before = copy.deepcopy(config)
    assert smallest_change(config, world_size=8, works=lambda changed, ranks: bool(works(changed.parallel, changed.trainer))) == expected
    assert config == before


def test_a_change_goes_on_from_what_is_there():
    config = _config(tensor_model_parallel_size=2, context_parallel_size=2, recompute_granularity="full", use_distributed_optimizer=True)
    config.launch.num_nodes = 512
    tried = []
    assert smallest_change(config, world_size=4096, works=lambda changed, ranks: bool(tried.append(changed.parallel))) is None
    assert {parallel.tensor_model_parallel_size for parallel in tried} == {2, 4, 6, 8}, "within a node, in multiples"
    assert {parallel.context_parallel_size for parallel in tried} == {2, 4, 8, 16, 32}
    assert {parallel.recompute_granularity for parallel in tried} == {"full"}


def test_another_number_of_stages_gives_up_interleaving():
    config = _config(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=4)
    assert smallest_change(config, world_size=8, works=lambda changed, ranks: changed.parallel.pipeline_model_parallel_size == 4) == [
        "parallel.pipeline_model_parallel_size=4",
        "parallel.virtual_pipeline_model_parallel_size=null",
    ]


def test_sequence_parallelism_alone_is_a_change():
    config = _config(tensor_model_parallel_size=8)
    assert smallest_change(config, world_size=8, works=lambda changed, ranks: changed.parallel.sequence_parallel) == [
        "parallel.sequence_parallel=true"
    ]


def test_more_nodes_where_these_do_not_do():
    config = _config()
    asked = smallest_change(config, world_size=8, works=lambda changed, ranks: ranks >= 32 and changed.parallel.use_distributed_optimizer)
    assert asked == ["parallel.use_distributed_optimizer=true", "launch.num_nodes=4"]
    # memory of hosts is shared by their ranks, so `works` has to see the nodes
    shared = smallest_change(config, world_size=8, works=lambda changed, ranks: changed.launch.num_nodes >= 2 and ranks == 16)
    assert shared == ["launch.num_nodes=2"]
    assert smallest_change(config, world_size=8, works=lambda changed, ranks: False) is None
