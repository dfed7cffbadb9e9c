"""The table of Hugging Face and Megatron tensors: hand-worked cases and round trips of every layout, for one and two tensor-parallel
ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf.mapping import FUSED_NAMES, Binding, bindings, unfused_name
from endprompt_megatron.planning.architecture import ModelArchitecture
from tests.support.tiny import architecture_of, load_model


def architecture(**changes: object) -> ModelArchitecture:
    """Sizes small enough for hand-written tensors: head dim 1, and hidden size 1 by default."""
    numbers = dict(
        num_layers=1,
        hidden_size=1,
        ffn_hidden_size=4,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=1,
        vocab_size=300,
        max_position_embeddings=16,
        rope_theta=1e4,
        norm_epsilon=1e-5,
        tied_embeddings=False,
    )
    return ModelArchitecture(**(numbers | changes))


def read(binding: Binding, arch: ModelArchitecture, tensors: dict[str, torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """A rank's Megatron tensor, reading from memory."""
    return binding.layout.read(
        arch,
        binding.hugging_face,
        lambda name, first, last: tensors[name][first:last],
        lambda name, first, last: tensors[name][:, first:last],
        rank,
        size,
    )


def find(arch: ModelArchitecture, ending: str) -> Binding:
    found = [binding for binding in bindings(arch) if binding.megatron.endswith(ending)]
    assert len(found) == 1
    return found[0]


class TestByHand:
    def test_qkv_goes_group_by_group(self):
        """Two groups of two query heads: q0 q1 k0 v0, then q2 q3 k1 v1."""
        arch, binding = architecture(), find(architecture(), "linear_qkv.weight")
        query, key, value = torch.tensor([[10.0], [11], [12], [13]]), torch.tensor([[20.0], [21]]), torch.tensor([[30.0], [31]])
        tensors = dict(zip(binding.hugging_face, (query, key, value), strict=True))
        assert read(binding, arch, tensors, 0, 1).flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
        assert read(binding, arch, tensors, 0, 2).flatten().tolist() == [10, 11, 20, 30]
        assert read(binding, arch, tensors, 1, 2).flatten().tolist() == [12, 13, 21, 31]
        assert [name.split(".")[-2] for name in binding.hugging_face] == ["q_proj", "k_proj", "v_proj"]

    def test_qkv_keeps_the_rows_of_a_head_together(self):
        arch = architecture(head_dim=2, num_attention_heads=2, num_query_groups=2)
        binding = find(arch, "linear_qkv.weight")
        tensors = {name: torch.arange(4.0)[:, None] + start for name, start in zip(binding.hugging_face, (10, 20, 30), strict=True)}
        assert read(binding, arch, tensors, 0, 1).flatten().tolist() == [10, 11, 20, 21, 30, 31, 12, 13, 22, 23, 32, 33]

    def test_gate_and_up_are_cut_apart(self):
        """Each rank holds its half of the gate, then its half of the up projection."""
        arch, binding = architecture(), find(architecture(), "linear_fc1.weight")
        tensors = {name: torch.arange(4.0)[:, None] + start for name, start in zip(binding.hugging_face, (10, 20), strict=True)}
        assert binding.hugging_face[0].endswith("gate_proj.weight")
        assert read(binding, arch, tensors, 0, 1).flatten().tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
        assert read(binding, arch, tensors, 0, 2).flatten().tolist() == [10, 11, 20, 21]
        assert read(binding, arch, tensors, 1, 2).flatten().tolist() == [12, 13, 22, 23]

    @pytest.mark.parametrize("ending", ["self_attention.linear_proj.weight", "mlp.linear_fc2.weight"])
    def test_row_parallel_weights_are_cut_by_columns(self, ending):
        arch, binding = architecture(), find(architecture(), ending)
        tensors = {binding.hugging_face[0]: torch.tensor([[1.0, 2, 3, 4]])}
        assert binding.layout.tensor_parallel_dim == 1
        assert read(binding, arch, tensors, 1, 2).tolist() == [[3, 4]]

    @pytest.mark.parametrize("ending", ["embedding.word_embeddings.weight", "output_layer.weight"])
    def test_vocabulary_is_padded_with_zeros(self, ending):
        """300 tokens are 384 rows on one rank, and 2 x 256 on two: the second holds 44 tokens and 212 rows of padding."""
        arch, binding = architecture(), find(architecture(), ending)
        tensors = {binding.hugging_face[0]: torch.arange(1.0, 301.0)[:, None]}
        whole = read(binding, arch, tensors, 0, 1).flatten()
        assert whole.shape == (384,) and whole[:300].tolist() == list(range(1, 301)) and not whole[300:].any()
        second = read(binding, arch, tensors, 1, 2).flatten()
        assert second.shape == (256,) and second[:44].tolist() == list(range(257, 301)) and not second[44:].any()

    def test_a_rank_of_padding_alone(self):
        arch = architecture(vocab_size=100)
        binding = find(arch, "output_layer.weight")
        share = read(binding, arch, {binding.hugging_face[0]: torch.ones(100, 1)}, 1, 2)
        assert share.shape == (128, 1) and not share.any()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_then_join_is_bit_identical(size, groups, dtype):
    arch = architecture(hidden_size=6, ffn_hidden_size=10, head_dim=4, num_query_groups=groups, num_layers=3)
    torch.manual_seed(0)
    shapes = {
        "q_proj": (16, 6), "k_proj": (4 * groups, 6), "v_proj": (4 * groups, 6), "o_proj": (6, 16), "gate_proj": (10, 6),
        "up_proj": (10, 6), "down_proj": (6, 10), "embed_tokens": (300, 6), "lm_head": (300, 6), "norm": (6,),
        "input_layernorm": (6,), "post_attention_layernorm": (6,),
    }  # fmt: skip
    for binding in bindings(arch):
        tensors = {name: torch.randn(shapes[name.split(".")[-2]]).to(dtype) for name in binding.hugging_face}
        shards = [read(binding, arch, tensors, rank, size) for rank in range(size)]
        if binding.layout.tensor_parallel_dim is None:
            assert all(torch.equal(shard, shards[0]) for shard in shards)
        else:
            rows = sum(tensor.shape[binding.layout.tensor_parallel_dim] for tensor in tensors.values())
            padded = arch.padded_vocab_size(size) if "word_emb" in binding.megatron or "output" in binding.megatron else rows
            assert all(shard.shape[binding.layout.tensor_parallel_dim] == padded // size for shard in shards)
        joined = binding.layout.join(arch, shards)
        for name, tensor in zip(binding.hugging_face, joined, strict=True):
            assert tensor.dtype == dtype and torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("name", ["tiny_model_dir", "untied_model_dir", "multi_head_model_dir"])
def test_every_tensor_of_a_llama_is_bound_once(name, request):
    hf_path: Path = request.getfixturevalue(name)
    arch = architecture_of(hf_path)
    bound = [hf for binding in bindings(arch) for hf in binding.hugging_face]
    assert len(bound) == len(set(bound))
    theirs = set(AutoModelForCausalLM.from_pretrained(hf_path).state_dict())
    assert set(bound) == (theirs - {"lm_head.weight"} if arch.tied_embeddings else theirs)
    with safe_open(hf_path / "model.safetensors", framework="pt") as stored:
        assert set(bound) == set(stored.keys())


@pytest.mark.parametrize("name", ["tiny_model_dir", "untied_model_dir"])
def test_every_parameter_of_the_megatron_model_is_bound_once(name, request, single_process):
    hf_path: Path = request.getfixturevalue(name)
    bound = [binding.megatron for binding in bindings(architecture_of(hf_path))]
    assert sorted(bound) == sorted(name for name, _ in load_model(hf_path).named_parameters())


def test_order_is_embedding_layers_norm_output():
    names = [binding.megatron for binding in bindings(architecture(num_layers=2))]
    layers = [name for name in names if "decoder.layers" in name]
    assert names == ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", "output_layer.weight"]
    assert [int(name.split(".")[2]) for name in layers] == [0] * 6 + [1] * 6


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}])
def test_names_of_transformer_engines_layers_lead_back_to_the_table(changes):
    """Parameter names of a model of megatron-core 0.19 with Transformer Engine 2.20."""
    arch = architecture(num_layers=12, **changes)
    per_layer = [
        "self_attention.linear_proj.weight", "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        *(["self_attention.linear_qkv.bias"] if arch.qkv_bias else []),
        *(["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] if arch.qk_norm else []),
        "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    ]  # fmt: skip
    names = [
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        *([] if arch.tied_embeddings else ["output_layer.weight"]),
    ]
    names += [f"decoder.layers.{layer}.{name}" for layer in range(12) for name in per_layer]
    assert sorted(map(unfused_name, names)) == sorted(binding.megatron for binding in bindings(arch))
    assert all(unfused_name(f"decoder.layers.10.{fused}") == f"decoder.layers.10.{apart}" for apart, fused in FUSED_NAMES.items())
