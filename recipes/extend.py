"""Extend a model's context window: `python recipes/extend.py [+experiment=NAME] [key=value ...]`.

Composes conf/extend.yaml, checks the values against the typed schema and calls endprompt_megatron.jobs.extend. Without an experiment it
runs the default experiment on a CPU. `--help` lists the config groups, `--cfg job` prints the composed values.
"""

from __future__ import annotations

import sys
import warnings

from _entry import DEFAULT_EXPERIMENT, start, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.launch import launcher, processes


def run(composed: DictConfig) -> None:
    """Run the job, or print its plan with dry_run=true."""
    config = to_run_config(composed)
    launcher.adopt_srun_environment()
    launcher.end_with_launcher()
    if config.dry_run:
        warnings.filterwarnings("ignore", module="megatron")  # these warnings are about GPU packages, which a dry run does not need
        from endprompt_megatron.jobs.dry_run import dry_run

        for line in dry_run(config, world_size=launcher.planned_world_size(config)):
            print(line, flush=True)
        return
    from endprompt_megatron.jobs.extend import extend, prepare

    if launcher.starts_workers(config):
        prepare(config)  # raises here once, not in every worker
        sys.exit(launcher.run_workers(config, sys.argv))
    extend(config)


if __name__ == "__main__":
    processes.exit_on_stop_signals()
    start(run, "extend", DEFAULT_EXPERIMENT)
