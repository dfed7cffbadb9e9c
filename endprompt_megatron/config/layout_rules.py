"""Rules for the parallel layout and for the batch sizes, which depend on the layout."""

from __future__ import annotations

from collections.abc import Callable

from endprompt_megatron.config.ranges import MOST_RANKS
from endprompt_megatron.config.rule import Facts, Rule, next_multiple
from endprompt_megatron.config.schema import ParallelConfig, RunConfig
from endprompt_megatron.planning.architecture import ModelArchitecture

_TENSOR = "parallel.tensor_model_parallel_size"
_PIPELINE = "parallel.pipeline_model_parallel_size"
_VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
_CONTEXT = "parallel.context_parallel_size"
_SIZES = (_TENSOR, _PIPELINE, _CONTEXT)
_BATCH = ("trainer.micro_batch_size", "trainer.global_batch_size")


def _has_ranks(facts: Facts) -> bool:
    return 1 <= facts.world_size <= MOST_RANKS


def _has_sizes(facts: Facts) -> bool:
    """Return whether all sizes are at least 1, so that the other rules can divide by them."""
    return _has_ranks(facts) and all(facts.value(key) >= 1 for key in _SIZES)


def _divides_ranks(facts: Facts) -> bool:
    return _has_sizes(facts) and facts.world_size % facts.parallel.model_parallel_size == 0


def _divides_heads(kind: str, count: Callable[[ModelArchitecture], int]) -> Rule:
    def message(facts: Facts) -> str:
        heads = count(facts.architecture)
        divisors = [size for size in range(1, heads + 1) if heads % size == 0]
        return f"{_TENSOR}={facts.value(_TENSOR)}: must divide the model's {heads} {kind}. Choose one of {divisors}."

    return Rule((_TENSOR,), lambda facts: _has_sizes(facts) and count(facts.architecture) % facts.value(_TENSOR) != 0, message)


def _virtual_is_unusable(facts: Facts) -> bool:
    virtual = facts.value(_VIRTUAL)
    return virtual is not None and facts.value(_PIPELINE) == 1


def _batch_step(facts: Facts) -> int:
    return facts.config.trainer.micro_batch_size * facts.config.data_parallel_size(facts.world_size)


def _batch_is_uneven(facts: Facts) -> bool:
    trainer = facts.config.trainer
    return trainer.global_batch_size % _batch_step(facts) != 0


# rules for splitting the model, which do not depend on the samples and the batch
CUT_RULES = (
    _divides_heads("attention heads", lambda architecture: architecture.num_attention_heads),
    _divides_heads("KV heads", lambda architecture: architecture.num_query_groups),
    Rule(
        (_VIRTUAL, _PIPELINE),
        lambda facts: _has_sizes(facts) and _virtual_is_unusable(facts),
        lambda facts: f"{_VIRTUAL}={facts.value(_VIRTUAL)}: needs pipeline_model_parallel_size > 1. Set it to null.",
    ),
    Rule(
        (_PIPELINE, _VIRTUAL),
        lambda facts: (
            _has_sizes(facts)
            and not _virtual_is_unusable(facts)
            and facts.architecture.num_layers % (facts.value(_PIPELINE) * (facts.value(_VIRTUAL) or 1)) != 0
        ),
        lambda facts: (
            f"{_PIPELINE}={facts.value(_PIPELINE)} x virtual_pipeline_model_parallel_size={facts.value(_VIRTUAL)}: must divide the "
            f"model's {facts.architecture.num_layers} layers."
        ),
    ),
    Rule(
        ("parallel.sequence_parallel", _TENSOR),
        lambda facts: _has_sizes(facts) and facts.parallel.sequence_parallel and facts.value(_TENSOR) == 1,
        lambda facts: "parallel.sequence_parallel=true with tensor_model_parallel_size=1: nothing to split. Set it to false.",
    ),
    Rule(
        _SIZES,
        lambda facts: _has_sizes(facts) and not _divides_ranks(facts),
        lambda facts: (
            f"world size {facts.world_size}: must be a multiple of TP x PP x CP = {' x '.join(str(facts.value(key)) for key in _SIZES)} = "
            f"{facts.parallel.model_parallel_size}. Start that many processes, or set smaller sizes."
        ),
    ),
)

LAYOUT_RULES = (
    Rule(
        ("launch.num_nodes", "launch.nproc_per_node"),
        lambda facts: not _has_ranks(facts),
        lambda facts: (
            f"launch.num_nodes={facts.config.launch.num_nodes}, launch.nproc_per_node={facts.config.launch.nproc_per_node}: these are "
            f"{facts.world_size} ranks, and a job has between 1 and {MOST_RANKS}. nproc_per_node=null starts one process per GPU."
        ),
    ),
    *CUT_RULES,
    Rule(
        (_CONTEXT, "data.seq_length"),
        lambda facts: _has_sizes(facts) and facts.value(_CONTEXT) > 1 and facts.config.data.seq_length % (2 * facts.value(_CONTEXT)) != 0,
        lambda facts: (
            f"{_CONTEXT}={facts.value(_CONTEXT)}: data.seq_length={facts.config.data.seq_length} must be a multiple of "
            f"2*context_parallel_size={2 * facts.value(_CONTEXT)}. Set "
            f"data.seq_length={next_multiple(facts.config.data.seq_length, 2 * facts.value(_CONTEXT))}."
        ),
    ),
    Rule(
        ("parallel.sequence_parallel", "data.seq_length", _TENSOR, _CONTEXT),
        lambda facts: (
            _has_sizes(facts)
            and facts.parallel.sequence_parallel
            and facts.config.data.seq_length % (facts.value(_TENSOR) * facts.value(_CONTEXT)) != 0
        ),
        lambda facts: (
            f"data.seq_length={facts.config.data.seq_length}: sequence_parallel needs a multiple of "
            f"{facts.value(_TENSOR) * facts.value(_CONTEXT)}."
        ),
    ),
    Rule(
        ("parallel.overlap_param_gather", "parallel.use_distributed_optimizer"),
        lambda facts: _has_sizes(facts) and facts.parallel.overlap_param_gather and not facts.parallel.use_distributed_optimizer,
        lambda facts: "parallel.overlap_param_gather=true: needs use_distributed_optimizer=true. Set both, or neither.",
    ),
    Rule(
        _BATCH,
        lambda facts: _divides_ranks(facts) and _batch_is_uneven(facts),
        lambda facts: (
            f"trainer.global_batch_size={facts.config.trainer.global_batch_size}: must be a positive multiple of micro_batch_size x "
            f"data-parallel size = {facts.config.trainer.micro_batch_size} x {facts.config.data_parallel_size(facts.world_size)} = "
            f"{_batch_step(facts)}."
        ),
    ),
    Rule(
        (_VIRTUAL, _PIPELINE, *_BATCH),
        lambda facts: (
            _divides_ranks(facts)
            and not _batch_is_uneven(facts)
            and facts.value(_VIRTUAL) is not None
            and facts.config.num_micro_batches(facts.world_size) % facts.value(_PIPELINE) != 0
        ),
        lambda facts: (
            f"{_VIRTUAL}={facts.value(_VIRTUAL)}: the interleaved schedule needs a number of micro-batches that is a multiple of "
            f"pipeline_model_parallel_size={facts.value(_PIPELINE)}, not {facts.config.num_micro_batches(facts.world_size)}. Change "
            f"trainer.global_batch_size or trainer.micro_batch_size."
        ),
    ),
)


def cut_problems(parallel: ParallelConfig, *, world_size: int, architecture: ModelArchitecture) -> list[str]:
    """Return one error message per problem of a layout of `world_size` ranks for this architecture. Does not check batch sizes."""
    facts = Facts(RunConfig(parallel=parallel), world_size, architecture)
    return [problem for rule in CUT_RULES for problem in rule.problems(facts)]
