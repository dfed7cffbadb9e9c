"""Find the changes of a configuration with which a run cannot be resumed."""

from __future__ import annotations

import json
from typing import Any

# A resumed run may change its number of steps, its intervals, its parallel layout, its kernels, its handling of bad steps and its probes.
# All other settings must stay the same, because they determine what is trained.
RESUMABLE_KEYS = (
    "dry_run",
    "control",
    "output_dir",
    "cpu_threads",
    "backend",
    "parallel",
    "trainer.max_steps",
    "trainer.micro_batch_size",
    "trainer.eval_interval",
    "trainer.eval_batches",
    "trainer.save_interval",
    "trainer.keep_last",
    "trainer.async_save",
    "trainer.log_interval",
    "trainer.bad_step",
    "trainer.max_bad_steps",
    "trainer.grad_spike_factor",
    "data.num_workers",
    "data.verify",
    "probes",
    "evaluation",  # former name of `probes`
    "export",
    "launch",
)
# Megatron's distributed optimizer stores its state in another form than the plain optimizer
FIXED_KEYS = ("parallel.use_distributed_optimizer",)


def resume_differences(stored: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the differences between two configurations that change the training.

    Args:
        stored, current: results of RunConfig.to_dict().
        defaults: RunConfig().to_dict(). A key that is missing in `stored` has its default value.
    Returns:
        (dotted key, stored value, current value) for each differing key that must not change within a run.
    """
    return _differences(stored, current, defaults, "")


def _differences(stored: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(stored.keys() | current.keys()):
        dotted = f"{prefix}{key}"
        default = defaults.get(key)
        was, now = stored.get(key, default), current.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, default if isinstance(default, dict) else {}, f"{dotted}.")
        elif not _is_resumable(dotted) and json.dumps(was, default=str) != json.dumps(now, default=str):
            found.append((dotted, was, now))
    return found


def _is_resumable(dotted: str) -> bool:
    return dotted not in FIXED_KEYS and any(dotted == key or dotted.startswith(key + ".") for key in RESUMABLE_KEYS)
