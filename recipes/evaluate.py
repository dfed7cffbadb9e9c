"""Evaluate a model: `python recipes/evaluate.py +suite=NAME model=DIR [key=value ...]`.

Runs the tasks of a suite on the model in a Hugging Face directory, e.g. an export of recipes/extend.py. Writes results.json, every answer
(records/), and a page with the paper's numbers. The suites ruler, longbench, short and all need lm-eval (`pip install -e '.[eval]'`). The
suites needle, perplexity and ruler_offline run on Megatron-Core alone, in launch.nproc_per_node processes, or under srun or torchrun. The
same command resumes a stopped evaluation. Tasks that cannot run are listed with the reason; set HF_HUB_OFFLINE=1 where there is no network.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from _entry import ROOT, exit_on_errors, start, to_dataclass
from omegaconf import DictConfig, OmegaConf

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.launch import launcher

COMMAND = "python recipes/evaluate.py " + shlex.join(sys.argv[1:])
ARGUMENTS = list(sys.argv)
MODEL = "model="  # taken from the command line before Hydra, which would look for DIR in the group conf/model
MODELS = [text.removeprefix(MODEL) for text in sys.argv[1:] if text.startswith(MODEL)]


def to_evaluation(composed: DictConfig, model: str | None = None) -> EvaluateConfig:
    """Converts the composed values. A key or type that the schema does not have raises ConfigError with its dotted name."""
    if model is not None:
        composed.model = model
    if isinstance(composed.suite, DictConfig) and OmegaConf.is_missing(composed.suite, "name"):
        known = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "suite").glob("*.yaml")))
        raise ConfigError(f"no suite is named: add +suite=NAME, one of {known}.")
    return to_dataclass(composed, EvaluateConfig, explained_in="endprompt_megatron/evaluation/suite.py")


def run(composed: DictConfig) -> None:
    """Runs one evaluation."""
    with exit_on_errors():
        config = to_evaluation(composed, MODELS[-1] if MODELS else None)
        launcher.adopt_srun_environment()
        launcher.end_with_launcher()
        from endprompt_megatron.jobs.evaluate import evaluate, prepare

        if launcher.starts_workers(config):
            prepare(config)  # one clear error here instead of one per worker
            sys.exit(launcher.run_workers(replace(config, output_dir=str(config.directory())), ARGUMENTS))
        done = evaluate(config, command=COMMAND)
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    # lm-eval imports a package that is also called evaluate; it must not find this file instead
    sys.path = [path for path in sys.path if not (Path(path) / "evaluate.py").is_file()]
    sys.argv = [text for text in sys.argv if not text.startswith(MODEL)]
    start(run, "evaluate")
