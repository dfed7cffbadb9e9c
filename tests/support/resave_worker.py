"""Loads a torch_dist directory in a given layout and saves it again, both with Megatron's code.

A job: {"worker": this module, "source": torch_dist directory, "hf": Hugging Face directory of the model, "output": directory to write,
"parallel": {...}, "precision": name}.
"""

from __future__ import annotations

from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.training import load_torch_dist
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.mcore.checkpointing import begin_save
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks


def run_job(job: dict) -> None:
    """Load and save once. Collective over the ranks of the job."""
    parallel = ParallelConfig(**job["parallel"])
    runtime = mcore_runtime.initialize(parallel, accelerator="cpu", seed=1)
    try:
        config = read_hf_config(Path(job["hf"]))
        architecture = architecture_from_hf(config)
        chunks = build_model_chunks(
            architecture,
            rope=rope_from_hf(config),
            max_sequence_length=architecture.max_position_embeddings,
            parallel=parallel,
            precision=job["precision"],
            backend=resolve("torch"),
            device=runtime.device,
        )
        for chunk in chunks:  # NaN exposes weights that are not loaded
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        load_torch_dist(chunks, Path(job["source"]))
        if runtime.rank == 0:
            Path(job["output"]).mkdir(parents=True)
        if runtime.world_size > 1:
            torch.distributed.barrier()
        begin_save({f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, job["output"], asynchronous=False)
    finally:
        mcore_runtime.shut_down(keep_process_group=True)
