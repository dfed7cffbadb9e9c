"""Arguments that megatron.core.optimizer.get_megatron_optimizer took before 0.16, and that NeMo 2.7 (lightning/_strategy_lib.py,
setup_megatron_optimizer) still passes. Can go with support for NeMo."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from megatron.core import optimizer

from endprompt_megatron.errors import ConfigError

_NEUTRAL = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}


def accept_former_optimizer_arguments() -> None:
    """Let get_megatron_optimizer take the former arguments where they ask for nothing. No effect where it takes them by itself."""
    current = optimizer.get_megatron_optimizer
    if inspect.signature(current).parameters.keys() & _NEUTRAL.keys():
        return

    @functools.wraps(current)
    def with_former_arguments(
        *args: Any, no_weight_decay_cond: Any = None, scale_lr_cond: Any = None, lr_mult: float = 1.0, **kwargs: Any
    ) -> Any:
        given = {"no_weight_decay_cond": no_weight_decay_cond, "scale_lr_cond": scale_lr_cond, "lr_mult": lr_mult}
        asked = [f"{name}={value}" for name, value in given.items() if value != _NEUTRAL[name]]
        if asked:
            raise ConfigError(
                f"{', '.join(asked)}: the megatron-core installed has config_overrides instead, and NeMo cannot pass them. Leave "
                f"{', '.join(given)} of the optimizer module at their defaults."
            )
        return current(*args, **kwargs)

    with_former_arguments.__signature__ = inspect.signature(with_former_arguments, follow_wrapped=False)
    optimizer.get_megatron_optimizer = with_former_arguments
