"""Which RoPE scaling, and is training needed at all? `python recipes/choose_rope.py [+experiment=NAME] [key=value ...]`.

Applies PI, NTK, YaRN and a raised theta to the untrained base of the experiment (or to yours: model.hf_path=DIR), reads one long held-out
text with each and writes a table with a recommendation to OUTPUT_DIR_ropes/ropes.md. Nothing is trained.
"""

from __future__ import annotations

import shlex
import sys

from _entry import DEFAULT_EXPERIMENT, exit_on_errors, start, to_run_config
from omegaconf import DictConfig


def run(composed: DictConfig) -> None:
    """One comparison."""
    with exit_on_errors():
        config = to_run_config(composed)
        from endprompt_megatron.jobs.choose_rope import compare_ropes

        print("\n".join(compare_ropes(config, command="python recipes/choose_rope.py " + shlex.join(sys.argv[1:]))))


if __name__ == "__main__":
    start(run, "extend", DEFAULT_EXPERIMENT)
