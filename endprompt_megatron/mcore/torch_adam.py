"""Megatron's DistributedOptimizer over torch's AdamW, which it falls back to without Transformer Engine and Apex: loading a checkpoint
forgets that torch keeps a step count beside the moments (megatron-core 0.16-0.19, optimizer/distrib_optimizer.py). The mends act on
the optimizer at hand and patch no class; they can go when upstream loads what it saved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def make_loadable(optimizer: Any) -> None:
    """Make a Megatron optimizer ready to load a checkpoint, if torch's AdamW is inside.

    `state_dict()` asserts one step count over a state that a fresh optimizer does not have yet, and
    `_set_main_param_and_optimizer_states()` looks the step up among the loaded moments.

    Args:
        optimizer: from get_megatron_optimizer.
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
    """After `load_state_dict`: give every parameter a step count of its own. Megatron hands one tensor to all, and AdamW, which adds 1
    for each parameter, would count a step as many times as there are parameters. A fused optimizer gets the count in its own form, if
    AdamW wrote the checkpoint.

    Args:
        optimizer: from get_megatron_optimizer, just loaded.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()
        else:  # FusedAdam of Transformer Engine or Apex counts in its groups, in whole numbers; torch's AdamW saved a tensor there
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = int(group["step"])


def _set_with_own_step(part: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group_index, group_order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group_index]["params"][group_order]
    step = part.optimizer.state[main_param]["step"]  # load_state_dict has set it already, from the parameter group
    original(part, model_param, {"step": step, **tensors})
