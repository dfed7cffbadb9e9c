"""What a torch_dist directory is the model of: its architecture, its frequencies, its window and where the rest of the Hugging Face model
(tokenizer, generation config) comes from. The directory says so itself where this project wrote it; else a base has to be named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.torch_dist.read import find_torch_dist
from endprompt_megatron.checkpoint.training_directory import RUN_FILE
from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

COMPANIONS = "huggingface"
"""Folder of a converted directory that holds the files of the Hugging Face model but for its weights."""


@dataclass(frozen=True)
class MegatronModel:
    """A torch_dist directory and what it means.

    Attributes:
        directory: with .metadata in it.
        base_hf_path: where config.json, tokenizer and so on come from.
        base_config: that config.json, parsed.
        architecture: numbers of the model.
        rope: its frequencies.
        context_length: its window, in positions.
        origin: how that is known, in words.
        provenance: how the model was made, where a training run of ours made it; else None.
        adapter: the low-rank adapters that stand beside its weights, where a training run of ours trained some; else None.
    """

    directory: Path
    base_hf_path: Path
    base_config: dict[str, Any]
    architecture: ModelArchitecture
    rope: RopeScaling
    context_length: int
    origin: str
    provenance: dict[str, Any] | None = None
    adapter: AdapterConfig | None = None


def describe_megatron_model(
    path: Path, *, hf_base: Path | None = None, rope_factor: float | None = None, context_length: int | None = None
) -> MegatronModel:
    """Find out what a directory is the model of.

    Args:
        path: as torch_dist.find_torch_dist takes it.
        hf_base: Hugging Face directory of the base; needed where the directory does not say.
        rope_factor, context_length: linear RoPE scaling that a directory of somebody else's was trained with, and its window.
    Raises:
        CheckpointError: it cannot be known, or what is given contradicts what the directory says.
    """
    directory = find_torch_dist(path)
    companions, run_file = directory / COMPANIONS, directory / RUN_FILE
    if (rope_factor is None) != (context_length is None) or (context_length is not None and context_length < 1):
        raise CheckpointError(
            f"--rope-factor={rope_factor} and --target-context-length={context_length} go together: how far the window was stretched, and "
            f"its positions, at least 1."
        )
    if (companions.is_dir() or run_file.is_file()) and rope_factor is not None:
        raise CheckpointError(
            f"{directory} says itself which RoPE it was trained with: leave out --rope-factor={rope_factor} and "
            f"--target-context-length={context_length}."
        )
    if run_file.is_file():
        return _of_training_run(directory, json.loads(run_file.read_text()), hf_base)
    if hf_base is None and not companions.is_dir():
        raise CheckpointError(
            f"{directory} does not say which model it is (neither {COMPANIONS}/ nor {RUN_FILE} in it): name the Hugging Face directory of "
            f"the base by --hf-base, and --rope-factor and --target-context-length if its window was extended by linear scaling."
        )
    base = Path(hf_base or companions)
    config = read_hf_config(base)
    architecture, rope = architecture_from_hf(config), rope_from_hf(config)
    if companions.is_dir():
        own = read_hf_config(companions)
        if (architecture_from_hf(own), rope_from_hf(own)) != (architecture, rope):
            raise CheckpointError(f"--hf-base={hf_base} is another model than {companions}, which the weights came with: leave it out.")
    if rope_factor is not None:
        rope = rope.stretched(rope_factor)
    return MegatronModel(
        directory,
        base,
        config,
        architecture,
        rope,
        int(context_length or round(architecture.max_position_embeddings * (rope_factor or 1))),
        f"config.json of {base}" + (f", stretched by {rope_factor:g} as told" if rope_factor is not None else ""),
    )


def _of_training_run(directory: Path, record: dict[str, Any], hf_base: Path | None) -> MegatronModel:
    run = record["config"]
    base = Path(hf_base or run["model"]["hf_path"])
    if not base.is_dir():
        raise CheckpointError(f"{directory} was trained from {base}, which is not there: name the base's directory by --hf-base.")
    config = read_hf_config(base)
    architecture = architecture_from_hf(config)
    return MegatronModel(
        directory,
        base,
        config,
        architecture,
        rope_from_hf(config).extended(run["rope"], max_position_embeddings=architecture.max_position_embeddings),
        int(run["rope"]["target_context_length"]),
        f"{RUN_FILE} of the training run",
        {**record.get("provenance", {}), "steps": record["state"]["step"], "tokens": record["state"]["tokens"]},
        AdapterConfig(**run["adapter"]) if run.get("adapter", {}).get("type", "none") != "none" else None,
    )
