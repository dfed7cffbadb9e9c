"""config.json: converted into an architecture, rejected for unsupported computations, and written so that transformers 4 and 5 load it
identically."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, extended_hf_config, read_hf_config
from endprompt_megatron.checkpoint.hf.config import rope_from_hf as architecture_rope
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.families import FAMILIES, SIZES

# the published config.json of Meta-Llama-3-8B
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
ROPE = RopeScaling("pi", 500000.0, 128, factor=8.0)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_numbers_of_llama_3_8b():
    assert architecture_from_hf(LLAMA_3_8B) == ModelArchitecture(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        tied_embeddings=False,
    )


def test_absent_fields_mean_what_transformers_means():
    plain = architecture_from_hf(without(LLAMA_3_8B, "num_key_value_heads", "tie_word_embeddings", "rope_theta", "attention_bias"))
    assert plain.num_query_groups == 32 and plain.tied_embeddings is False and plain.rope_theta == 10000.0
    assert architecture_from_hf(LLAMA_3_8B | {"head_dim": 64}).head_dim == 64
    assert architecture_from_hf(LLAMA_3_8B | {"head_dim": None}).head_dim == 128


def test_theta_in_the_form_of_transformers_5():
    config = without(LLAMA_3_8B, "rope_theta", "rope_scaling") | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert architecture_from_hf(config).rope_theta == 5e5


def test_mistral_without_a_window_is_the_same_maths():
    assert (
        architecture_from_hf(
            LLAMA_3_8B | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
        ).num_layers
        == 32
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM (Qwen3)"]),
        ({"architectures": []}, ["none named", "LlamaForCausalLM"]),
        ({"architectures": None}, ["none named", "LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias=True", "only False"]),
        ({"mlp_bias": True}, ["mlp_bias=True", "only False"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "only None"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention", "layer_types"]),
        ({"attention_multiplier": 0.1}, ["attention_multiplier=0.1", "an unknown field", "delete it"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
        ({"pretraining_tp": 2}, ["pretraining_tp=2", "only 1"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "only 1.0"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "without high_freq_factor"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["'dynamic'", "default, linear", "rope_scaling"]),
    ],
)
def test_other_maths_is_refused(changes, words):
    with pytest.raises(CheckpointError) as caught:
        architecture_from_hf(LLAMA_3_8B | changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size"),
        *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
    ],
)
def test_a_missing_field_is_named(name):
    with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
        architecture_from_hf(without(LLAMA_3_8B, name))


def test_read_hf_config(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no config.json in this directory.*model.hf_path.*huggingface-cli"):
        read_hf_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_hf_config(tmp_path) == {"a": 1}


class TestExtended:
    def test_fields(self):
        base = dict(LLAMA_3_8B)
        config = extended_hf_config(base, ROPE, target_context_length=65536, dtype="bfloat16")
        assert config["max_position_embeddings"] == 65536 and type(config["max_position_embeddings"]) is int
        assert config["rope_theta"] == 500000
        assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
        assert config["torch_dtype"] == "bfloat16"
        changed = ("max_position_embeddings", "rope_theta", "rope_scaling", "torch_dtype")
        assert without(config, *changed) == without(LLAMA_3_8B, *changed), "all other fields are unchanged"
        assert base == LLAMA_3_8B, "the base config is not modified"

    def test_window_is_an_integer_whatever_comes_in(self):
        config = extended_hf_config(LLAMA_3_8B, ROPE, target_context_length=np.int64(65536), dtype="bfloat16")
        assert json.loads(json.dumps(config))["max_position_embeddings"] == 65536

    def test_nothing_of_transformers_5_is_left_to_contradict_it(self):
        saved_by_5 = without(LLAMA_3_8B, "rope_theta", "rope_scaling", "torch_dtype") | {
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "dtype": "float32",
            "_name_or_path": "/home/somebody/llama",
        }
        config = extended_hf_config(saved_by_5, ROPE, target_context_length=65536, dtype="bfloat16")
        assert not {"rope_parameters", "dtype", "_name_or_path"} & set(config)
        assert config["rope_theta"] == 500000 and config["rope_scaling"]["factor"] == 8.0

    @pytest.mark.parametrize("rope", [ROPE, RopeScaling("none", 500000.0, 128)])
    def test_the_installed_transformers_reads_it_as_meant(self, tmp_path, rope):
        config = extended_hf_config(LLAMA_3_8B, rope, target_context_length=65536, dtype="bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(tmp_path)
        assert read.max_position_embeddings == 65536 and str(read.dtype) == "torch.bfloat16"
        rotary = LlamaRotaryEmbedding(config=read)
        np.testing.assert_array_equal(rotary.inv_freq.numpy(), rope.inv_freq())
        assert rotary.attention_scaling == 1.0

    def test_comes_back_as_the_same_scaling(self):
        config = extended_hf_config(LLAMA_3_8B, ROPE, target_context_length=65536, dtype="bfloat16")
        assert RopeScaling.from_hf(config, head_dim=128) == ROPE
        assert architecture_from_hf(config).max_position_embeddings == 65536


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral-v0.3", {"sliding_window": 4096}, "sliding_window=4096.*only None"),
        ("mistral-v0.3", {"sliding_window": ...}, "sliding_window=4096.*lacks it"),
        ("qwen2.5", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"num_key_value_heads": ...}, "num_key_value_heads"),
    ],
)
def test_other_maths_of_a_family_is_refused(family, changes, words):
    config = {**SIZES, **FAMILIES[family], **changes}
    with pytest.raises(CheckpointError, match=words):
        architecture_from_hf({name: value for name, value in config.items() if value is not ...})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_field_that_the_installed_transformers_knows_is_understood(model_type):
    """Fails if a later version of transformers adds a field, which must then be classified."""
    config = AutoConfig.for_model(model_type)
    fields = config.to_dict() | {"architectures": [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]}
    architecture = architecture_from_hf(fields | ({"sliding_window": None} if model_type == "mistral" else {}))
    assert architecture.num_layers == config.num_hidden_layers and architecture.head_dim == (getattr(config, "head_dim", None) or 128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "different models"),
        ({"is_causal": False}, "is_causal=False"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number from 1"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers=.four.: must be a whole number"),
        ({"hidden_size": None}, "hidden_size=None: must be a whole number"),
        ({"rope_theta": None}, "rope_theta=null"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor=.x.: must be a finite number"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, "two different RoPE descriptions"),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        architecture_from_hf(LLAMA_3_8B | changes)


def test_the_window_before_yarn_stands_in_either_place():
    scaling = {"type": "yarn", "factor": 4.0}
    inside = architecture_rope(LLAMA_3_8B | {"rope_scaling": scaling | {"original_max_position_embeddings": 2048}})
    outside = LLAMA_3_8B | {"rope_scaling": scaling, "original_max_position_embeddings": 2048}
    assert architecture_rope(outside) == inside and inside.original_context_length == 2048
    assert "original_max_position_embeddings" not in extended_hf_config(outside, inside, target_context_length=8192, dtype="float32")
    with pytest.raises(CheckpointError, match="Keep one"):
        architecture_rope(
            outside | {"original_max_position_embeddings": 4096, "rope_scaling": scaling | {"original_max_position_embeddings": 2048}}
        )
