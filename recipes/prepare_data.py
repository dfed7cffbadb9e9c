"""Download and index the texts of a run before it starts: `python recipes/prepare_data.py [+experiment=NAME] [key=value ...]`.

extend.py also prepares its texts at its start. Use this recipe to prepare them separately, for example on a login node with network access.
Prints the prefix of each indexed dataset. Another run can read the dataset as `indexed:PREFIX`.
"""

from __future__ import annotations

from pathlib import Path

from _entry import DEFAULT_EXPERIMENT, start, to_run_config
from omegaconf import DictConfig

from endprompt_megatron.checkpoint.hf.sources import ensure_base_model
from endprompt_megatron.checkpoint.hf.tokenizer import check_token_ids, hash_tokenizer, load_tokenizer
from endprompt_megatron.config.ranges import check_ranges
from endprompt_megatron.data.corpora import prepare_corpora
from endprompt_megatron.jobs.preflight import known_base


def run(composed: DictConfig) -> None:
    """Prepare the training and validation corpora of one run."""
    config = to_run_config(composed)
    check_ranges(config)
    hf_path = Path(config.model.hf_path)
    ensure_base_model(config.model.source, hf_path)
    architecture, _ = known_base(config)
    tokenizer = load_tokenizer(hf_path)
    check_token_ids(hf_path, tokenizer, num_rows=architecture.vocab_size)
    options = dict(directory=Path(config.data.directory), tokenizer=tokenizer, tokenizer_hash=hash_tokenizer(hf_path))
    check = "all" if config.data.verify else "changed"
    for sources in (config.data.train, config.data.validation):
        blend, _ = prepare_corpora(sources, **options, check=check)
        for prefix, weight in zip(blend.prefixes, blend.weights, strict=True):
            print(f"indexed:{prefix}  weight {weight:g}")


if __name__ == "__main__":
    start(run, "extend", DEFAULT_EXPERIMENT)
