"""Check the types and ranges of the fields of config.json before their values are used. Without the check, building a model with
num_hidden_layers=10**7 would take minutes. This module needs only the standard library.

The maximum sizes are several times those of published models. The headers of the weights limit the sizes further (weights.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.checkpoint.hf.json_files import shown
from endprompt_megatron.errors import CheckpointError

MAX_LAYERS = 4096
_FLOAT32_MAX = 3.4028234663852886e38  # transformers computes the frequencies in float32
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """The allowed values of a field.

    Attributes:
        words: text of the rule, which follows "must be" in an error message.
        accepts: function (value) -> whether the value is allowed. A bool does not count as a number.
    """

    words: str
    accepts: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """Return a Kind that also allows null."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.accepts(value))


def _whole(least: int, most: int) -> Kind:
    return Kind(f"a whole number from {least:,} to {most:,}", lambda value: _is_whole(value) and least <= value <= most)


def _number(words: str, accepts: Callable[[float], bool]) -> Kind:
    # an integer beyond float's range raises OverflowError in math.isfinite
    return Kind(words, lambda value: _is_number(value) and abs(value) <= _FLOAT32_MAX and accepts(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = Kind("a string", lambda value: isinstance(value, str))
_TEXTS = Kind("a list of strings", _texts)
_SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_POSITIVE = _number("a finite number greater than 0", lambda value: value > 0)
_THETA = _number(f"a finite number greater than 1, at most {_FLOAT32_MAX:.4g}", lambda value: value > 1)
_POSITIONS = _whole(1, _INT32_MAX)
_TOKEN = _whole(-1, _INT32_MAX)  # -1 means no token in transformers
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DTYPE = Kind(f"one of {', '.join(_DTYPES)}", lambda value: isinstance(value, str) and value in _DTYPES)
_OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))

_FIELDS: dict[str, Kind] = {
    "architectures": _TEXTS.or_null(),
    "model_type": _TEXT,
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "hidden_size": _whole(1, 2**20),
    "intermediate_size": _whole(1, 2**22),
    "num_attention_heads": _whole(1, 2**14),
    "num_key_value_heads": _whole(1, 2**14).or_null(),
    "head_dim": Kind(
        "an even whole number from 2 to 4,096", lambda value: _is_whole(value) and 2 <= value <= 4096 and value % 2 == 0
    ).or_null(),
    "vocab_size": _whole(1, 2**26),
    "max_position_embeddings": _POSITIONS,
    "rms_norm_eps": _number("a finite number greater than 0, at most 1", lambda value: 0 < value <= 1),
    "rope_theta": _THETA.or_null(),
    "rope_scaling": _OBJECT.or_null(),
    "rope_parameters": _OBJECT.or_null(),
    "original_max_position_embeddings": _POSITIONS.or_null(),
    "partial_rotary_factor": _POSITIVE.or_null(),
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG.or_null(),
    "mlp_bias": _FLAG.or_null(),
    "use_sliding_window": _FLAG.or_null(),
    "sliding_window": _POSITIONS.or_null(),
    "max_window_layers": _whole(0, _INT32_MAX).or_null(),
    "layer_types": _TEXTS.or_null(),
    "is_causal": _FLAG.or_null(),
    "rope_interleaved": _FLAG.or_null(),
    "is_encoder_decoder": _FLAG.or_null(),
    "pretraining_tp": _whole(1, 2**14).or_null(),
    "hidden_act": _TEXT,
    "attention_dropout": _SHARE.or_null(),
    "initializer_range": _SHARE.or_null(),
    "use_cache": _FLAG.or_null(),
    "torch_dtype": _DTYPE.or_null(),
    "dtype": _DTYPE.or_null(),
    "bos_token_id": _TOKEN.or_null(),
    "pad_token_id": _TOKEN.or_null(),
    "eos_token_id": Kind(
        f"{_TOKEN.words}, a list of them, or null",
        lambda value: value is None or all(map(_TOKEN.accepts, value if isinstance(value, list) else [value])),
    ),
}
# fields of rope_scaling and rope_parameters
_ROPE_FIELDS: dict[str, Kind] = {
    "rope_type": _TEXT.or_null(),
    "type": _TEXT.or_null(),
    "rope_theta": _THETA.or_null(),
    "factor": _number("a finite number, at least 1 and below 2,147,483,648", lambda value: 1 <= value <= _INT32_MAX).or_null(),
    "original_max_position_embeddings": _POSITIONS.or_null(),
    "attention_factor": _POSITIVE.or_null(),
    "beta_fast": _POSITIVE.or_null(),
    "beta_slow": _POSITIVE.or_null(),
    "low_freq_factor": _POSITIVE.or_null(),
    "high_freq_factor": _POSITIVE.or_null(),
    "truncate": _FLAG,
    "finetuned": _FLAG.or_null(),
    "partial_rotary_factor": _POSITIVE.or_null(),
}
_SCALAR = Kind("a number, a string, true, false or null", lambda value: not isinstance(value, dict | list))


def check_fields(config: Mapping[str, Any], *names: str) -> None:
    """Check the types and ranges of the named fields. The model need not be supported.

    Raises:
        CheckpointError: a field has another type or is out of range. Missing fields are accepted.
    """
    _check_table({name: config[name] for name in names if name in config}, _FIELDS, "")


def check_types(config: Mapping[str, Any]) -> None:
    """Check the types and ranges of all known fields, and that the fields do not contradict each other.

    Raises:
        CheckpointError: a field has another type or is out of range, or two fields contradict each other.
    """
    _check_table(config, _FIELDS, "")
    for group in ("rope_scaling", "rope_parameters"):
        rope = config.get(group) or {}
        _check_table(rope, _ROPE_FIELDS, f"{group}.", other=_SCALAR)
        _check_rope(rope, group)
    _check_theta(config)


def _check_table(values: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str, *, other: Kind | None = None) -> None:
    for name, value in values.items():
        kind = kinds.get(name, other)
        if kind is not None and not kind.accepts(value):
            raise CheckpointError(f"config.json has {prefix}{name}={shown(value)}: must be {kind.words}. Copy it again from the model.")


def _check_rope(rope: Mapping[str, Any], group: str) -> None:
    named = {name: rope[name] for name in ("type", "rope_type") if rope.get(name) is not None}
    if len(set(named.values())) > 1:
        raise CheckpointError(
            f"config.json has {group}.type={named['type']!r} and {group}.rope_type={named['rope_type']!r}: transformers 4 reads the one, "
            f"transformers 5 the other. Keep the right one."
        )
    if not named and rope.get("factor") is not None:
        raise CheckpointError(f"config.json has {group}.factor={rope['factor']} without rope_type: copy it again from the model.")
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        raise CheckpointError(
            f"config.json has {group}.low_freq_factor={low} and {group}.high_freq_factor={high}: the first must be the smaller one "
            f"(Llama 3.1: 1 and 4). Copy it again from the model."
        )


def _check_theta(config: Mapping[str, Any]) -> None:
    inner, outer = (config.get("rope_scaling") or {}).get("rope_theta"), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise CheckpointError(
            f"config.json has rope_theta={outer} and rope_scaling.rope_theta={inner}: transformers 4 reads the one, transformers 5 the "
            f"other. Keep the right one."
        )
