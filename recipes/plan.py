"""Plan an experiment for a cluster: `python recipes/plan.py +experiment=NAME [plan.num_gpus=64 plan.hardware=H200 plan.tokens=2e9 ...]`.

Ranks the parallel layouts by predicted time, gives the reason for each layout that cannot run, and plots memory per GPU and hours of
EndPrompt and of full-length training by window. All values are predictions, computed without a GPU. Writes plan.md and plan.png.
"""

from __future__ import annotations

import shlex
import sys

import hydra
from _entry import ROOT, exit_on_errors, read_command_line, to_dataclass, to_run_config
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.planning.layout_search import ClusterConfig


def to_cluster(composed: DictConfig) -> ClusterConfig:
    """Convert the group `plan` to a ClusterConfig. An unknown key or a wrong type raises ConfigError with the dotted name of the key."""
    resolved = OmegaConf.create(OmegaConf.to_container(composed, resolve=True)["plan"])
    return to_dataclass(resolved, ClusterConfig, explained_in="endprompt_megatron/planning/layout_search.py", prefix="plan.")


def without_plan(composed: DictConfig) -> DictConfig:
    """Return the composed values without the group `plan`, as recipes/extend.py composes them."""
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "plan"])


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="plan")
def run(composed: DictConfig) -> None:
    """Compute one plan and print its lines."""
    with exit_on_errors():
        options = to_cluster(composed)
        from endprompt_megatron.jobs.plan import plan_cluster

        command = "python recipes/plan.py " + shlex.join(sys.argv[1:])
        overrides = [shlex.quote(argument) for argument in sys.argv[1:] if not argument.lstrip("+").startswith("plan.")]
        print("\n".join(plan_cluster(to_run_config(without_plan(composed)), options, command=command, overrides=overrides)))


if __name__ == "__main__":
    read_command_line("llama3_8b_64k")
    run()
