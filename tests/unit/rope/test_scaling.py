"""RoPE frequencies against transformers' LlamaRotaryEmbedding, and their way into and out of config.json."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.errors import CheckpointError, ConfigError
from endprompt_megatron.rope.scaling import RopeScaling


def transformers_rotary(rope: RopeScaling) -> LlamaRotaryEmbedding:
    config = LlamaConfig(hidden_size=4 * rope.head_dim, num_attention_heads=4, head_dim=rope.head_dim, **rope.to_hf())
    return LlamaRotaryEmbedding(config=config)


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1e6, 500000.5])
@pytest.mark.parametrize("dim", [2, 16, 64, 80, 128])
@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("pi", 2.0), ("pi", 3.0), ("pi", 8.0), ("pi", 1.5)])
def test_frequencies_equal_transformers(theta, dim, kind, factor):
    rope = RopeScaling(kind, theta, dim, factor=factor)
    theirs = transformers_rotary(rope)
    assert rope.inv_freq().dtype == np.float32 and rope.inv_freq().shape == (dim // 2,)
    np.testing.assert_allclose(rope.inv_freq(), theirs.inv_freq.numpy(), rtol=1e-6, atol=0)
    assert rope.attention_factor == theirs.attention_scaling


@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 16), (100000.0, 64), (500000.0, 128)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_frequencies_of_the_models_in_conf_equal_transformers_bit_for_bit(theta, dim, factor):
    rope = RopeScaling("pi", theta, dim, factor=factor)
    np.testing.assert_array_equal(rope.inv_freq(), transformers_rotary(rope).inv_freq.numpy())


def test_hand_worked_frequencies():
    np.testing.assert_allclose(RopeScaling("none", 10000.0, 4).inv_freq(), [1.0, 0.01], rtol=1e-7)
    np.testing.assert_allclose(RopeScaling("pi", 10000.0, 4, factor=4.0).inv_freq(), [0.25, 0.0025], rtol=1e-7)


@given(theta=st.floats(100, 1e8), dim=st.integers(1, 128).map(lambda half: 2 * half), factor=st.floats(1, 1000))
def test_interpolation_divides_positions(theta, dim, factor):
    """Eq. 6: position p under PI is position p / s under the model's own frequencies."""
    own = RopeScaling("none", theta, dim).inv_freq().astype(np.float64)
    stretched = RopeScaling("pi", theta, dim, factor=factor).inv_freq().astype(np.float64)
    np.testing.assert_allclose(stretched * factor, own, rtol=1e-6)
    assert own[0] == 1.0 and (np.diff(own) < 0).all(), "highest first"


@given(
    kind_and_factor=st.one_of(st.just(("none", 1.0)), st.tuples(st.just("pi"), st.floats(1, 1000))),
    theta=st.one_of(st.integers(2, 10**8).map(float), st.floats(100, 1e8)),
    dim=st.integers(1, 128).map(lambda half: 2 * half),
)
def test_to_hf_and_back(kind_and_factor, theta, dim):
    kind, factor = kind_and_factor
    rope = RopeScaling(kind, theta, dim, factor=factor)
    assert RopeScaling.from_hf(rope.to_hf(), head_dim=dim) == rope


def test_the_fields_that_both_transformers_read():
    assert RopeScaling("pi", 500000.0, 128, factor=8.0).to_hf() == {
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
    }
    assert isinstance(RopeScaling("none", 500000.0, 128).to_hf()["rope_theta"], int)
    assert RopeScaling("none", 10000.5, 128).to_hf() == {"rope_theta": 10000.5, "rope_scaling": None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RopeScaling("none", 10000.0, 8)),
        ({"rope_theta": 5e5}, RopeScaling("none", 5e5, 8)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeScaling("none", 5e5, 8)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, RopeScaling("pi", 5e5, 8, factor=4.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, RopeScaling("none", 5e5, 8)),
        # transformers 5 saves the three lines below
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeScaling("none", 5e5, 8)),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2}}, RopeScaling("pi", 1e5, 8, factor=2.0)),
        (
            {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2}, "rope_scaling": None},
            RopeScaling("pi", 1e5, 8, factor=2.0),
        ),
    ],
)
def test_from_hf_reads_configs_of_transformers_4_and_5(config, expected):
    assert RopeScaling.from_hf(config, head_dim=8) == expected


def test_from_hf_reads_what_the_installed_transformers_saves(tmp_path):
    rope = RopeScaling("pi", 500000.0, 16, factor=8.0)
    LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, **rope.to_hf()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert RopeScaling.from_hf(saved, head_dim=16) == rope


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_scalings_are_refused_by_name(kind, key):
    with pytest.raises(CheckpointError, match=f"'{kind}'.*supported are default, linear, llama3, yarn"):
        RopeScaling.from_hf({"rope_theta": 5e5, key: {"rope_type": kind, "factor": 8.0}}, head_dim=8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(type="none", factor=2.0), ["rope.factor=2.0", "rope.type=none", "rope.type=pi"]),
        (dict(type="linear"), ["rope.type=linear", "none", "pi"]),
        (dict(type="pi", factor=0.5), ["rope.factor=0.5", ">= 1"]),
        (dict(type="none", head_dim=7), ["head_dim=7", "even"]),
        (dict(type="none", head_dim=0), ["head_dim=0", "positive"]),
        (dict(type="abf", factor=2.0), ["rope.theta=None", "abf", "10000"]),
        (dict(type="abf", factor=2.0, theta=5000.0), ["rope.theta=5000.0", "at least the model's own"]),
        (dict(type="pi", factor=2.0, theta=50000.0), ["rope.theta=50000.0", "only rope.type=abf"]),
    ],
)
def test_impossible_scalings_are_refused(arguments, words):
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**({"rope_theta": 10000.0, "head_dim": 8} | arguments))
    for word in words:
        assert word in str(caught.value)


def test_linear_scaling_without_a_factor_is_refused():
    with pytest.raises(CheckpointError, match="factor"):
        RopeScaling.from_hf({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear"}}, head_dim=8)


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "high_freq_factor"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "mscale=0.7"),
        ({"rope_type": "linear", "factor": 4.0, "low_freq_factor": 1.0}, "low_freq_factor=1.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_scalings_with_keys_too_few_or_too_many_are_refused(scaling, word):
    with pytest.raises(CheckpointError, match=word):
        RopeScaling.from_hf({"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 64}, head_dim=8)


def test_two_descriptions_that_differ_are_refused():
    config = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(CheckpointError, match="two different RoPE descriptions"):
        RopeScaling.from_hf(config, head_dim=8)


SCALED = [
    RopeScaling("llama3", 500000.0, 128, factor=8.0, original_context_length=8192),
    RopeScaling("llama3", 500000.0, 64, factor=32.0, original_context_length=8192),
    RopeScaling("yarn", 1000000.0, 128, factor=4.0, original_context_length=32768),
    RopeScaling("yarn", 10000.0, 64, factor=16.0, original_context_length=2048, beta_fast=24.0, beta_slow=2.0, truncate=False),
]


@pytest.mark.parametrize("rope", SCALED, ids=str)
def test_scaled_frequencies_are_those_of_transformers(rope):
    config = LlamaConfig(
        hidden_size=rope.head_dim * 4,
        num_attention_heads=4,
        head_dim=rope.head_dim,
        max_position_embeddings=int(rope.factor * rope.original_context_length),
        **rope.to_hf(),
    )
    theirs = LlamaRotaryEmbedding(config=config)
    np.testing.assert_allclose(rope.inv_freq(), theirs.inv_freq.numpy(), rtol=3e-7)
    assert theirs.attention_scaling == pytest.approx(rope.attention_factor, abs=1e-12)
    again = RopeScaling.from_hf(rope.to_hf(), head_dim=rope.head_dim)
    np.testing.assert_array_equal(again.inv_freq(), rope.inv_freq())
    assert again.attention_factor == rope.attention_factor


def test_ntk_is_another_base():
    """Llama-3 from 8K to 64K as LCEG evaluates it: f = 4, theta 1.530e7; the static rule by hand."""
    dynamic = RopeScaling("ntk", 500000.0, 128, factor=8.0, ntk_dynamic_factor=4.0)
    assert dynamic.effective_theta == pytest.approx(500000.0 * 29 ** (128 / 126), rel=1e-12) == pytest.approx(1.530e7, rel=1e-3)
    static = RopeScaling("ntk", 10000.0, 64, factor=4.0)
    np.testing.assert_allclose(static.inv_freq()[[0, -1]], [1.0, 10000.0 ** (-62 / 64) / 4], rtol=1e-6)
    for rope in (dynamic, static):
        np.testing.assert_array_equal(RopeScaling.from_hf(rope.to_hf(), head_dim=rope.head_dim).inv_freq(), rope.inv_freq())


def test_a_raised_base_is_a_model_with_that_theta():
    raised = RopeScaling("abf", 10000.0, 64, factor=4.0, theta=500000.0)
    np.testing.assert_array_equal(raised.inv_freq(), RopeScaling("none", 500000.0, 64).inv_freq())
    assert raised.to_hf() == {"rope_theta": 500000, "rope_scaling": None} and raised.attention_factor == 1.0
    settings = {"type": "abf", "factor": 4.0, "theta": 500000.0}
    assert RopeScaling("none", 10000.0, 64).extended(settings, max_position_embeddings=2048) == raised


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_dynamic_ntk_is_that_of_transformers_at_the_target_window(factor):
    """The dynamic rule of transformers for a text as long as the target window."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    window, s = 8192, 4.0
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, max_position_embeddings=window, rope_theta=500000.0,
                         rope_scaling={"rope_type": "dynamic", "type": "dynamic", "factor": factor})  # fmt: skip
    theirs, attention = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=int(s * window))
    ours = RopeScaling("ntk", 500000.0, 128, factor=s, ntk_dynamic_factor=factor)
    np.testing.assert_allclose(ours.inv_freq(), theirs.numpy(), rtol=1e-6)
    assert attention == ours.attention_factor == 1.0


def test_extended_reads_the_settings_of_its_type():
    base = RopeScaling("none", 10000.0, 64)
    settings = {
        "factor": 4.0,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 8.0,
        "ntk_dynamic_factor": None,
    }
    yarn = base.extended({"type": "yarn", **settings}, max_position_embeddings=2048)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.original_context_length) == (24.0, 2.0, 2048)
    llama3 = base.extended({"type": "llama3", **settings}, max_position_embeddings=2048)
    assert (llama3.high_freq_factor, llama3.original_context_length) == (8.0, 2048)
    assert base.extended({"type": "pi", **settings}, max_position_embeddings=2048) == RopeScaling("pi", 10000.0, 64, factor=4.0)
