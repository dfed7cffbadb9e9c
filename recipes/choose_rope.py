"""Compare RoPE scalings without training: `python recipes/choose_rope.py [+experiment=NAME] [key=value ...]`.

Applies PI, NTK, YaRN and a larger theta to the base model of the experiment (or to the model in model.hf_path=DIR), evaluates each on one
long held-out text, and writes a table with a recommendation to OUTPUT_DIR_ropes/ropes.md. The page states
whether the recommended scaling needs training.
"""

from __future__ import annotations

import shlex
import sys

import hydra
from _entry import DEFAULT_EXPERIMENT, ROOT, exit_on_errors, read_command_line, to_run_config
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="extend")
def run(composed: DictConfig) -> None:
    """Run one comparison and print its lines."""
    with exit_on_errors():
        config = to_run_config(composed)
        from endprompt_megatron.jobs.choose_rope import compare_ropes

        print("\n".join(compare_ropes(config, command="python recipes/choose_rope.py " + shlex.join(sys.argv[1:]))))


if __name__ == "__main__":
    read_command_line(DEFAULT_EXPERIMENT)
    run()
