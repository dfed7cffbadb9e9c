"""Evaluate a model: `python recipes/evaluate.py +suite=NAME model=DIR [key=value ...]`.

Runs the tasks of a suite on the model in a Hugging Face directory, e.g. an export of recipes/extend.py. Writes results.json, every answer
(records/), and a page with the paper's numbers. The suites ruler, longbench, short and all need lm-eval (`pip install -e '.[eval]'`). The
suites needle, perplexity and ruler_offline run on Megatron-Core alone, in launch.nproc_per_node processes, or under srun or torchrun. The
same command resumes a stopped evaluation. The page lists tasks that cannot run, with the reason. Set HF_HUB_OFFLINE=1 on a machine without
network.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import hydra
from _entry import ROOT, exit_on_errors, read_command_line, to_dataclass
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.launch import launcher

COMMAND = "python recipes/evaluate.py " + shlex.join(sys.argv[1:])
ARGUMENTS = list(sys.argv)
MODEL = "model="  # removed from the command line before Hydra reads it: Hydra would look for DIR in the group conf/model
MODELS = [text.removeprefix(MODEL) for text in sys.argv[1:] if text.startswith(MODEL)]


def to_evaluation(composed: DictConfig, model: str | None = None) -> EvaluateConfig:
    """Convert the composed values to an EvaluateConfig. An unknown key or a wrong type raises ConfigError with the key's dotted name."""
    if model is not None:
        composed.model = model
    if OmegaConf.is_missing(composed.suite, "name"):
        known = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "suite").glob("*.yaml")))
        raise ConfigError(f"no suite is named: add +suite=NAME, one of {known}.")
    return to_dataclass(composed, EvaluateConfig, explained_in="endprompt_megatron/evaluation/suite.py")


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="evaluate")
def run(composed: DictConfig) -> None:
    """Run one evaluation; exit with status 1 if a task failed."""
    with exit_on_errors():
        config = to_evaluation(composed, MODELS[-1] if MODELS else None)
        launcher.adopt_srun_environment()
        launcher.end_with_launcher()
        from endprompt_megatron.jobs.evaluate import evaluate, prepare

        if launcher.starts_workers(config):
            prepare(config)  # raises here once, not in every worker
            sys.exit(launcher.run_workers(replace(config, output_dir=str(config.directory())), ARGUMENTS))
        done = evaluate(config, command=COMMAND)
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    # lm-eval imports the package `evaluate`: remove this directory from sys.path, so that it does not import this file
    sys.path = [path for path in sys.path if not (Path(path) / "evaluate.py").is_file()]
    sys.argv = [text for text in sys.argv if not text.startswith(MODEL)]
    read_command_line()
    run()
