"""Plan an experiment for a cluster: `python recipes/plan.py +experiment=NAME [plan.num_gpus=64 plan.hardware=H200 plan.tokens=2e9 ...]`.

Ranks the parallel layouts by predicted time, gives the reason for each layout that cannot run, and plots EndPrompt against full-length
training by window: memory per GPU and hours. Everything is predicted, on any machine; the results are written to plan.md and plan.png.
"""

from __future__ import annotations

import shlex
import sys

from _entry import exit_on_errors, start, to_dataclass, to_run_config
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.config.cluster import ClusterConfig


def to_cluster(composed: DictConfig) -> ClusterConfig:
    """The group `plan` as a ClusterConfig; a key or type that the schema does not know fails with its dotted name."""
    return to_dataclass(composed.get("plan"), ClusterConfig, explained_in="endprompt_megatron/config/cluster.py", prefix="plan.")


def without_plan(composed: DictConfig) -> DictConfig:
    """The experiment alone, as recipes/extend.py has it."""
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "plan"])


def run(composed: DictConfig) -> None:
    """One plan."""
    with exit_on_errors():
        options = to_cluster(composed)
        from endprompt_megatron.jobs.plan import plan_cluster

        command = "python recipes/plan.py " + shlex.join(sys.argv[1:])
        overrides = [shlex.quote(argument) for argument in sys.argv[1:] if not argument.lstrip("+").startswith("plan.")]
        print("\n".join(plan_cluster(to_run_config(without_plan(composed)), options, command=command, overrides=overrides)))


if __name__ == "__main__":
    start(run, "plan", "llama3_8b_64k")
