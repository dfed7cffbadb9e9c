"""Describe the model in a torch_dist directory: its architecture, rotary frequencies and context window, and the source of the other
Hugging Face files (tokenizer, generation config). A directory written by this project contains the description. For any other directory,
the caller names the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.torch_dist.read import find_torch_dist
from endprompt_megatron.checkpoint.training_directory import RUN_FILE
from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.errors import CheckpointError, DamagedFileError
from endprompt_megatron.output_files import read_json
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

AUXILIARY_FOLDER = "huggingface"
"""Folder in a converted directory that contains the files of the Hugging Face model except its weights."""


@dataclass(frozen=True)
class MegatronModel:
    """A torch_dist directory and the description of its model.

    Attributes:
        directory: torch_dist directory, which contains .metadata.
        base_hf_path: Hugging Face directory with config.json, tokenizer and other files.
        base_config: parsed config.json of base_hf_path.
        architecture: sizes of the model.
        rope: rotary frequencies.
        context_length: context window, in positions.
        origin: text that states the source of this description.
        provenance: description of the training, if a training run of this project wrote the directory; else None.
        adapter: settings of the low-rank adapters in the checkpoint, if a training run of this project trained adapters; else None.
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
    """Describe the model in a torch_dist directory.

    Args:
        path: see torch_dist.read.find_torch_dist.
        hf_base: Hugging Face directory of the base model; required if the directory does not describe its model.
        rope_factor, context_length: factor of linear RoPE scaling, and context window in positions, of a checkpoint from another program.
    Raises:
        CheckpointError: the model cannot be determined, or the arguments contradict the directory.
    """
    directory = find_torch_dist(path)
    auxiliary, run_file = directory / AUXILIARY_FOLDER, directory / RUN_FILE
    if (rope_factor is None) != (context_length is None) or (context_length is not None and context_length < 1):
        raise CheckpointError(
            f"--rope-factor={rope_factor} and --target-context-length={context_length} go together: the factor of the RoPE scaling, "
            f"and the context window in positions, at least 1. Give both or neither."
        )
    if (auxiliary.is_dir() or run_file.is_file()) and rope_factor is not None:
        raise CheckpointError(
            f"{directory} already describes the RoPE it was trained with: leave out --rope-factor={rope_factor} and "
            f"--target-context-length={context_length}."
        )
    if run_file.is_file():
        return _describe_training_run(directory, _read_run_file(run_file), hf_base)
    if hf_base is None and not auxiliary.is_dir():
        raise CheckpointError(
            f"{directory} does not describe its model (it contains neither {AUXILIARY_FOLDER}/ nor {RUN_FILE}): give the Hugging Face "
            f"directory of the base by --hf-base, and --rope-factor and --target-context-length if linear scaling extended its window."
        )
    base = Path(hf_base or auxiliary)
    config = read_hf_config(base)
    architecture, rope = architecture_from_hf(config), rope_from_hf(config)
    if auxiliary.is_dir():
        own = read_hf_config(auxiliary)
        if (architecture_from_hf(own), rope_from_hf(own)) != (architecture, rope):
            raise CheckpointError(f"--hf-base={hf_base} is another model than {auxiliary}, which belongs to the weights: leave it out.")
    if rope_factor is not None:
        rope = rope.stretched(rope_factor)
    return MegatronModel(
        directory,
        base,
        config,
        architecture,
        rope,
        int(context_length or round(architecture.max_position_embeddings * (rope_factor or 1))),
        f"config.json of {base}" + (f", stretched by --rope-factor={rope_factor:g}" if rope_factor is not None else ""),
    )


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path, way_out="")
        if isinstance(record["config"]["model"], dict) and isinstance(record["config"]["rope"], dict) and isinstance(record["state"], dict):
            return record
        fault = "does not have the content that was written"
    except DamagedFileError as error:
        fault = error.fault
    except (KeyError, TypeError) as error:
        fault = f"does not have the content that was written ({error!r})"
    raise CheckpointError(f"{path} {fault}. Copy the checkpoint again, or give another checkpoint of the run.")


def _describe_training_run(directory: Path, record: dict[str, Any], hf_base: Path | None) -> MegatronModel:
    run = record["config"]
    base = Path(hf_base or run["model"]["hf_path"])
    if not base.is_dir():
        raise CheckpointError(f"{directory} was trained from {base}, which does not exist: give the directory of the base by --hf-base.")
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
