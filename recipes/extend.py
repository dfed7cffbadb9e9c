"""Extend a model's context window: `python recipes/extend.py [+experiment=NAME] [key=value ...]`.

Composes conf/extend.yaml, checks it against the typed schema and makes one library call. Without an experiment it runs the embedded
default on a CPU. `--help` lists the groups, `--cfg job` prints the composed values.
"""

from __future__ import annotations

import sys
import warnings

from _entry import DEFAULT_EXPERIMENT, exit_on_errors, start, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.launch import launcher
from endprompt_megatron.launch.processes import exit_on_stop_signals


def run(composed: DictConfig) -> None:
    """One run, or its plan."""
    with exit_on_errors():
        config = to_run_config(composed)
        launcher.adopt_srun_environment()
        launcher.end_with_launcher()
        if config.dry_run:
            warnings.filterwarnings("ignore", module="megatron")  # of what a laptop lacks
            from endprompt_megatron.jobs.dry_run import dry_run

            for line in dry_run(config, world_size=launcher.planned_world_size(config)):
                print(line, flush=True)
            return
        from endprompt_megatron.jobs.extend import extend, prepare

        if launcher.starts_workers(config):
            prepare(config)  # one clear error here instead of one a worker
            sys.exit(launcher.run_workers(config, sys.argv))
        extend(config)


if __name__ == "__main__":
    exit_on_stop_signals()
    start(run, "extend", DEFAULT_EXPERIMENT)
