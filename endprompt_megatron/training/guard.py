"""Detects bad steps before they change the weights: a loss or gradient norm that is not finite, or a spike of the gradient norm."""

from __future__ import annotations

import math
import statistics

WINDOW = 20
_FEWEST = 5  # norms needed before a spike can be detected


class StepGuard:
    """Checks steps by loss and gradient norm, which are equal on every rank, so that all ranks decide alike.

    Args:
        grad_spike_factor: a norm above this many times the median of the last WINDOW good steps is a spike; 0 disables the check.
        recent_norms: gradient norms of the last good steps, oldest first. The guard appends to the list in place; checkpoints store it.
    """

    def __init__(self, grad_spike_factor: float, recent_norms: list[float]):
        self.grad_spike_factor = grad_spike_factor
        self.recent_norms = recent_norms

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """A description of the fault of a step, or None for a good step, whose norm is then added to `recent_norms`."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"its gradient norm is {grad_norm}"
        if self.grad_spike_factor and len(self.recent_norms) >= _FEWEST:
            median = statistics.median(self.recent_norms)
            if grad_norm > self.grad_spike_factor * median:
                return (
                    f"its gradient norm {grad_norm:.4g} is more than trainer.grad_spike_factor={self.grad_spike_factor:g} times "
                    f"{median:.4g}, the median of the last {len(self.recent_norms)} steps"
                )
        self.recent_norms.append(grad_norm)
        del self.recent_norms[:-WINDOW]
        return None
