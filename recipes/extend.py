"""Extend a model's context window: `python recipes/extend.py [+experiment=NAME] [key=value ...]`.

Composes conf/extend.yaml, checks it against the typed schema and makes one library call. Without an experiment it runs the embedded
default on a CPU. `--help` lists the groups, `--cfg job` prints the composed values.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from endprompt_megatron.config import RunConfig  # noqa: E402
from endprompt_megatron.errors import USER_ERRORS, ConfigError  # noqa: E402

DEFAULT_EXPERIMENT = "smollm2_135m_16k_cpu"


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed values as a RunConfig; a key or type that the schema does not know fails with its dotted name."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {error.msg or error}. The keys are explained in endprompt_megatron/config.py.") from error


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="extend")
def run(composed: DictConfig) -> None:
    """One run, or its plan."""
    try:
        config = to_run_config(composed)
        if config.dry_run:
            from endprompt_megatron.preflight import plan

            world_size = int(os.environ.get("WORLD_SIZE", config.parallel.model_parallel_size))
            print("\n".join(plan(config, world_size=world_size)))
            return
        from endprompt_megatron.extend import extend

        extend(config)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if not any("experiment=" in argument for argument in sys.argv[1:]):
        sys.argv.append(f"+experiment={DEFAULT_EXPERIMENT}")
    run()
