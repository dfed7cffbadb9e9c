"""config.json of a Hugging Face model: read into the numbers of an architecture, refused where a field means maths that the Megatron
model does not do, and written for the extended model. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.model.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# Fields whose other values change the maths: name -> values that are understood. A field that is absent means the first.
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
}


def read_hf_config(hf_path: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises:
        CheckpointError: no directory, no config.json, or not JSON.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{hf_path}: no config.json there. model.hf_path must be a Hugging Face model directory "
            f"(config.json, *.safetensors, tokenizer files), for example one made by `huggingface-cli download MODEL --local-dir DIR`."
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy it again from the model.") from error
    return config


def architecture_from_hf(config: dict[str, Any]) -> ModelArchitecture:
    """The numbers of a Llama-family config.json.

    Raises:
        CheckpointError: another architecture, a missing field, or a value that changes the maths.
    """
    found = config.get("architectures") or ["(none named)"]
    if found[0] not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"config.json names the architecture {found[0]}: supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    for name, understood in _UNDERSTOOD.items():
        if name in config and config[name] not in understood:
            raise CheckpointError(
                f"config.json has {name}={config[name]!r}, which changes the maths: only {understood[0]!r} is supported."
            )
    try:
        heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        architecture = ModelArchitecture(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden_size // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            rope_theta=0.0,
            norm_epsilon=float(config["rms_norm_eps"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}: copy it again from the model.") from error
    rope = RopeScaling.from_hf(config, head_dim=architecture.head_dim)
    return ModelArchitecture(**{**architecture.__dict__, "rope_theta": rope.rope_theta})


def extended_hf_config(base: dict[str, Any], rope: RopeScaling, *, target_context_length: int, dtype: str) -> dict[str, Any]:
    """config.json of the extended model: the base's, with its window and its RoPE fields replaced.

    `rope_parameters` of transformers 5 is dropped: 4.57 ignores it silently, and 5.x reads the top-level fields.

    Args:
        base: the base's parsed config.json.
        rope: what the model was trained with.
        target_context_length: L, becomes max_position_embeddings.
        dtype: name of the weights' type, e.g. "bfloat16".
    """
    config = {key: value for key, value in base.items() if key not in ("rope_parameters", "_name_or_path", "dtype")}
    config.update(rope.to_hf())
    config["max_position_embeddings"] = int(target_context_length)
    config["torch_dtype"] = dtype
    return config
