"""Fixes for loading checkpoints into Megatron's DistributedOptimizer over torch's AdamW, which Megatron uses without Transformer Engine and
Apex. Upstream ignores that torch's AdamW stores a step count next to the moments (megatron-core 0.16-0.19, optimizer/distrib_optimizer.py).
The fixes change optimizer instances and patch no class. They can be removed when upstream loads the state that it saved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def make_loadable(optimizer: Any) -> None:
    """Prepare a Megatron optimizer that wraps torch's AdamW for loading a checkpoint.

    Without it, `state_dict()` asserts that all parameters have the same step count, but a fresh optimizer has no state yet; and
    `_set_main_param_and_optimizer_states()` looks for the step among the loaded moments.

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
    """Give every parameter its own step count; call it after `load_state_dict`. Megatron assigns one shared tensor to all parameters, and
    AdamW, which adds 1 per parameter, would count one step many times. For a fused optimizer, convert the count if AdamW wrote the
    checkpoint.

    Args:
        optimizer: from get_megatron_optimizer, after load_state_dict.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()
        else:  # FusedAdam of Transformer Engine and Apex keeps an int per group; torch's AdamW saved a tensor there
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = int(group["step"])


def _set_with_own_step(part: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group_index, group_order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group_index]["params"][group_order]
    step = part.optimizer.state[main_param]["step"]  # load_state_dict has already set it from the parameter group
    original(part, model_param, {"step": step, **tensors})
