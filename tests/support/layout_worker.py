"""Trains one described job on this rank, from a Hugging Face directory to metrics and checkpoints, through the library's own parts.

A job: {"output": dir, "model": dir, "data": dir, "scheme": name, "steps": n, "parallel": {...}, "trainer": {...}}; optionally "adapter": {...},
"attention_groups": m of S2-attention, "seq_length": S, "export": true, "accelerator": "gpu", "backend": "te". What it trained is in its
metrics.jsonl, and in hf/ and adapter/ where it exports; a job whose output holds a checkpoint resumes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.exporter import export_hf
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.peft_adapter import export_peft_adapter
from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.checkpoint.hf.verify import verify_export
from endprompt_megatron.config.schema import (
    AdapterConfig,
    DataConfig,
    LaunchConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.data.corpora import prepare_corpora
from endprompt_megatron.data.dataset import TokenizerFacts, build_datasets
from endprompt_megatron.data.prompts import tokenize_end_prompts
from endprompt_megatron.mcore import runtime as mcore_runtime
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.positions import scheme as position_schemes
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.training.signals import StopRequests
from endprompt_megatron.training.trainer import Trainer


def _scattered(layout: position_schemes.SampleLayout, seed: int, sample_index: int) -> np.ndarray:
    """Test-only positions that differ by sample: a sorted random subset of the window, the last position included."""
    total = layout.num_context_tokens + layout.num_prompt_tokens
    random = np.random.default_rng([seed, 99, sample_index])
    inner = random.choice(layout.target_context_length - 1, size=total - 1, replace=False)
    return np.append(np.sort(inner), layout.target_context_length - 1).astype(np.int64)


_SCATTERED = position_schemes.PositionScheme("scattered", uses_end_prompt=True, varies_by_sample=True, place=_scattered)


def run_job(job: dict, prepare: Callable[[Trainer], None] = lambda trainer: None) -> Trainer:
    """Train one job on this rank.

    Args:
        job: as above.
        prepare: called with the trainer before it trains, e.g. to inject a fault.
    """
    if job["scheme"] == "scattered":  # not at import: tests of the schemes list those that there are
        position_schemes.SCHEMES["scattered"] = _SCATTERED
    parallel = ParallelConfig(**job["parallel"])
    architecture = architecture_from_hf(read_hf_config(Path(job["model"])))
    target = 2 * architecture.max_position_embeddings
    source = TextSource(path="package:tiny/train")
    groups, seq_length = job.get("attention_groups"), job.get("seq_length", 64)
    config = RunConfig(
        name="layouts",
        output_dir=job["output"],
        model=ModelConfig("tiny", job["model"]),
        method=MethodConfig(
            position_scheme=job["scheme"],
            end_prompts=["EP_1", "EP_3"] if job["scheme"] == "scattered" else ["EP_1"],
            attention="s2" if groups else "full",
            attention_groups=groups or 4,
        ),
        adapter=AdapterConfig(**job.get("adapter", {})),
        rope=RopeConfig("pi", 2.0, target),
        parallel=parallel,
        precision=PrecisionConfig(job.get("precision", "fp32")),
        data=DataConfig(job["data"], seq_length, [source]),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        launch=LaunchConfig(hang_timeout_minutes=job.get("hang_timeout_minutes", 5.0)),
        trainer=TrainerConfig(
            job["steps"], 2, job.get("global_batch_size", 8), eval_batches=0, **({"keep_last": 0} | job.get("trainer", {}))
        ),
    )
    accelerator = job.get("accelerator", "cpu")
    runtime = mcore_runtime.initialize(parallel, accelerator=accelerator, seed=config.seed)
    try:
        tokenizer, tokenizer_hash = load_tokenizer(Path(job["model"])), hash_tokenizer(Path(job["model"]))
        blend, _ = prepare_corpora([source], directory=Path(job["data"]), tokenizer=tokenizer, tokenizer_hash=tokenizer_hash)
        rope = RopeScaling("pi", architecture.rope_theta, architecture.head_dim, factor=2.0)
        chunks = build_model_chunks(
            architecture,
            rope=rope,
            max_sequence_length=target,
            parallel=parallel,
            precision=config.precision.name,
            backend=resolve(job.get("backend", "torch"), accelerator=accelerator, precision=config.precision.name),
            device=runtime.device,
            adapter=config.adapter,
            attention_groups=groups,
            seed=config.seed,
        )
        load_hf_weights(chunks, Path(job["model"]), architecture)
        train_dataset, _ = build_datasets(
            blend,
            None,
            split="1,0,0",
            seq_length=seq_length,
            num_train_samples=400,
            num_validation_samples=0,
            seed=config.seed,
            tokenizer=TokenizerFacts(architecture.vocab_size, tokenizer.eos_token_id, tokenizer_hash),
            cache_dir=Path(job["data"]) / "indices",
            position_scheme=config.method.position_scheme,
            target_context_length=target,
            end_prompts=tokenize_end_prompts(
                config.method.end_prompts, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
            ),
            end_prompt_loss_weight=0.1,
        )
        Path(job["output"]).mkdir(parents=True, exist_ok=True)
        with StopRequests() as stop:
            trainer = Trainer(
                config,
                runtime,
                chunks,
                train_dataset=train_dataset,
                validation_dataset=None,
                output_dir=Path(job["output"]),
                stop=stop,
            )
            prepare(trainer)
            trainer.train()
            if job.get("export"):
                _export(job, chunks, architecture, rope, target, config.adapter)
            return trainer
    finally:
        mcore_runtime.shut_down(keep_process_group=True)


def _export(job: dict, chunks: list, architecture, rope: RopeScaling, target: int, adapter: AdapterConfig) -> None:
    base, output = Path(job["model"]), Path(job["output"])
    exported = export_hf(
        chunks,
        output / "hf",
        base_hf_path=base,
        architecture=architecture,
        rope=rope,
        target_context_length=target,
        max_shard_bytes=2**30,
        provenance={},
    )
    verify_export(chunks, exported, architecture=architecture, rope=rope, target_context_length=target)
    export_peft_adapter(chunks, output / "adapter", base_hf_path=base, architecture=architecture, adapter=adapter)
