"""Evaluate a model: `python recipes/evaluate.py +suite=NAME model=DIR [key=value ...]`.

Asks the model that lies in a Hugging Face directory (any export of recipes/extend.py) the tasks of a suite, and writes results.json, every
answer (records/) and a page with the paper's columns. Suites ruler, longbench, short and all have lm-eval underneath (`pip install -e
'.[eval]'`); needle, perplexity and probes run on Megatron-Core alone, in as many processes as launch.nproc_per_node says, or under srun or
torchrun. The same command goes on where it stopped. Tasks that cannot run are named with the reason; HF_HUB_OFFLINE=1 says beforehand that
there is no network.
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
MODEL = "model="  # conf/model is a group of recipes/extend.py: Hydra would look for DIR among its files
MODELS = [text.removeprefix(MODEL) for text in sys.argv[1:] if text.startswith(MODEL)]


def to_evaluation(composed: DictConfig, model: str | None = None) -> EvaluateConfig:
    """The composed values as an EvaluateConfig; a key or type that the schema does not know fails with its dotted name."""
    if model is not None:
        composed.model = model
    if OmegaConf.is_missing(composed.suite, "name"):
        known = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "suite").glob("*.yaml")))
        raise ConfigError(f"no suite is named: add +suite=NAME, one of {known}.")
    return to_dataclass(composed, EvaluateConfig, explained_in="endprompt_megatron/evaluation/suite.py")


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="evaluate")
def run(composed: DictConfig) -> None:
    """One evaluation."""
    with exit_on_errors():
        config = to_evaluation(composed, MODELS[-1] if MODELS else None)
        launcher.adopt_srun_environment()
        launcher.end_with_launcher()
        from endprompt_megatron.jobs.evaluate import evaluate, prepare

        if launcher.starts_workers(config):
            prepare(config)  # one clear error here instead of one a worker
            sys.exit(launcher.run_workers(replace(config, output_dir=str(config.directory())), ARGUMENTS))
        done = evaluate(config, command=COMMAND)
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    # the harness imports a package that is called evaluate too: this folder must not be searched for it
    sys.path = [path for path in sys.path if not (Path(path) / "evaluate.py").is_file()]
    sys.argv = [text for text in sys.argv if not text.startswith(MODEL)]
    read_command_line()
    run()
