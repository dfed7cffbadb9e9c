"""Fixes for loading checkpoints into a Megatron DistributedOptimizer that wraps torch's AdamW. Megatron uses torch's AdamW if neither
Transformer Engine nor Apex is installed. Megatron's loading code does not handle the step count that torch's AdamW stores next to the
moments (megatron-core 0.16-0.19, optimizer/distrib_optimizer.py). The fixes change optimizer instances and patch no class. Remove this
module when Megatron-Core loads the state that it saves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def make_loadable(optimizer: Any) -> None:
    """Prepare a Megatron optimizer that wraps torch's AdamW for loading a checkpoint.

    Without this function, loading fails in two places. `state_dict()` asserts that all parameters have the same step count, but a new
    optimizer has no state. `_set_main_param_and_optimizer_states()` expects the step count among the loaded moments.

    Args:
        optimizer: optimizer returned by get_megatron_optimizer.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            original = type(part)._set_main_param_and_optimizer_states
            part._set_main_param_and_optimizer_states = partial(_set_with_own_step, part, original)


def separate_steps(optimizer: Any) -> None:
    """Give every parameter its own step count. Call this function after `load_state_dict`, which assigns one shared tensor to all
    parameters. AdamW adds 1 to the count of each parameter, so it would increase a shared count several times per step. For FusedAdam of
    Transformer Engine or Apex, this function converts the step count to an int, because a checkpoint of torch's AdamW holds a tensor.

    Args:
        optimizer: optimizer returned by get_megatron_optimizer.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()
        else:  # FusedAdam stores one int per group
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = int(group["step"])


def _set_with_own_step(part: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group_index, group_order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group_index]["params"][group_order]
    step = part.optimizer.state[main_param]["step"]  # already set by load_state_dict from the parameter group
    original(part, model_param, {"step": step, **tensors})
