"""RoPE scaling. The same object computes the rotary frequencies for training, the RoPE fields of config.json for export, and the
frequencies for the theory package, so they cannot differ. This module needs only numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import CheckpointError, ConfigError

FloatArray = npt.NDArray[np.float32]

# `ntk` and `abf` only change the base of the frequencies, so config.json contains the changed base and no scaling.
_HF_TYPE = {"none": "default", "pi": "linear", "ntk": "default", "abf": "default", "yarn": "yarn", "llama3": "llama3"}
SCALING_TYPES = tuple(_HF_TYPE)
_NEEDS_ORIGINAL = ("yarn", "llama3")
# Keys of the config group rope that a type reads in addition to `factor`.
_OPTIONS = {
    "ntk": ("ntk_dynamic_factor",),
    "abf": ("theta",),
    "yarn": ("beta_fast", "beta_slow"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
# Keys of transformers' rope_scaling that from_hf supports, by type. For scaled types, from_hf rejects all other keys, because they could
# change the frequencies.
_COMMON_KEYS = {"rope_type", "type", "rope_theta"}
_HF_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "truncate", "finetuned"},
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies with their scaling.

    Attributes:
        type: type of the scaling. `none` keeps the model's own frequencies. `pi` (position interpolation) divides every frequency by
            `factor`. `ntk` replaces `rope_theta` by a larger value, which keeps the highest frequency and divides the lowest by s' (see
            ntk_dynamic_factor). `abf` replaces `rope_theta` by the larger `theta`. `yarn` and `llama3` divide low frequencies by `factor`,
            keep high frequencies, and divide the frequencies between them by less than `factor`. `yarn` also sharpens attention.
        rope_theta: theta of the model's own frequencies theta^(-2i / d), also called their base.
        head_dim: d, dimension of one head, even. RoPE rotates all dimensions.
        factor: s, factor by which the window grows; 1.0 for `none`.
        original_context_length: window before the extension, in positions. `yarn` and `llama3` use it to define their frequency bands.
        theta: for `abf`, the value that replaces `rope_theta`.
        ntk_dynamic_factor: for `ntk`, f of the dynamic rule s' = f s - (f - 1), evaluated once for the target window. None selects the
            static rule s' = s. Both rules replace rope_theta by rope_theta s'^(d / (d - 2)).
        low_freq_factor, high_freq_factor: for `llama3`. Frequencies are divided if their wavelength exceeds original_context_length /
            low_freq_factor, and kept if it is below original_context_length / high_freq_factor. In between, the kept and the divided value
            are mixed.
        beta_fast, beta_slow: for `yarn`. A frequency is kept if it makes more than beta_fast rotations over the original window, and
            divided if it makes fewer than beta_slow. In between, the kept and the divided value are mixed.
        truncate: for `yarn`, whether the limits of the band between beta_slow and beta_fast are rounded outwards to whole dimensions.
        explicit_attention_factor: for `yarn`, replaces the attention factor 0.1 ln(factor) + 1.
    Source: `pi`: arXiv 2306.15595, used by EndPrompt (arXiv 2605.14589, eq. 6). `abf`: arXiv 2309.16039. `yarn` and `ntk`: YaRN (arXiv
        2309.00071). Dynamic rule of `ntk`: the training of LCEG (arXiv 2409.12181). `llama3`: the frequencies that transformers computes
        for Llama 3.1.
    """

    type: str
    rope_theta: float
    head_dim: int
    factor: float = 1.0
    original_context_length: int | None = None
    theta: float | None = None
    ntk_dynamic_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    explicit_attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.type not in SCALING_TYPES:
            raise ConfigError(f"rope.type={self.type}: choose one of {', '.join(SCALING_TYPES)}.")
        if self.type == "none" and self.factor != 1.0:
            raise ConfigError(f"rope.factor={self.factor} with rope.type=none: must be 1.0. Set rope.type=pi to extend the window.")
        if not (self.factor >= 1.0 and math.isfinite(self.factor)):
            raise ConfigError(f"rope.factor={self.factor}: must be finite and >= 1.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even and positive for rotary embedding.")
        if self.type in _NEEDS_ORIGINAL and not (self.original_context_length or 0) > 0:
            raise ConfigError(
                f"rope.original_context_length={self.original_context_length} with rope.type={self.type}: must be the window before the "
                f"extension, in positions."
            )
        if self.ntk_dynamic_factor is not None and (self.type != "ntk" or not self.ntk_dynamic_factor >= 1):
            raise ConfigError(
                f"rope.ntk_dynamic_factor={self.ntk_dynamic_factor} with rope.type={self.type}: must be >= 1, and null for "
                f"types other than ntk."
            )
        if self.type == "abf" and not (self.theta and self.rope_theta <= self.theta < math.inf):
            raise ConfigError(
                f"rope.theta={self.theta} with rope.type=abf: must be the raised base, at least the model's own rope_theta="
                f"{self.rope_theta:g}. For a factor of {self.factor:g} the static NTK rule gives {self._ntk_theta(self.factor):.4g}."
            )
        if self.type != "abf" and self.theta is not None:
            raise ConfigError(
                f"rope.theta={self.theta} with rope.type={self.type}: only rope.type=abf uses it. Set rope=abf, or rope.theta=null."
            )
        if self.type == "ntk" and self.head_dim < 4:
            raise ConfigError(f"head_dim={self.head_dim} with rope.type=ntk: must be at least 4.")
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}: 0 < low < high must hold "
                f"(Llama 3.1: 1, 4)."
            )

    @property
    def attention_factor(self) -> float:
        """Factor that multiplies cosine and sine; 1.0 unless the type is `yarn`."""
        if self.type != "yarn":
            return 1.0
        if self.explicit_attention_factor is not None:
            return float(self.explicit_attention_factor)
        return 0.1 * math.log(self.factor) + 1.0

    @property
    def effective_theta(self) -> float:
        """Base of the scaled frequencies; `rope_theta` unless the type is `ntk` or `abf`."""
        if self.type == "abf" and self.theta is not None:
            return self.theta
        if self.type != "ntk":
            return self.rope_theta
        f = self.ntk_dynamic_factor
        return self._ntk_theta(self.factor if f is None else f * self.factor - (f - 1))

    def _ntk_theta(self, stretch: float) -> float:
        return self.rope_theta * stretch ** (self.head_dim / max(1, self.head_dim - 2))

    def inv_freq(self) -> FloatArray:
        """Return the angular frequencies in radians per position, float32 [head_dim / 2], highest first.

        The computation uses the same order of operations as transformers (power, reciprocal, division by the factor), in float32 except
        for the power. At position 65,535, a difference in the last bit of a frequency changes the angle by several milliradians.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(self.head_dim)
        # The power is computed in float64 and rounded once to float32. It equals torch's float32 power except for the last bit of one value
        # in a few hundred (tests/unit/rope).
        power = np.power(np.float64(self.effective_theta), exponent.astype(np.float64)).astype(np.float32)
        own = np.float32(1.0) / power
        if self.type == "yarn":
            kept = np.float32(1.0) - self._yarn_ramp()
            divided = np.float32(1.0) / (np.float32(self.factor) * power)
            return (divided * (np.float32(1.0) - kept) + own * kept).astype(np.float32)
        if self.type == "llama3":
            return self._llama3(own)
        return (own / np.float32(self.factor)).astype(np.float32) if self.type == "pi" else own

    def unscaled_window(self, max_position_embeddings: int) -> int:
        """Return the window before this scaling, in positions, of a model whose config.json has this `max_position_embeddings`."""
        return self.original_context_length or round(max_position_embeddings / self.factor)

    def extended(self, settings: Mapping[str, Any], *, max_position_embeddings: int) -> RopeScaling:
        """Return the scaling that extends the window of a model with these frequencies. With existing_scaling=multiply, it is
        `stretched(factor)`. Otherwise it replaces this scaling, and starts from the unscaled frequencies.

        Args:
            settings: the config group rope, as a mapping.
            max_position_embeddings: value in the model's config.json.
        Raises:
            ConfigError: a setting is invalid; see also `stretched`.
        """
        kind, factor = settings["type"], settings["factor"]
        if settings.get("existing_scaling") == "multiply":
            return self.stretched(factor)
        options: dict[str, Any] = {}
        if kind in _NEEDS_ORIGINAL:
            options["original_context_length"] = self.unscaled_window(max_position_embeddings)
        for name in _OPTIONS.get(kind, ()):
            if settings.get(name) is not None:
                options[name] = settings[name]
        return RopeScaling(kind, self.rope_theta, self.head_dim, factor=factor, **options)

    def stretched(self, factor: float) -> RopeScaling:
        """Return a scaling that divides all these frequencies by a further `factor`.

        Raises:
            ConfigError: no RoPE type of config.json describes the result.
        """
        if self.type not in ("none", "pi"):
            raise ConfigError(
                f"the base model's RoPE scaling of type {self.type} (factor {self.factor:g}) cannot be multiplied by another factor: no "
                f"rope_type of config.json describes both. Set rope.existing_scaling=replace to start from the unscaled frequencies."
            )
        return RopeScaling("pi", self.rope_theta, self.head_dim, factor=self.factor * factor)

    @property
    def _native_window(self) -> int:
        assert self.original_context_length is not None  # __post_init__ checks it for yarn and llama3
        return self.original_context_length

    def _yarn_ramp(self) -> FloatArray:
        """Return one weight per frequency, float32 [head_dim / 2]. A weight of 0 keeps the frequency, a weight of 1 divides it by the
        factor."""

        original = self._native_window

        def dimension_of(rotations: float) -> float:
            per_rotation = original / (rotations * 2 * math.pi)
            return self.head_dim * math.log(per_rotation) / (2 * math.log(self.rope_theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        rising = (np.arange(self.head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        return np.clip(rising, 0, 1).astype(np.float32)

    def _llama3(self, own: FloatArray) -> FloatArray:
        original, factor = self._native_window, np.float32(self.factor)
        low, high = self.low_freq_factor, self.high_freq_factor
        longest_kept, shortest_divided = np.float32(original / high), np.float32(original / low)
        wavelength = np.float32(2 * math.pi) / own
        divided = np.where(wavelength > shortest_divided, own / factor, own)
        smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
        between = (np.float32(1.0) - smooth) * divided / factor + smooth * divided
        is_between = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
        return np.where(is_between, between, divided).astype(np.float32)

    def to_hf(self) -> dict[str, Any]:
        """Return the RoPE fields of config.json: `rope_theta`, and `rope_scaling` (None for `none`, `ntk` and `abf`).

        `rope_theta` is a top-level field, and the type is stored under both `rope_type` and `type`. transformers 4.57 ignores
        `rope_parameters`: for a config with only that field, it uses theta 10000 without scaling.
        """
        scaling: dict[str, Any] = {}
        hf_type = _HF_TYPE[self.type]
        if hf_type != "default":
            scaling = {"rope_type": hf_type, "type": hf_type, "factor": float(self.factor)}
        if self.type in _NEEDS_ORIGINAL:
            scaling["original_max_position_embeddings"] = int(self._native_window)
        if self.type == "llama3":
            scaling |= {"low_freq_factor": float(self.low_freq_factor), "high_freq_factor": float(self.high_freq_factor)}
        if self.type == "yarn":
            scaling |= {"beta_fast": float(self.beta_fast), "beta_slow": float(self.beta_slow), "attention_factor": self.attention_factor}
            scaling |= {} if self.truncate else {"truncate": False}
        return {"rope_theta": _as_int_if_whole(self.effective_theta), "rope_scaling": scaling or None}

    @staticmethod
    def from_hf(config: dict[str, Any], *, head_dim: int) -> RopeScaling:
        """Read the scaling from a config.json of transformers 4.x or 5.x.

        Args:
            config: the parsed config.json.
            head_dim: d, dimension of one head of the model.
        Raises:
            CheckpointError: the RoPE type or a key is unsupported, a required key is missing, or two descriptions contradict each other.
        """
        new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
        if not (isinstance(new, dict) and isinstance(old, dict)):
            raise CheckpointError(f"config.json has rope_scaling={old or new!r}: copy it again from the model.")
        if "rope_theta" in config and config["rope_theta"] is None and "rope_theta" not in new:
            raise CheckpointError("config.json has rope_theta=null: copy it again from the model.")
        described = {**({"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}), **old}
        kinds = {scaling.get("rope_type", scaling.get("type")) for scaling in (new, old) if scaling} - {None}
        differing = [key for key, value in described.items() if key not in ("type", "rope_type") and new.get(key, value) != value]
        if new and (len(kinds) > 1 or differing):
            raise CheckpointError(
                f"config.json has two different RoPE descriptions: {described}, rope_parameters={new}. Keep the right one."
            )
        scaling = old or new
        theta = float({**new, **described}.get("rope_theta", 10000.0))
        hf_type = scaling.get("rope_type", scaling.get("type", "default"))
        if hf_type not in _HF_KEYS:
            raise CheckpointError(
                f"config.json has RoPE scaling of type {str(hf_type)[:40]!r}: supported are {', '.join(_HF_KEYS)}. Start from the "
                f"unscaled base model, or remove rope_scaling from a copy of the config if you mean to drop it."
            )
        unsupported = sorted(key for key in scaling.keys() - _HF_KEYS[hf_type] - _COMMON_KEYS if not _has_no_effect(key, scaling[key]))
        if unsupported and hf_type != "default":
            raise CheckpointError(
                f"config.json has {unsupported[0]}={scaling[unsupported[0]]!r} in its RoPE scaling of type '{hf_type}'. "
                f"Supported keys: {', '.join(sorted(_HF_KEYS[hf_type]))}."
            )
        if "partial_rotary_factor" in unsupported:
            raise CheckpointError(f"config.json has partial_rotary_factor={scaling['partial_rotary_factor']!r}: only 1.0 is supported.")
        if hf_type == "default":
            return RopeScaling("none", theta, head_dim)
        for key in sorted(_HF_KEYS["llama3"] if hf_type == "llama3" else {"factor"}):
            if scaling.get(key) is None:
                raise CheckpointError(f"config.json has {hf_type} RoPE scaling without {key}: copy it again from the model.")
        factor = float(scaling["factor"])
        if hf_type == "linear":
            return RopeScaling("pi", theta, head_dim, factor=factor)
        inner, outer = scaling.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
        if inner and outer and inner != outer:
            raise CheckpointError(f"config.json has original_max_position_embeddings={outer}, and {inner} in its RoPE scaling. Keep one.")
        original = int(inner or outer or config["max_position_embeddings"])
        if hf_type == "llama3":
            bands: dict[str, Any] = {key: float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor")}
            return RopeScaling("llama3", theta, head_dim, factor=factor, original_context_length=original, **bands)
        return RopeScaling(
            "yarn",
            theta,
            head_dim,
            factor=factor,
            original_context_length=original,
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            truncate=bool(scaling.get("truncate", True)),
            explicit_attention_factor=scaling.get("attention_factor"),
        )


def _has_no_effect(key: str, value: Any) -> bool:
    return value is None or (key == "partial_rotary_factor" and value == 1.0)


def _as_int_if_whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
