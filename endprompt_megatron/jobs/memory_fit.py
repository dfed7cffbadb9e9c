"""Search for the smallest change that makes a layout fit. The error message for a layout that does not fit recommends this change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from endprompt_megatron.config.schema import RunConfig

_MAX_RANKS = 4096


@dataclass(frozen=True)
class _Change:
    """One change of the configuration.

    Attributes:
        values: {dotted key: new value}.
        cost: rough measure of the additional computation and communication per step; 0 if the change is free.
    """

    values: dict[str, Any]
    cost: float

    def __bool__(self) -> bool:
        return bool(self.values)


_NOTHING = _Change({}, 0.0)


def smallest_change(config: RunConfig, *, world_size: int, works: Callable[[RunConfig, int], bool]) -> list[str] | None:
    """Find the change of the fewest keys of `parallel` and `trainer` with which a run works. Among changes of equally many keys, the
    cheapest is chosen. If no change works, the number of nodes is doubled.

    Args:
        config: resolved configuration; not modified.
        world_size: number of ranks of the job.
        works: function of (config, ranks) that returns whether the configuration is valid and fits.
    Returns:
        Overrides as for the command line, e.g. ["parallel.tensor_model_parallel_size=2"]; None if nothing works.
    """
    nodes, ranks = config.launch.num_nodes, world_size
    while ranks <= max(_MAX_RANKS, world_size):
        for changes in _combinations(config, ranks // nodes):
            values = {key: value for change in changes for key, value in change.values.items()}
            if nodes != config.launch.num_nodes:
                values["launch.num_nodes"] = nodes
            if works(_changed(config, values), ranks):
                return [f"{key}={_as_override(value)}" for key, value in values.items()]
        nodes, ranks = 2 * nodes, 2 * ranks
    return None


def _combinations(config: RunConfig, node_size: int) -> Iterator[tuple[_Change, ...]]:
    """Return all combinations of at most one change of each kind, ordered by the number of changes and then by cost."""
    every = itertools.product(*((_NOTHING, *kind) for kind in _kinds(config, node_size)))
    chosen = [tuple(filter(None, changes)) for changes in every]
    return iter(sorted(chosen, key=lambda changes: (len(changes), sum(change.cost for change in changes))))


def _kinds(config: RunConfig, node_size: int) -> list[list[_Change]]:
    parallel, micro_batch = config.parallel, config.trainer.micro_batch_size
    tensor, context, pipeline = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    stronger = {None: ["selective", "full"], "selective": ["full"]}.get(parallel.recompute_granularity, [])
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    plain_schedule = {"parallel.virtual_pipeline_model_parallel_size": None} if interleaved else {}
    kinds = [
        [] if parallel.use_distributed_optimizer else [_Change({"parallel.use_distributed_optimizer": True}, 0.0)],
        [_Change({"trainer.micro_batch_size": size}, 0.1 * math.log2(micro_batch / size)) for size in _powers(1, micro_batch - 1)],
        [_Change({"parallel.recompute_granularity": name}, 0.5 if name == "selective" else 1.0) for name in stronger],
        [
            _Change({"parallel.tensor_model_parallel_size": size, "parallel.sequence_parallel": True}, 2.0 + math.log2(size / tensor))
            for size in range(2 * tensor, node_size + 1, tensor)
        ],
        [_Change({"parallel.context_parallel_size": size}, 2.5 + math.log2(size / context)) for size in _powers(2 * context, 16 * context)],
        [
            _Change({"parallel.pipeline_model_parallel_size": size, **plain_schedule}, 3.0 + math.log2(size / pipeline))
            for size in _powers(2 * pipeline, 16 * pipeline)
        ],
    ]
    if tensor > 1 and not parallel.sequence_parallel:
        kinds.append([_Change({"parallel.sequence_parallel": True}, 0.0)])
    return kinds


def _powers(first: int, last: int) -> list[int]:
    """Return first, 2 first, 4 first, ... up to `last`."""
    return [first * 2**exponent for exponent in range(16) if first * 2**exponent <= last]


def _changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    return replace(config, **{group: replace(getattr(config, group), **changes) for group, changes in groups.items()})


def _as_override(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
