"""Build models and settings with transformers. The settings of an export are also built in memory before training, so that a setting that
transformers rejects ends the run before training and not during the verification of the export.

Shapes: b batch size, s number of tokens, v vocabulary size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.auxiliary_files import check_links, exported_generation_config, extended_generation_config
from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, extended_hf_config, known_fields, read_hf_config
from endprompt_megatron.checkpoint.hf.json_files import read_json_object
from endprompt_megatron.checkpoint.hf.no_code import (
    ADAPTER_CONFIG,
    GENERATION_CONFIG,
    refuse_code,
    without_custom_generate,
    without_questions,
)
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.rope.scaling import RopeScaling

_WHOLE, _NUMBER, _FLAG = (int,), (int, float), (bool,)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams"), _WHOLE),
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _NUMBER),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), _NUMBER),
    **dict.fromkeys(("do_sample", "use_cache"), _FLAG),
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def transformers_config(config: dict[str, Any], *, origin: Path) -> Any:
    """Build the configuration object of transformers from the known fields.

    Args:
        config: parsed config.json that architecture_from_hf accepts.
        origin: directory of config.json, for error messages.
    Raises:
        CheckpointError: transformers rejects a field.
    """
    from transformers import CONFIG_MAPPING

    fields = known_fields(config)
    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except Exception as error:  # of many classes, e.g. TypeError and AttributeError for values of another type
        raise CheckpointError(
            f"{origin}: transformers refuses the fields of config.json ({type(error).__name__}: {error}). Correct them in a copy of "
            f"config.json."
        ) from error


def load_transformers_model(hf_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model directory with transformers, in evaluation mode on the CPU. Only the known fields of config.json are used.

    Raises:
        CheckpointError: the directory names code or contains an adapter, or transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM

    refuse_code(hf_path)
    if (hf_path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{hf_path} holds {ADAPTER_CONFIG}, by which transformers changes the weights: move it to another directory.")
    config = read_hf_config(hf_path)
    architecture_from_hf(config)
    built = transformers_config(config, origin=hf_path)
    try:
        with without_questions(), without_custom_generate():
            model = AutoModelForCausalLM.from_pretrained(
                hf_path,
                config=built,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:
        raise CheckpointError(f"{hf_path}: transformers cannot load this model ({type(error).__name__}: {error}).") from error
    return model.eval()


@torch.no_grad()
def transformers_logits(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits [b, s, v] of transformers at explicit positions.

    The function passes a 4-D causal mask. Without a mask, transformers treats a jump in position_ids as the boundary of a packed sequence,
    and the end prompt would not attend to the context.

    Args:
        tokens: int64 [b, s].
        positions: int64 [s].
    """
    length = tokens.shape[1]
    blocked = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
    mask = blocked[None, None].expand(tokens.shape[0], 1, length, length)
    return model(input_ids=tokens, position_ids=positions[None].expand_as(tokens), attention_mask=mask, use_cache=False).logits.float()


def check_export_settings(hf_path: Path, rope: RopeScaling, target_context_length: int) -> None:
    """Check that an export of this base will have all settings and auxiliary files, and that transformers will accept them.

    Args:
        hf_path: directory of the base.
        rope: RoPE to train with.
        target_context_length: L.
    Raises:
        CheckpointError: a file would be missing, or transformers rejects a setting.
    """
    refuse_code(hf_path)
    check_links(hf_path)
    exported = extended_hf_config(read_hf_config(hf_path), rope, target_context_length=target_context_length, dtype="float32")
    transformers_config(exported, origin=hf_path)
    path = Path(hf_path) / GENERATION_CONFIG
    if path.is_file():
        _check_generation_config(path, target_context_length)


def _check_generation_config(path: Path, target_context_length: int) -> None:
    from transformers import GenerationConfig

    values = read_json_object(path)
    way_out = f"Correct it in a copy of {GENERATION_CONFIG}, or delete that file."
    for name, value in values.items():
        if (
            name in _TYPES
            and value is not None
            and (not isinstance(value, _TYPES[name]) or isinstance(value, bool) != (_TYPES[name] == _FLAG))
        ):
            raise CheckpointError(f"{path} has {name}={str(value)[:80]!r}, which is of another type than this setting. {way_out}")
        tokens = value if isinstance(value, list) else [value]
        if name in _TOKENS and any(token is not None and type(token) is not int for token in tokens):
            raise CheckpointError(f"{path} has {name}={str(value)[:80]!r}, which is not a token id. {way_out}")
    exported = extended_generation_config(exported_generation_config(values), target_context_length)
    try:
        built = GenerationConfig.from_dict(json.loads(json.dumps(exported)))
        built.validate()
        built.to_json_string()
    except Exception as error:
        raise CheckpointError(f"{path}: transformers refuses it ({type(error).__name__}: {error}). {way_out}") from error
