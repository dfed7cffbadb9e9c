"""Compare methods: `python recipes/compare.py +study=NAME [key=value ...]`.

Runs recipes/extend.py for every method and seed of the study (each in a process of its own), and writes one page with means, standard
deviations, paired tests, costs and pictures. The same command goes on where it stopped. `write_only=true` writes the page from what is
there; `collect=[outputs/a,outputs/b]` compares runs that you made yourself, `evaluations="['base=DIR','after=DIR']" reference=base`
what recipes/evaluate.py found of two or more models.
"""

from __future__ import annotations

import shlex
import sys

from _entry import ROOT, compose, exit_on_errors, start, to_dataclass, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs.compare import compare
from endprompt_megatron.jobs.preflight import resolve
from endprompt_megatron.launch.launcher import planned_world_size


def to_study(composed: DictConfig) -> StudyConfig:
    """The composed values as a StudyConfig; a key or type that the schema does not know fails with its dotted name."""
    return to_dataclass(composed, StudyConfig, explained_in="endprompt_megatron/comparison/study.py")


def check_run(request: RunRequest) -> None:
    """Compose and validate what a run would be, as recipes/extend.py will."""
    try:
        config = to_run_config(compose("extend", [*request.overrides, f"name={request.name}", f"seed={request.seed}"]))
        resolve(config, world_size=planned_world_size(config), runs_here=False)
    except ConfigError as error:
        raise ConfigError(f"{request.name} cannot be run: {str(error).strip()}") from error


def run(composed: DictConfig) -> None:
    """One study."""
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
    start(run, "compare")
