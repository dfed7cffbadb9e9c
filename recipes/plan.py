"""Plan an experiment for a cluster: `python recipes/plan.py +experiment=NAME [plan.num_gpus=64 plan.hardware=H200 plan.tokens=2e9 ...]`.

Ranks the parallel layouts by predicted time, states the reason for each layout that cannot run, and plots the memory per GPU and the hours
of EndPrompt and of full-length training by window. All values are predictions, computed without a GPU. Writes plan.md and plan.png.
"""

from __future__ import annotations

import shlex
import sys

from _entry import command_line, start, to_dataclass, to_run_config
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.schema import RunConfig


def to_configs(composed: DictConfig) -> tuple[RunConfig, ClusterConfig]:
    """Convert the group `plan` to a ClusterConfig, and the other values, which are those of recipes/extend.py, to a RunConfig."""
    options = to_dataclass(composed, ClusterConfig, group="plan")
    return to_run_config(OmegaConf.masked_copy(composed, [key for key in composed if key != "plan"])), options


def run(composed: DictConfig) -> None:
    """Compute one plan and print its lines."""
    config, options = to_configs(composed)
    from endprompt_megatron.jobs.plan import plan_cluster

    overrides = [shlex.quote(argument) for argument in sys.argv[1:] if not argument.lstrip("+").startswith("plan.")]
    print("\n".join(plan_cluster(config, options, command=command_line(), overrides=overrides)))


if __name__ == "__main__":
    start(run, "plan", "llama3_8b_64k")
