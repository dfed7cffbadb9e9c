"""Compare methods: `python recipes/compare.py +study=NAME [key=value ...]`.

Runs recipes/extend.py for every method and seed of the study, each in its own process, and writes one page with means, standard deviations,
paired tests, costs and figures. The same command resumes a stopped study. `write_only=true` starts no runs and writes the page from the
results that exist. `collect=[outputs/a,outputs/b]` compares runs that were started by hand, and
`evaluations="['base=DIR','after=DIR']" reference=base` compares results of recipes/evaluate.py for two or more models.
"""

from __future__ import annotations

import shlex
import sys

import hydra
from _entry import ROOT, clear_empty_dicts, exit_on_errors, read_command_line, refuse_former_names, to_dataclass, to_run_config
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs.compare import compare
from endprompt_megatron.jobs.preflight import resolve
from endprompt_megatron.launch.launcher import planned_world_size


def to_study(composed: DictConfig) -> StudyConfig:
    """Convert the composed values to a StudyConfig. An unknown key or a wrong type raises ConfigError with the dotted name of the key."""
    return to_dataclass(composed, StudyConfig, explained_in="endprompt_megatron/comparison/study.py")


def check_run(request: RunRequest) -> None:
    """Compose and validate the configuration of a run as recipes/extend.py does. Raises ConfigError if the run is invalid."""
    GlobalHydra.instance().clear()
    try:
        refuse_former_names(request.overrides)
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            overrides = [*clear_empty_dicts(request.overrides), f"name={request.name}", f"seed={request.seed}"]
            composed = hydra.compose("extend", overrides=overrides)
        config = to_run_config(composed)
        resolve(config, world_size=planned_world_size(config), runs_here=False)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{request.name} cannot be run: {str(error).strip()}") from error


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="compare")
def run(composed: DictConfig) -> None:
    """Run one study; exit with status 1 if it did not finish."""
    with exit_on_errors():
        study = to_study(composed)
        finished = compare(
            study,
            command=[sys.executable, "-W", "ignore", str(ROOT / "recipes" / "extend.py")],
            known_methods=tuple(sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))),
            commands=["python recipes/compare.py " + shlex.join(text for text in sys.argv[1:] if not text.startswith("write_only="))],
            check=check_run,
        )
    if not finished and not study.write_only:
        sys.exit(1)


if __name__ == "__main__":
    read_command_line()
    run()
