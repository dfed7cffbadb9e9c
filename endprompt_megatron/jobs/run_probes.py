"""Make the probes of a run from its configuration, and check that the machine has enough memory for the longest context."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import torch

from endprompt_megatron.config.resolved import ResolvedRun
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.data.corpora import corpus_texts
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.probes.long_text import NUMBER, WORD, make_long_texts
from endprompt_megatron.evaluation.probes.needle import make_haystacks
from endprompt_megatron.evaluation.probes.perplexity import held_out_blocks
from endprompt_megatron.evaluation.probes.results import Probes
from endprompt_megatron.jobs.preflight import Base

_GIB = 2**30


def make_probes(config: RunConfig, base: Base) -> Probes:
    """Make the questions and texts of a run's probes. All systems of the run use the same ones.

    Raises:
        DataError: the held-out text is missing or too short.
    """
    probes = config.probes

    def encode(text: str) -> list[int]:
        return base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def texts() -> Iterable[str]:
        return corpus_texts(probes.text, directory=Path(config.data.directory))

    planted = {WORD: probes.planted_words, NUMBER: probes.planted_numbers}
    facts = {task: count for task, count in planted.items() if task in probes.tasks}
    haystack_tasks = [task for task in probes.tasks if task not in planted]
    haystacks, blocks, long_texts = [], np.zeros((0, 0), dtype=np.int64), []
    if haystack_tasks:
        haystacks = make_haystacks(
            encode,
            tasks=haystack_tasks,
            lengths=probes.lengths,
            depths=probes.needle_depths,
            trials=probes.needle_trials,
            digits=probes.needle_digits,
            seed=config.seed,
            max_tokens=probes.needle_tokens,
        )
    if facts or probes.perplexity_tail:
        long_texts = make_long_texts(
            texts(),
            encode,
            length=max(probes.lengths),
            facts=facts,
            digits=probes.needle_digits,
            count=probes.long_texts,
            seed=config.seed,
        )
    if not probes.perplexity_tail:
        blocks = held_out_blocks(
            texts(),
            encode,
            block_length=max(probes.perplexity_lengths or probes.lengths),
            num_tokens=probes.perplexity_tokens,
        )
    return Probes(haystacks, blocks, probes, config.seed, long_texts)


def prefill_gib(run: ResolvedRun) -> float:
    """Return the memory in GiB that a rank needs in addition to the weights while it reads the longest context. The memory consists of keys
    and values, the widest activations of the tokens in one forward pass, and the logits that are scored. On a CPU, all numbers count as
    float32, because bf16 products are stored in float32 there. This estimate is an upper bound.
    """
    config, architecture = run.config, run.architecture
    probes, parallel = config.probes, config.parallel
    longest = max([*probes.lengths, *probes.perplexity_lengths])
    at_once = min(probes.prefill_chunk or longest, longest)
    ranks = parallel.tensor_model_parallel_size
    number = 4 if config.precision.name == "fp32" or run.accelerator == "cpu" else 2
    layers = -(-architecture.num_layers // parallel.pipeline_model_parallel_size)
    cache = 2 * layers * architecture.num_query_groups * architecture.head_dim * longest * number / ranks
    heads = architecture.num_attention_heads * architecture.head_dim
    widest = 4 * architecture.hidden_size + (3 * architecture.ffn_hidden_size + 4 * heads) / ranks
    scored = min(at_once, probes.perplexity_tail * len(probes.lengths)) if probes.perplexity_tail else 1
    logits = 2 * scored * architecture.vocab_size * 4
    return (cache + at_once * widest * number + logits) / _GIB


def check_probe_memory(run: ResolvedRun) -> None:
    """Check that the machine has enough memory to read the longest context. Does nothing if probes are disabled.

    Raises:
        ConfigError: the memory does not suffice; the message states the needed and the available memory.
    """
    config = run.config
    if not config.probes.enabled:
        return
    on_gpu = run.accelerator == "gpu"
    available = torch.cuda.mem_get_info()[1] / _GIB if on_gpu else psutil.virtual_memory().available / _GIB
    needed = prefill_gib(run) * (1 if on_gpu else max(1, config.launch.nproc_per_node or 1))
    if needed > available:
        longest = max([*config.probes.lengths, *config.probes.perplexity_lengths])
        raise ConfigError(
            f"probes.lengths={list(config.probes.lengths)}: reading {longest:,} tokens needs about {needed:.1f} GiB in addition to the "
            f"weights, and {available:.1f} GiB are free here. Leave out the longest lengths, read fewer tokens at once "
            f"(probes.prefill_chunk=1024), or set probes.enabled=false."
        )
