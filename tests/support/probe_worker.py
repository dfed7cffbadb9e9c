"""Runs all probes, generation and log-probabilities as one rank of a layout, and writes the results of this rank to <output>/rank<N>.json.

A job: {"worker": this module, "output": dir, "model": dir, "parallel": {...}, "prefill_chunk": n}.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.config.schema import ParallelConfig, ProbesConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.probes.long_text import make_long_texts, read_long_texts
from endprompt_megatron.evaluation.probes.needle import make_haystacks
from endprompt_megatron.evaluation.probes.perplexity import perplexity_by_window
from endprompt_megatron.evaluation.probes.results import Probes, probe_system
from endprompt_megatron.inference.generation import greedy_generate, sequence_log_probabilities
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from tests.support.tiny import architecture_of, rope_of

NEW_TOKENS = 12


def run_job(job: dict) -> None:
    """Runs the job on this rank."""
    parallel, hf_path, chunk = ParallelConfig(**job["parallel"]), Path(job["model"]), job["prefill_chunk"]
    runtime = mcore_runtime.initialize(parallel, accelerator="cpu", seed=1)
    output = Path(job["output"])
    try:
        architecture = architecture_of(hf_path)
        chunks = build_model_chunks(
            architecture, rope=rope_of(hf_path, 2.0), max_sequence_length=256, parallel=parallel, precision="fp32", backend=resolve("torch"),
            device=runtime.device,
        )  # fmt: skip
        load_hf_weights(chunks, hf_path, architecture)
        for one in chunks:
            one.eval()
        tokenizer = load_tokenizer(hf_path)
        haystacks = make_haystacks(
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tasks=["single", "multi_key", "variable_tracking"],
            lengths=[640], depths=[0.2, 0.8], trials=3, digits=5, seed=0,
        )  # fmt: skip
        prose = [" ".join(f"The owner of house {number} was seen." for number in range(300))]
        long_texts = make_long_texts(
            prose, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], length=600, facts={"word": 3, "number": 2}, digits=5,
            count=2, seed=0,
        )  # fmt: skip
        random = np.random.default_rng(0)
        blocks = random.integers(0, architecture.vocab_size, (3, 130))
        prompts = [random.integers(0, architecture.vocab_size, size).tolist() for size in (1, 21, 40)]
        common = random.integers(0, architecture.vocab_size, 30).tolist()
        requests = [(common, [5, 6, 7]), (common, [8]), (prompts[0], [9, 10]), (prompts[0], [11]), (prompts[1], [3, 4])]
        output.mkdir(parents=True, exist_ok=True)
        evaluation = ProbesConfig(lengths=[32, 64, 130], prefill_chunk=chunk)
        options = dict(prefill_chunk=chunk, device=runtime.device)
        try:
            found = {
                # one cache file a rank: all must follow rank 0, whatever they find
                "probes": [
                    probe_system(
                        "base", "test", chunks, Probes(haystacks, blocks, evaluation, 0), device=runtime.device,
                        cache=output / f"cache{runtime.rank}.json",
                    )
                    for _ in range(2)
                ],
                "long_texts": read_long_texts(chunks, long_texts, [250, 400, 600], perplexity_tail=50, label="long", **options),
                "sliding": perplexity_by_window(chunks, blocks, [32, 64, 130], stride=12, label="sliding", **options),
                "written": greedy_generate(chunks, prompts, max_new_tokens=NEW_TOKENS, stop_tokens={7}, **options),
                "log_probabilities": sequence_log_probabilities(chunks, requests, **options),
            }  # fmt: skip
        except ConfigError as error:
            found = {"refused": str(error)}
        (output / f"rank{runtime.rank}.json").write_text(json.dumps(found))
    finally:
        mcore_runtime.shut_down(keep_process_group=True)
