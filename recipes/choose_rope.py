"""Compare RoPE scalings without training: `python recipes/choose_rope.py [+experiment=NAME] [key=value ...]`.

Applies PI, NTK, YaRN and a larger theta to the base model of the experiment (or to the model in model.hf_path=DIR), evaluates each on one
long held-out text, and writes a table with a recommendation to OUTPUT_DIR_ropes/ropes.md. The page states whether the recommended scaling
needs training.
"""

from __future__ import annotations

from _entry import DEFAULT_EXPERIMENT, command_line, start, to_run_config
from omegaconf import DictConfig


def run(composed: DictConfig) -> None:
    """Run one comparison and print its lines."""
    config = to_run_config(composed)
    from endprompt_megatron.jobs.choose_rope import compare_ropes

    print("\n".join(compare_ropes(config, command=command_line())))


if __name__ == "__main__":
    start(run, "extend", DEFAULT_EXPERIMENT)
