"""Make megatron.core.optimizer.get_megatron_optimizer accept arguments that were removed in megatron-core 0.16. NeMo 2.7 still passes them
(lightning/_strategy_lib.py, setup_megatron_optimizer). Remove this module together with the NeMo integration."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from megatron.core import optimizer

from endprompt_megatron.errors import ConfigError

_NEUTRAL = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}


def accept_legacy_optimizer_arguments() -> None:
    """Make get_megatron_optimizer accept the legacy arguments at their default values. If it already accepts them, do nothing. Other values
    raise ConfigError when get_megatron_optimizer is called."""
    current = optimizer.get_megatron_optimizer
    if inspect.signature(current).parameters.keys() & _NEUTRAL.keys():
        return

    @functools.wraps(current)
    def with_legacy_arguments(
        *args: Any, no_weight_decay_cond: Any = None, scale_lr_cond: Any = None, lr_mult: float = 1.0, **kwargs: Any
    ) -> Any:
        given = {"no_weight_decay_cond": no_weight_decay_cond, "scale_lr_cond": scale_lr_cond, "lr_mult": lr_mult}
        changed = [f"{name}={value}" for name, value in given.items() if value != _NEUTRAL[name]]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: the installed megatron-core has config_overrides instead, which NeMo cannot pass. Leave "
                f"{', '.join(given)} of the optimizer module at their defaults."
            )
        return current(*args, **kwargs)

    signature = inspect.signature(with_legacy_arguments, follow_wrapped=False)
    with_legacy_arguments.__signature__ = signature  # type: ignore[attr-defined] # inspect.signature reads this attribute
    optimizer.get_megatron_optimizer = with_legacy_arguments
