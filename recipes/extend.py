"""Extend a model's context window: `python recipes/extend.py [+experiment=NAME] [key=value ...]`.

Composes conf/extend.yaml, checks it against the typed schema and makes one library call. Without an experiment it runs the embedded
default on a CPU. `--help` lists the groups, `--cfg job` prints the composed values.
"""

from __future__ import annotations

import sys
import warnings

import hydra
from _entry import ROOT, clear_empty_dicts, telling_errors
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from endprompt_megatron.config.schema import RunConfig, with_expanded_paths
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.launch import launcher
from endprompt_megatron.launch.processes import obey_stop_signals

DEFAULT_EXPERIMENT = "smollm2_135m_16k_cpu"


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed values as a RunConfig; a key or type that the schema does not know fails with its dotted name."""
    try:
        return with_expanded_paths(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed)))
    except OmegaConfBaseException as error:
        message = f"{error.full_key or 'config'}: {error.msg or error}. endprompt_megatron/config/schema.py explains the keys."
        raise ConfigError(message) from error


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="extend")
def run(composed: DictConfig) -> None:
    """One run, or its plan."""
    with telling_errors():
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
    obey_stop_signals()
    if not any("experiment=" in argument for argument in sys.argv[1:]):
        sys.argv.append(f"+experiment={DEFAULT_EXPERIMENT}")
    sys.argv = clear_empty_dicts(sys.argv)
    run()
