"""TorchSDPA against Megatron's DotProductAttention.

Shapes: b micro-batch, s sequence, n query heads, g key/value heads, d head dim; Megatron order [s, b, n, d].
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.build import transformer_config
from endprompt_megatron.model.layer_specs import torch_block_spec
from endprompt_megatron.model.norm import RMSNorm
from endprompt_megatron.model.sdpa import TorchSDPA
from endprompt_megatron.planning.architecture import ModelArchitecture
from tests.support.tiny import architecture_of

pytestmark = pytest.mark.usefixtures("single_process")


def config_of(architecture: ModelArchitecture, **changes: object) -> TransformerConfig:
    config = transformer_config(architecture, parallel=ParallelConfig(), precision="fp32")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def architecture(tiny_model_dir) -> ModelArchitecture:
    return architecture_of(tiny_model_dir)


def heads(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_equals_megatrons_own_attention_forward_and_backward(architecture, groups, scale):
    config = config_of(dataclasses.replace(architecture, num_query_groups=groups))
    arguments = dict(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", softmax_scale=scale)
    ours, theirs = TorchSDPA(**arguments), DotProductAttention(**arguments)
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool).triu(1)
    outputs, gradients = [], []
    for attention in (ours, theirs):
        query, key, value = heads(33, 2, 4, 16, seed=0), heads(33, 2, groups, 16, seed=1), heads(33, 2, groups, 16, seed=2)
        output = attention(query, key, value, mask, attn_mask_type=AttnMaskType.causal)
        (output * torch.linspace(-1, 1, 64)).sum().backward()
        outputs.append(output.detach())
        gradients.append([query.grad, key.grad, value.grad])
    assert outputs[0].shape == (33, 2, 64)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_fills_the_slots_of_megatrons_own_layer(architecture):
    ours = torch_block_spec(config_of(architecture))
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = ours.layer_specs[0]
    assert len(ours.layer_specs) == architecture.num_layers and ours.layer_norm is RMSNorm
    assert stock.submodules.self_attention.submodules.core_attention is DotProductAttention
    assert layer.submodules.self_attention.submodules.core_attention is TorchSDPA
    assert layer.submodules.input_layernorm is RMSNorm and layer.submodules.pre_mlp_layernorm is RMSNorm
    # Megatron computes the rest
    assert layer.module is stock.module and layer.submodules.self_attention.module is stock.submodules.self_attention.module


def test_attention_is_causal_by_physical_order(architecture):
    attention = TorchSDPA(config_of(architecture), 1, AttnMaskType.causal, "self")
    query, key, value = heads(9, 1, 4, 16, seed=0), heads(9, 1, 2, 16, seed=1), heads(9, 1, 2, 16, seed=2)
    before = attention(query, key, value, None)
    with torch.no_grad():
        key[5:], value[5:] = 0.0, 7.0
    after = attention(query, key, value, None)
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])
    # the first token attends only to itself; heads 0 and 1 read group 0, heads 2 and 3 group 1
    torch.testing.assert_close(before[0, 0].view(4, 16), value[0, 0][[0, 0, 1, 1]])


def test_dropout_is_for_training_only(architecture):
    config = config_of(architecture, attention_dropout=0.5)
    query, key, value = heads(9, 1, 4, 16, seed=0), heads(9, 1, 2, 16, seed=1), heads(9, 1, 2, 16, seed=2)
    dropping = TorchSDPA(config, 1, AttnMaskType.causal, "self")
    never = TorchSDPA(config, 1, AttnMaskType.causal, "self", attention_dropout=0.0)
    expected = never.train()(query, key, value, None)
    assert torch.equal(dropping.eval()(query, key, value, None), expected)
    assert not torch.equal(dropping.train()(query, key, value, None), expected)
