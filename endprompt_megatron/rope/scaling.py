"""What a position means: one object makes the rotary frequencies for training, the RoPE fields of config.json for export and the
numbers for theory, so that these cannot differ. Plain numbers in, numpy out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import CheckpointError, ConfigError

FloatArray = npt.NDArray[np.float32]

_HF_TYPE = {"none": "default", "pi": "linear"}
SCALING_TYPES = tuple(_HF_TYPE)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies and how they are stretched.

    Attributes:
        type: `none` (the model's own) or `pi` (position interpolation: positions are divided by `factor`).
        rope_theta: the base of the frequencies.
        head_dim: d, dimensions of one head that are rotated (all of them); even.
        factor: s = target_context_length / original_context_length; 1.0 for `none`.
    Source: EndPrompt (arXiv 2605.14589), eq. 6; position interpolation (arXiv 2306.15595).
    """

    type: str
    rope_theta: float
    head_dim: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in SCALING_TYPES:
            raise ConfigError(f"rope.type={self.type}: choose one of {', '.join(SCALING_TYPES)}.")
        if self.type == "none" and self.factor != 1.0:
            raise ConfigError(f"rope.factor={self.factor} with rope.type=none: it must be 1.0. Set rope.type=pi to stretch.")
        if self.factor < 1.0:
            raise ConfigError(f"rope.factor={self.factor}: a window is stretched by a factor >= 1.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: rotary embedding needs an even, positive number of dimensions.")

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied with; 1.0 unless a scaling says otherwise."""
        return 1.0

    def inv_freq(self) -> FloatArray:
        """Angular frequencies in radians a position, float32 [head_dim / 2], highest first.

        Computed in float32 in the order of transformers' own code (power, reciprocal, division by the factor): at position 65,535 a
        frequency that differs in its last bit turns a head by several milliradians.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(self.head_dim)
        # rounded once from float64: equals torch's float32 power but for a last bit in a few hundred (tests/unit/rope)
        power = np.power(np.float64(self.rope_theta), exponent.astype(np.float64)).astype(np.float32)
        own = np.float32(1.0) / power
        return (own / np.float32(self.factor)).astype(np.float32)

    def to_hf(self) -> dict[str, Any]:
        """The RoPE fields of config.json: top-level `rope_theta`, and `rope_scaling` (None for `none`).

        Top level and both spellings of the type, because a config that holds only `rope_parameters` is read by transformers 4.57 as
        theta 10000 without scaling.
        """
        scaling = None
        if self.type != "none":
            hf_type = _HF_TYPE[self.type]
            scaling = {"rope_type": hf_type, "type": hf_type, "factor": float(self.factor)}
        return {"rope_theta": _as_int_if_whole(self.rope_theta), "rope_scaling": scaling}

    @staticmethod
    def from_hf(config: dict[str, Any], *, head_dim: int) -> RopeScaling:
        """The scaling that a config.json describes, in the form of transformers 4.x or 5.x.

        Args:
            config: the parsed config.json.
            head_dim: d of the model.
        Raises:
            CheckpointError: a RoPE type that is not supported.
        """
        parameters = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or parameters
        theta = float(config.get("rope_theta", parameters.get("rope_theta", scaling.get("rope_theta", 10000.0))))
        hf_type = scaling.get("rope_type", scaling.get("type", "default"))
        if hf_type == "default":
            return RopeScaling("none", theta, head_dim)
        if hf_type == "linear" and "factor" not in scaling:
            raise CheckpointError("config.json has linear RoPE scaling without a factor: copy it again from the model.")
        if hf_type == "linear":
            return RopeScaling("pi", theta, head_dim, factor=float(scaling["factor"]))
        raise CheckpointError(
            f"config.json has RoPE scaling of type '{hf_type}': supported are default and linear. Start from the model's unscaled "
            f"base, or remove rope_scaling from a copy of the config if you mean to drop it."
        )


def _as_int_if_whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
