"""Convert config.json of a Hugging Face model into an architecture, reject fields that the Megatron model does not implement, and create
config.json of the converted or extended model. A table lists the supported families. This module needs only the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.config_schema import check_fields, check_types
from endprompt_megatron.checkpoint.hf.json_files import read_json_object, shown
from endprompt_megatron.errors import CheckpointError, ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


@dataclass(frozen=True)
class Family:
    """Models that share one architecture of transformers.

    Attributes:
        architecture: name of the architecture in config.json.
        model_type: model_type in config.json, from which transformers selects its classes.
        models: names of the models.
        supported: {field that changes the computation: supported values}, in addition to the fields of all families. Other values are
            rejected.
        absent: {field: value that transformers uses if config.json lacks the field}, for fields whose default is not the first supported
            value.
        default_head_dim: head dimension if config.json has no head_dim; None means hidden_size / num_attention_heads.
        may_have_null_head_dim: whether transformers treats head_dim=null like a missing head_dim.
        qkv_bias, qk_norm: see ModelArchitecture.
    """

    architecture: str
    model_type: str
    models: str
    supported: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)
    default_head_dim: int | None = None
    may_have_null_head_dim: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False


_COMMON_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
    "is_causal": (True, None),
    "tie_word_embeddings": (False, True),
    "attention_bias": (False, None),  # this flag also adds a bias to the output projection
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
}
_QWEN = {"use_sliding_window": (False, None)}  # with these values, sliding_window and max_window_layers have no effect

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2"),
        Family("MistralForCausalLM", "mistral", "Mistral v0.2 and later", {"sliding_window": (None,)}, absent={"sliding_window": 4096}),
        Family("Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", _QWEN, may_have_null_head_dim=False, qkv_bias=True),
        Family("Qwen3ForCausalLM", "qwen3", "Qwen3", _QWEN, default_head_dim=128, may_have_null_head_dim=False, qk_norm=True),
    )
}

_SHAPE_FIELDS = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
}  # fmt: skip
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
# fields that do not change the forward pass; they describe training, generation or the program that wrote the file
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "torchscript", "problem_type", "id2label", "label2id",
    "name_or_path", "task_specific_params", "transformers.js_config", "is_llama_config", "tokenizer_class",
    "max_window_layers", "finetuning_task", "prefix", "neftune_noise_alpha",
}  # fmt: skip
# replaced by top-level fields with names that all versions of transformers read
_REPLACED = ("rope_parameters", "original_max_position_embeddings", "_name_or_path", "dtype")
# fields that select how a program runs the model; they are neither passed to transformers nor exported
_RUNTIME = {"attn_implementation", "experts_implementation", "custom_generate", "trust_remote_code"}
_KERNELS = ("attn_implementation", "experts_implementation")
_LAYERS = {"full_attention"}


def read_hf_config(hf_path: Path) -> dict[str, Any]:
    """Read config.json of a model directory.

    Raises:
        CheckpointError: config.json does not exist, or is not a JSON object (see read_json_object).
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{hf_path}: no config.json in this directory. model.hf_path must be a Hugging Face model directory "
            f"(config.json, *.safetensors, tokenizer files), for example one made by `huggingface-cli download MODEL --local-dir DIR`."
        )
    return read_json_object(path)


def check_names_no_code(config: dict[str, Any], *, file: str = "config.json") -> None:
    """Check that a JSON file of a model directory names neither code nor a kernel that transformers would load.

    Raises:
        CheckpointError: the file names code or a kernel.
    """
    if config.get("auto_map"):
        raise CheckpointError(
            f"{file} has auto_map={str(config['auto_map'])[:80]}, names of Python code in the model's directory: code of a model is "
            f"never run here (trust_remote_code=False). If the model works without it, delete auto_map from a copy of {file}."
        )
    if config.get("configuration_files"):
        raise CheckpointError(
            f"{file} has configuration_files={str(config['configuration_files'])[:80]}, by which transformers reads another file instead: "
            f"delete it from a copy of {file}."
        )
    for name in (*_KERNELS, *(f"_{name}" for name in _KERNELS), *(f"_{name}_internal" for name in _KERNELS)):
        if "/" in str(config.get(name, "")):
            raise CheckpointError(
                f"{file} has {name}={str(config[name])[:80]!r}, the name of a kernel to download and run: only this package's own "
                f"attention is used. Delete {name} from a copy of {file}."
            )


def architecture_from_hf(config: dict[str, Any]) -> ModelArchitecture:
    """Convert config.json into an architecture.

    Raises:
        CheckpointError: the architecture is unknown, a field is missing, has another type or is out of range, or a field that changes the
            computation has an unsupported value.
    """
    check_fields(config, "architectures")
    named = config.get("architectures") or ["(none named)"]
    if named[0] not in FAMILIES:
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise CheckpointError(f"config.json has the architecture {shown(named[0])[1:-1]}: supported are {known}.")
    family = FAMILIES[named[0]]
    check_types(config)
    if config.get("model_type", family.model_type) != family.model_type:
        raise CheckpointError(
            f"config.json has the architecture {family.architecture} but model_type={shown(config['model_type'])}, by which transformers "
            f"selects the model: they are different models. Copy it again from the model."
        )
    check_names_no_code(config)
    _check_fields(config, family)
    try:
        return _read_architecture(config, family)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}: copy it again from the model.") from error
    except ConfigError as error:  # RopeScaling uses the field names of the config group rope
        raise CheckpointError(f"config.json describes a RoPE that is not supported ({error}): copy it again from the model.") from error


def _read_architecture(config: dict[str, Any], family: Family) -> ModelArchitecture:
    heads, head_dim = config["num_attention_heads"], _head_dim(config, family)
    key_value_heads = _key_value_heads(config, family, heads)
    if heads % key_value_heads:
        raise CheckpointError(
            f"config.json has num_key_value_heads={key_value_heads}: must divide num_attention_heads={heads}. Copy it again from the model."
        )
    return ModelArchitecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=key_value_heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_theta=RopeScaling.from_hf(config, head_dim=head_dim).rope_theta,
        norm_epsilon=float(config["rms_norm_eps"]),
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def window_from_hf(config: dict[str, Any]) -> int:
    """Return the context window of a model of any family, in positions.

    Raises:
        CheckpointError: max_position_embeddings is missing, or is not a whole number in range.
    """
    check_fields(config, "max_position_embeddings")
    if "max_position_embeddings" not in config:
        raise CheckpointError("config.json lacks 'max_position_embeddings', the window of the model: copy it again from the model.")
    return int(config["max_position_embeddings"])


def rope_from_hf(config: dict[str, Any]) -> RopeScaling:
    """Return the rotary frequencies of config.json.

    Raises:
        CheckpointError: see architecture_from_hf.
    """
    return RopeScaling.from_hf(config, head_dim=architecture_from_hf(config).head_dim)


def _key_value_heads(config: dict[str, Any], family: Family, heads: int) -> int:
    if "num_key_value_heads" not in config and family.architecture != "LlamaForCausalLM":
        raise KeyError("num_key_value_heads")  # transformers has a fixed default for these families
    return int(config.get("num_key_value_heads") or heads)


def _head_dim(config: dict[str, Any], family: Family) -> int:
    given, hidden_size, heads = config.get("head_dim"), config["hidden_size"], config["num_attention_heads"]
    if given is not None:
        return int(given)
    if "head_dim" in config and not family.may_have_null_head_dim:
        raise CheckpointError(
            f"config.json has head_dim=null, which transformers does not read for {family.architecture}: remove the field, or copy "
            f"config.json again from the model."
        )
    if family.default_head_dim is not None:
        return family.default_head_dim
    if hidden_size % (2 * heads):
        raise CheckpointError(
            f"config.json has hidden_size={hidden_size} and no head_dim: must be a multiple of 2*num_attention_heads={2 * heads} (RoPE "
            f"rotates pairs). Copy it again from the model."
        )
    return int(hidden_size // heads)


def _check_fields(config: dict[str, Any], family: Family) -> None:
    supported = {**_COMMON_FIELDS, **family.supported}
    for name, values in supported.items():
        value = config.get(name, family.absent.get(name, values[0]))
        if value not in values:
            default = "" if name in config else f" (config.json lacks it, and transformers defaults to {value!r})"
            way_out = ""
            if name == "sliding_window":
                way_out = (
                    " Mistral v0.1 uses sliding-window attention: use v0.2 or later, or, if the model was trained without it (v0.3 and "
                    'most finetunes of v0.2), set "sliding_window": null in a copy of config.json.'
                )
            raise CheckpointError(
                f"config.json has {name}={shown(value)}{default}, which changes the computation: only {values[0]!r} is supported for "
                f"{family.architecture}.{way_out}"
            )
    other_layers = sorted(set(config.get("layer_types") or ()) - _LAYERS)
    if other_layers:
        raise CheckpointError(f"config.json has layers of type {shown(other_layers[0])} in layer_types: only full_attention is supported.")
    layer_types, num_layers = config.get("layer_types"), config.get("num_hidden_layers")
    if layer_types is not None and len(layer_types) != num_layers:
        raise CheckpointError(
            f"config.json has {len(layer_types)} layer_types, but num_hidden_layers={num_layers}. Copy it again from the model."
        )
    known = _known_fields(family)
    for name, value in config.items():
        if name in known or name in _RUNTIME or name.startswith(("_", "unsloth_")) or value is None or value is False:
            continue
        raise CheckpointError(
            f"config.json has {shown(name)[1:-1]}={shown(value)}, an unknown field for {family.architecture} that may change the "
            f"computation. If you know that it changes nothing, delete it from a copy of config.json."
        )


def _known_fields(family: Family) -> set[str]:
    return _SHAPE_FIELDS | _ROPE_FIELDS | _HARMLESS | _COMMON_FIELDS.keys() | family.supported.keys() | {"layer_types", "sliding_window"}


def known_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return model_type and the fields of a checked config.json whose meaning is known. Other fields (private fields of transformers,
    `_RUNTIME`, unknown fields without a value) may change how transformers behaves, so they are neither passed to transformers nor
    exported."""
    family = FAMILIES[config["architectures"][0]]
    known = _known_fields(family)
    return {**{key: value for key, value in config.items() if key in known}, "model_type": family.model_type}


def extended_hf_config(base: dict[str, Any], rope: RopeScaling, *, target_context_length: int, dtype: str) -> dict[str, Any]:
    """Return config.json of the exported model: the known fields of the base, with the new context window and RoPE fields.

    `rope_parameters` of transformers 5 is dropped, because 4.57 silently ignores it and 5.x also reads the top-level fields.

    Args:
        base: parsed config.json of the base, which architecture_from_hf accepts.
        rope: RoPE of the trained model.
        target_context_length: L, the new max_position_embeddings.
        dtype: name of the weights' dtype, e.g. "bfloat16".
    """
    config = {key: value for key, value in known_fields(base).items() if key not in _REPLACED}
    config.update(rope.to_hf())
    config["max_position_embeddings"] = int(target_context_length)
    config["torch_dtype"] = dtype
    return config
