"""Steps that would spoil the weights: a loss or gradient norm that is no finite number, or a gradient norm far above its like."""

from __future__ import annotations

import math
import statistics

WINDOW = 20
_FEWEST = 5  # norms needed before one can be called a spike


class StepGuard:
    """Judges steps by figures that are the same on every rank, so that all ranks judge alike.

    Args:
        grad_spike_factor: a norm above this many times the median of the last WINDOW good ones is a spike; 0 looks for none.
        recent_norms: gradient norms of the last good steps, oldest first; appended to in place, so that a checkpoint can carry them.
    """

    def __init__(self, grad_spike_factor: float, recent_norms: list[float]):
        self.grad_spike_factor = grad_spike_factor
        self.recent_norms = recent_norms

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None for a good one, whose norm is then remembered."""
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
