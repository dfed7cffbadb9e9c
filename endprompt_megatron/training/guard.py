"""Detect bad steps before they change the weights. A step is bad if its loss or gradient norm is not finite, or if the gradient norm
spikes."""

from __future__ import annotations

import math
import statistics

WINDOW = 20
_FEWEST = 5  # number of norms that the detection of spikes needs


class StepGuard:
    """Checks the loss and the gradient norm of a step. Both are equal on every rank, so all ranks take the same decision.

    Args:
        grad_spike_factor: threshold for spikes. A norm above this factor times the median of the last WINDOW good steps is a spike; 0
            disables this check.
        recent_norms: gradient norms of the last good steps, oldest first. The guard changes this list in place. Checkpoints store it.
    """

    def __init__(self, grad_spike_factor: float, recent_norms: list[float]):
        self.grad_spike_factor = grad_spike_factor
        self.recent_norms = recent_norms

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Return a description of the fault of a step. For a good step, add its norm to `recent_norms` and return None."""
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
