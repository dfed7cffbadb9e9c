"""An optimizer step that does not update the weights if the gradient norm is rejected. Megatron's optimizers compute the norm and update
the weights in one call (optimizer/optimizer.py of megatron-core 0.16-0.19: ChainedOptimizer.step). Remove this module when upstream accepts
a predicate. Version 0.19 only has a fixed threshold (OptimizerConfig.grad_norm_skip_threshold), which does not skip NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def guarded_step(optimizer: Any, accept: Callable[[float], bool]) -> float:
    """Run one optimizer step, and update the weights only if `accept` returns True.

    Args:
        optimizer: optimizer returned by get_megatron_optimizer.
        accept: function of the gradient norm before clipping. Returns whether to update the weights. The function is called once, with the
            same norm on every rank.
    Returns:
        The gradient norm before clipping.
    """
    norm_of, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norms: list[float] = []

    def get_grad_norm(*args: Any, **kwargs: Any) -> Any:
        norm = norm_of(*args, **kwargs)
        norms.append(float(norm or 0.0))
        return norm

    def step_with_ready_grads() -> bool:
        return update() if accept(norms[-1]) else False

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
    try:
        optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads  # restores the class's methods
    return norms[-1]
