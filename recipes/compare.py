"""Compare methods: `python recipes/compare.py +study=NAME [key=value ...]`.

Runs recipes/extend.py for every method and seed of the study, each in its own process, and writes one page with means, standard deviations,
paired tests, costs and figures. The same command resumes a stopped study. `write_only=true` starts no runs and writes the page from the
existing results. `collect=[outputs/a,outputs/b]` compares runs that were started by hand.
`evaluations="['base=DIR','after=DIR']" reference=base` compares results of recipes/evaluate.py for two or more models.
"""

from __future__ import annotations

import sys

from _entry import ROOT, choices, command_line, compose, start, to_dataclass, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs.compare import compare
from endprompt_megatron.jobs.preflight import resolve
from endprompt_megatron.launch.launcher import planned_world_size


def check_run(request: RunRequest) -> None:
    """Compose and validate the configuration of a run in the same way as recipes/extend.py.

    Raises:
        ConfigError: the configuration is invalid.
    """
    try:
        config = to_run_config(compose("extend", [*request.overrides, f"name={request.name}", f"seed={request.seed}"]))
        resolve(config, world_size=planned_world_size(config), runs_here=False)
    except ConfigError as error:
        raise ConfigError(f"{request.name} cannot be run: {str(error).strip()}") from error


def run(composed: DictConfig) -> None:
    """Run one study; exit with status 1 if it did not finish."""
    study = to_dataclass(composed, StudyConfig)
    command = [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "extend.py")]
    commands = [command_line(without="write_only=")]
    finished = compare(study, command=command, known_methods=choices("method"), commands=commands, check=check_run)
    if not finished and not study.write_only:
        sys.exit(1)


if __name__ == "__main__":
    start(run, "compare")
