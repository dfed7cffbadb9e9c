"""Check that transformers and this package read the same values from config.json. Otherwise, transformers would load a different model from
the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from endprompt_megatron.checkpoint.hf.config import read_hf_config
from endprompt_megatron.checkpoint.hf.json_files import shown
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

_TOLERANCE = 1e-6  # relative tolerance of frequencies in float32


def load_transformers_config(hf_path: Path) -> Any:
    """Load config.json with transformers, without network access and without code of the directory.

    Raises:
        CheckpointError: transformers rejects config.json.
    """
    from transformers import AutoConfig  # slow import

    path = Path(hf_path) / "config.json"
    if read_hf_config(hf_path).get("model_type") is None:  # transformers 4 would infer it from the name of the directory
        raise CheckpointError(f"{path} lacks 'model_type', by which transformers selects the model: copy it again from the model.")
    try:
        return AutoConfig.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the class depends on the fault
        raise _unreadable(path, error) from error


def check_same_config(hf_path: Path, architecture: ModelArchitecture, rope: RopeScaling) -> None:
    """Compare the sizes and rotary frequencies that the installed transformers reads from config.json with those that this package reads.

    Args:
        hf_path: model directory, whose config.json passed architecture_from_hf.
        architecture, rope: architecture and RoPE that this package reads from config.json.
    Raises:
        CheckpointError: transformers rejects config.json, or reads another value.
    """
    path = Path(hf_path) / "config.json"
    config = load_transformers_config(hf_path)
    try:
        read = _sizes(config)
        read["rope_theta"], frequencies, factor = _rope(config)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    ours = {
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.norm_epsilon,
        "tie_word_embeddings": architecture.tied_embeddings,
        "rope_theta": rope.rope_theta,
    }
    for name, value in ours.items():
        if read[name] != value:
            raise CheckpointError(
                f"{path}: transformers reads {name}={shown(read[name])}, and this package {shown(value)}. Set {name} in a copy of it."
            )
    if frequencies is None:
        return
    expected = rope.inv_freq()
    if (
        frequencies.shape != expected.shape
        or not np.allclose(frequencies, expected, rtol=_TOLERANCE, atol=0)
        or factor != rope.attention_factor
    ):
        raise CheckpointError(
            f"{path}: transformers computes other rotary frequencies from its RoPE scaling than this package. Copy it again from the model."
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    words = " ".join(str(error).split())
    return CheckpointError(f"{path}: transformers cannot read it ({type(error).__name__}: {words[:300]}). Copy it again from the model.")


def _sizes(config: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    more = ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {name: getattr(config, name) for name in (*names, *more)} | {"head_dim": head_dim}


def _rope(config: Any) -> tuple[float, np.ndarray | None, float]:
    """Return the RoPE base, the frequencies [d / 2] and the attention factor. The frequencies are None if the base alone determines them.

    transformers 4 ignores rope_parameters. This function nevertheless returns the base in rope_parameters, which transformers 5 uses,
    because the export has top-level fields that both versions read.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = getattr(config, "rope_scaling", None) or {}
    parameters = getattr(config, "rope_parameters", None) or {**scaling, "rope_theta": config.rope_theta}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default" or not (scaling or hasattr(config, "standardize_rope_params")):
        return parameters["rope_theta"], None, 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return parameters["rope_theta"], frequencies.float().numpy(), float(factor)
