"""Evaluate a model: `python recipes/evaluate.py +suite=NAME model=DIR [key=value ...]`.

Runs the tasks of a suite on the model in a Hugging Face directory, e.g. an export of recipes/extend.py. Writes results.json, every answer
(to records/) and a page that also shows the numbers of the paper. The suites ruler, longbench, short and all need lm-eval, installed with
`pip install -e '.[eval]'`. The suites needle, perplexity and ruler_offline need only Megatron-Core. They run in launch.nproc_per_node
processes, or under srun or torchrun. The same command resumes a stopped evaluation. The page lists tasks that cannot run, with the reason.
Set HF_HUB_OFFLINE=1 on a machine without network.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from _entry import choices, command_line, start, to_dataclass
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.launch import launcher

COMMAND, ARGUMENTS = command_line(), list(sys.argv)
MODEL = "model="  # removed from the command line before Hydra reads it: Hydra would look for DIR in the group conf/model
MODELS = [text.removeprefix(MODEL) for text in ARGUMENTS if text.startswith(MODEL)]


def to_evaluation(composed: DictConfig, model: str | None = None) -> EvaluateConfig:
    """Convert the composed values to an EvaluateConfig.

    Args:
        composed: values that Hydra has composed.
        model: directory of the model, which replaces the value in `composed`; None keeps that value.
    Raises:
        ConfigError: no suite is chosen, or a value is invalid.
    """
    if model is not None:
        composed.model = model
    suite: Any = OmegaConf.to_container(composed)["suite"]
    if isinstance(suite, dict) and suite.get("name") == "???":
        raise ConfigError(f"no suite is named: add +suite=NAME, one of {', '.join(choices('suite'))}.")
    return to_dataclass(composed, EvaluateConfig)


def run(composed: DictConfig) -> None:
    """Run one evaluation; exit with status 1 if a task failed."""
    config = to_evaluation(composed, MODELS[-1] if MODELS else None)
    launcher.adopt_srun_environment()
    launcher.end_with_launcher()
    from endprompt_megatron.jobs.evaluate import evaluate, prepare

    if launcher.starts_workers(config):
        prepare(config)  # raises here once, not in every worker
        sys.exit(launcher.run_workers(replace(config, output_dir=str(config.directory())), ARGUMENTS))
    if not evaluate(config, command=COMMAND):
        sys.exit(1)


if __name__ == "__main__":
    # remove this directory from sys.path, so that lm-eval imports the package `evaluate` instead of this file
    sys.path = [path for path in sys.path if not (Path(path) / "evaluate.py").is_file()]
    sys.argv = [text for text in sys.argv if not text.startswith(MODEL)]
    start(run, "evaluate")
