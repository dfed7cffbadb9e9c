"""What a position means: one object makes the rotary frequencies for training, the RoPE fields of config.json for export and the
numbers for theory, so that these cannot differ. Plain numbers in, numpy out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from endprompt_megatron.errors import CheckpointError, ConfigError

FloatArray = npt.NDArray[np.float32]

# ntk and abf are another base of the frequencies and nothing else, so config.json names that base
_HF_TYPE = {"none": "default", "pi": "linear", "ntk": "default", "abf": "default", "yarn": "yarn", "llama3": "llama3"}
SCALING_TYPES = tuple(_HF_TYPE)
_NEEDS_ORIGINAL = ("yarn", "llama3")
# keys of the config group rope that a type reads beside its factor
_OPTIONS = {
    "ntk": ("ntk_dynamic_factor",),
    "abf": ("theta",),
    "yarn": ("beta_fast", "beta_slow"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
# keys of transformers' rope_scaling that from_hf understands, by type; another key would change the frequencies unseen
_COMMON_KEYS = {"rope_type", "type", "rope_theta"}
_HF_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "truncate", "finetuned"},
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies and how they are stretched.

    Attributes:
        type: `none` (the model's own), `pi` (position interpolation: every frequency is divided by `factor`), `ntk` (a larger base: the
            lowest frequency is divided by `factor`, the highest kept), `abf` (a larger base that is given), `yarn` (low frequencies are
            divided, high ones kept, and attention is sharpened), `llama3` (as Llama 3.1: low frequencies divided, high ones kept).
        rope_theta: the base of the frequencies.
        head_dim: d, dimensions of one head that are rotated (all of them); even.
        factor: s, how far positions are stretched; 1.0 for `none`.
        original_context_length: window before the stretch, in positions; `yarn` and `llama3` cut their frequency bands by it.
        theta: `abf`: the base in the place of `rope_theta`.
        ntk_dynamic_factor: `ntk`: f of the dynamic rule, which makes s' = f s - (f - 1) of a window of s L_original and is pinned there;
            None is the static rule, s' = s. The base becomes theta s'^(d / (d - 2)).
        low_freq_factor, high_freq_factor: `llama3`: wavelengths above original / low are divided, below original / high kept.
        beta_fast, beta_slow: `yarn`: rotations over the original window above which a frequency is kept, below which it is divided.
        truncate: `yarn`: whether the ends of the band between are rounded outwards to whole dimensions.
        explicit_attention_factor: `yarn`: instead of 0.1 ln(factor) + 1.
    Source: position interpolation (arXiv 2306.15595), which EndPrompt uses (arXiv 2605.14589, eq. 6); a raised base
    (arXiv 2309.16039); YaRN (arXiv 2309.00071), which tells NTK too; the dynamic rule as LCEG (arXiv 2409.12181) trains with it;
    the frequencies of Llama 3.1 as transformers computes them.
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
            raise ConfigError(f"rope.factor={self.factor} with rope.type=none: it must be 1.0. Set rope.type=pi to stretch.")
        if not (self.factor >= 1.0 and math.isfinite(self.factor)):
            raise ConfigError(f"rope.factor={self.factor}: a window is stretched by a finite factor >= 1.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: rotary embedding needs an even, positive number of dimensions.")
        if self.type in _NEEDS_ORIGINAL and not (self.original_context_length or 0) > 0:
            raise ConfigError(
                f"rope.original_context_length={self.original_context_length} with rope.type={self.type}: must be the window before the "
                f"stretch, in positions."
            )
        if self.ntk_dynamic_factor is not None and (self.type != "ntk" or not self.ntk_dynamic_factor >= 1):
            raise ConfigError(f"rope.ntk_dynamic_factor={self.ntk_dynamic_factor} with rope.type={self.type}: for ntk alone, and >= 1.")
        if self.type == "abf" and not (self.theta and self.rope_theta <= self.theta < math.inf):
            raise ConfigError(
                f"rope.theta={self.theta} with rope.type=abf: must be the raised base, at least the model's own rope_theta="
                f"{self.rope_theta:g}. A stretch by {self.factor:g} with the static NTK rule has {self._ntk_theta(self.factor):.4g}."
            )
        if self.type != "abf" and self.theta is not None:
            raise ConfigError(f"rope.theta={self.theta} with rope.type={self.type}: for abf alone. Set rope=abf, or rope.theta=null.")
        if self.type == "ntk" and self.head_dim < 4:
            raise ConfigError(f"head_dim={self.head_dim} with rope.type=ntk: at least 4 dimensions are needed.")
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}: 0 < low < high is needed "
                f"(Llama 3.1: 1, 4)."
            )

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied with; 1.0 unless the scaling is `yarn`."""
        if self.type != "yarn":
            return 1.0
        if self.explicit_attention_factor is not None:
            return float(self.explicit_attention_factor)
        return 0.1 * math.log(self.factor) + 1.0

    @property
    def effective_theta(self) -> float:
        """The base that the frequencies are computed from; `rope_theta` unless the scaling is `ntk` or `abf`."""
        if self.type == "abf":
            return self.theta
        if self.type != "ntk":
            return self.rope_theta
        f = self.ntk_dynamic_factor
        return self._ntk_theta(self.factor if f is None else f * self.factor - (f - 1))

    def _ntk_theta(self, stretch: float) -> float:
        return self.rope_theta * stretch ** (self.head_dim / max(1, self.head_dim - 2))

    def inv_freq(self) -> FloatArray:
        """Angular frequencies in radians a position, float32 [head_dim / 2], highest first.

        Computed in float32 in the order of transformers' own code (power, reciprocal, division by the factor): at position 65,535 a
        frequency that differs in its last bit turns a head by several milliradians.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(self.head_dim)
        # rounded once from float64: equals torch's float32 power but for a last bit in a few hundred (tests/unit/rope)
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
        """The window before this stretch, in positions, of a model whose config.json says `max_position_embeddings`."""
        return self.original_context_length or round(max_position_embeddings / self.factor)

    def extended(self, settings: Mapping[str, Any], *, max_position_embeddings: int) -> RopeScaling:
        """What a model with these frequencies is extended with.

        Args:
            settings: the config group rope, as a mapping.
            max_position_embeddings: of the model.
        Raises:
            ConfigError: as stretched.
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
        """These frequencies, all divided by a further `factor`.

        Raises:
            ConfigError: the result is none of the types that config.json can name.
        """
        if self.type not in ("none", "pi"):
            raise ConfigError(
                f"the base's RoPE scaling of type {self.type} (factor {self.factor:g}) cannot be multiplied by another factor: no "
                f"rope_type of config.json means both. Set rope.existing_scaling=replace to start from the unscaled frequencies."
            )
        return RopeScaling("pi", self.rope_theta, self.head_dim, factor=self.factor * factor)

    def _yarn_ramp(self) -> FloatArray:
        """0 where a frequency is kept, 1 where it is divided, [head_dim / 2]."""

        def dimension_of(rotations: float) -> float:
            per_rotation = self.original_context_length / (rotations * 2 * math.pi)
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
        original, factor = self.original_context_length, np.float32(self.factor)
        low, high = self.low_freq_factor, self.high_freq_factor
        longest_kept, shortest_divided = np.float32(original / high), np.float32(original / low)
        wavelength = np.float32(2 * math.pi) / own
        divided = np.where(wavelength > shortest_divided, own / factor, own)
        smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
        between = (np.float32(1.0) - smooth) * divided / factor + smooth * divided
        is_between = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
        return np.where(is_between, between, divided).astype(np.float32)

    def to_hf(self) -> dict[str, Any]:
        """The RoPE fields of config.json: top-level `rope_theta`, and `rope_scaling` (None for `none`).

        Top level and both spellings of the type, because a config that holds only `rope_parameters` is read by transformers 4.57 as
        theta 10000 without scaling.
        """
        scaling: dict[str, Any] | None = None
        hf_type = _HF_TYPE[self.type]
        if hf_type != "default":
            scaling = {"rope_type": hf_type, "type": hf_type, "factor": float(self.factor)}
        if self.type in _NEEDS_ORIGINAL:
            scaling["original_max_position_embeddings"] = int(self.original_context_length)
        if self.type == "llama3":
            scaling |= {"low_freq_factor": float(self.low_freq_factor), "high_freq_factor": float(self.high_freq_factor)}
        if self.type == "yarn":
            scaling |= {"beta_fast": float(self.beta_fast), "beta_slow": float(self.beta_slow), "attention_factor": self.attention_factor}
            scaling |= {} if self.truncate else {"truncate": False}
        return {"rope_theta": _as_int_if_whole(self.effective_theta), "rope_scaling": scaling}

    @staticmethod
    def from_hf(config: dict[str, Any], *, head_dim: int) -> RopeScaling:
        """The scaling that a config.json describes, in the form of transformers 4.x or 5.x.

        Args:
            config: the parsed config.json.
            head_dim: d of the model.
        Raises:
            CheckpointError: a RoPE type or a key of it that is not supported, or two descriptions that contradict each other.
        """
        new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
        if not (isinstance(new, dict) and isinstance(old, dict)):
            raise CheckpointError(f"config.json has rope_scaling={old or new!r}: copy it again from the model.")
        if "rope_theta" in config and config["rope_theta"] is None and "rope_theta" not in new:
            raise CheckpointError("config.json has rope_theta=null: copy it again from the model.")
        told = {**({"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}), **old}
        kinds = {scaling.get("rope_type", scaling.get("type")) for scaling in (new, old) if scaling} - {None}
        differing = [key for key, value in told.items() if key not in ("type", "rope_type") and new.get(key, value) != value]
        if new and (len(kinds) > 1 or differing):
            raise CheckpointError(
                f"config.json describes its RoPE twice and differently: {told}, rope_parameters={new}. Keep the right one."
            )
        scaling = old or new
        theta = float(told.get("rope_theta", new.get("rope_theta", 10000.0)))
        hf_type = scaling.get("rope_type", scaling.get("type", "default"))
        if hf_type not in _HF_KEYS:
            raise CheckpointError(
                f"config.json has RoPE scaling of type '{hf_type}': supported are {', '.join(_HF_KEYS)}. Start from the model's unscaled "
                f"base, or remove rope_scaling from a copy of the config if you mean to drop it."
            )
        strange = sorted(key for key in scaling.keys() - _HF_KEYS[hf_type] - _COMMON_KEYS if not _means_nothing(key, scaling[key]))
        if strange and hf_type != "default":
            raise CheckpointError(
                f"config.json has {strange[0]}={scaling[strange[0]]!r} in its RoPE scaling of type '{hf_type}', which is not understood: "
                f"supported are {', '.join(sorted(_HF_KEYS[hf_type]))}."
            )
        if "partial_rotary_factor" in strange:
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
            raise CheckpointError(f"config.json says original_max_position_embeddings={outer} and, in its RoPE scaling, {inner}. Keep one.")
        original = int(inner or outer or config["max_position_embeddings"])
        if hf_type == "llama3":
            bands = {key: float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor")}
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


def _means_nothing(key: str, value: Any) -> bool:
    return value is None or (key == "partial_rotary_factor" and value == 1.0)


def _as_int_if_whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
