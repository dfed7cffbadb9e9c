"""Trains one described job on this rank under NeMo's own loop. A job: as of layout_worker.py ("output", "model", "data", "scheme", "steps",
"parallel", "global_batch_size"), with an indexed dataset in "data"; the losses of the steps are in losses.json, and with "checkpoint": true a
NeMo checkpoint is under output."""

from __future__ import annotations

import json
from pathlib import Path

from endprompt_megatron.mcore import cpu

cpu.install_cpu_shims()

import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.lightning.pytorch.optim.lr_scheduler import WarmupPolicyScheduler  # noqa: E402

from endprompt_megatron.config.schema import MethodConfig  # noqa: E402
from endprompt_megatron.integrations.nemo.data import endprompt_data_module  # noqa: E402
from endprompt_megatron.integrations.nemo.model import EndPromptLlamaModel, endprompt_llama_config  # noqa: E402
from endprompt_megatron.integrations.window_extension import WindowExtension  # noqa: E402


class _Losses(Callback):
    """What NeMo's progress line shows as reduced_train_loss."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, *args):
        self.found.append(float(trainer.callback_metrics["reduced_train_loss"]))


def extension_of(model: str | Path, scheme: str = "endprompt") -> WindowExtension:
    """The tests' extension of a tiny model: its window of 128 stretched by 2, samples of 64 tokens."""
    return WindowExtension(str(model), target_context_length=256, seq_length=64, method=MethodConfig(position_scheme=scheme))


def indexed_prefix(data: Path) -> str:
    """Of the one indexed dataset that layout_worker.py left in its data directory."""
    (found,) = (Path(data) / "indexed").glob("*.idx")
    return str(found.with_suffix(""))


def run_job(job: dict) -> nl.Trainer:
    """Train one job on this rank."""
    unset_num_microbatches_calculator()  # of the job before, which NeMo would insist on
    extension, output, parallel = extension_of(job["model"], job["scheme"]), Path(job["output"]), job["parallel"]
    data = endprompt_data_module(
        [indexed_prefix(job["data"])],
        extension,
        micro_batch_size=2,
        global_batch_size=job.get("global_batch_size", 8),
        split="1,0,0",
        index_mapping_dir=str(output / "indices"),
        num_workers=0,
        pin_memory=False,
    )
    world_size = job.get("world_size", 1)
    losses = _Losses()
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=world_size,
        max_steps=job["steps"],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[losses],
        enable_checkpointing=False,
        logger=False,
        use_distributed_sampler=False,
        strategy=nl.MegatronStrategy(ckpt_async_save=False, pipeline_dtype=torch.float32, **parallel),
    )
    checkpoint = nl.ModelCheckpoint(save_last=True, save_top_k=0, monitor=None, every_n_train_steps=job["steps"])
    llm.train(
        EndPromptLlamaModel(endprompt_llama_config(extension)),
        data,
        trainer,
        log=nl.NeMoLogger(log_dir=str(output), name="nemo", ckpt=checkpoint if job.get("checkpoint") else None),
        optim=nl.MegatronOptimizerModule(
            OptimizerConfig(lr=1e-3, weight_decay=0.0, adam_beta2=0.95, use_distributed_optimizer=False),
            # steps at 1/2, 1, 1, ... of the peak, as layout_worker.py's warm-up of 2 steps
            lr_scheduler=WarmupPolicyScheduler(warmup_steps=1),
        ),
    )
    if trainer.global_rank == 0:
        (output / "losses.json").write_text(json.dumps(losses.found))
    return trainer
