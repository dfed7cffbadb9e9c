"""Build Megatron's AdamW and learning-rate schedule from the config."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from endprompt_megatron.config.schema import OptimConfig


def build_optimizer(
    model: list[DistributedDataParallel], optim: OptimConfig, *, bf16: bool, use_distributed_optimizer: bool, overlap_param_gather: bool
) -> MegatronOptimizer:
    """Build AdamW for the wrapped model chunks. With bf16, AdamW keeps float32 master weights and moments."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, model)
    _use_fused_kernel(optimizer)
    return optimizer


def _use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """Select torch's fused AdamW kernel, which makes one pass over the moments instead of a dozen. Megatron uses torch's AdamW only without
    Transformer Engine and Apex."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def build_scheduler(
    optimizer: MegatronOptimizer, optim: OptimConfig, *, max_steps: int, global_batch_size: int, consumed_samples: int
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay. The schedule depends only on the number of consumed samples, so a resumed run
    needs no scheduler state.

    Step k (from 1) of the warm-up uses k / warmup_steps of the peak rate, so no step has a rate of zero.

    Args:
        optimizer: optimizer returned by build_optimizer.
        optim: learning rates and shape of the schedule.
        max_steps: step at which the cosine and linear schedules reach min_lr.
        global_batch_size: number of samples per step. Megatron's schedule counts samples.
        consumed_samples: number of samples that the run has already trained on.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps * global_batch_size,
        lr_decay_steps=max(max_steps, optim.warmup_steps + 1) * global_batch_size,
        lr_decay_style=optim.lr_schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max_steps * global_batch_size,
        wd_incr_style="constant",
    )
    scheduler.step(increment=consumed_samples + global_batch_size)
    return scheduler
