"""Extend a model's context window: `python recipes/extend.py [+experiment=NAME] [key=value ...]`.

Composes conf/extend.yaml, checks the values against the typed schema and calls endprompt_megatron.jobs.extend. Without an experiment it
runs the default experiment on a CPU. `--help` lists the config groups, `--cfg job` prints the composed values.
"""

from __future__ import annotations

import sys
import warnings

import hydra
from _entry import DEFAULT_EXPERIMENT, ROOT, exit_on_errors, read_command_line, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.launch import launcher
from endprompt_megatron.launch.processes import exit_on_stop_signals


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="extend")
def run(composed: DictConfig) -> None:
    """Run the job, or print its plan with dry_run=true."""
    with exit_on_errors():
        config = to_run_config(composed)
        launcher.adopt_srun_environment()
        launcher.end_with_launcher()
        if config.dry_run:
            warnings.filterwarnings("ignore", module="megatron")  # about GPU packages, which a dry run does not need
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
    exit_on_stop_signals()
    read_command_line(DEFAULT_EXPERIMENT)
    run()
