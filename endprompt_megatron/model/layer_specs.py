"""Layer specs by backend: which class fills which slot of a Megatron transformer layer."""

from __future__ import annotations

import warnings

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.model.norm import RMSNorm
from endprompt_megatron.model.sdpa import TorchSDPA


def torch_block_spec(config: TransformerConfig, *, vp_stage: int | None = None, norms_apart: bool = True) -> TransformerBlockSubmodules:
    """Megatron's local layers with torch SDPA attention and our RMSNorm, for this pipeline stage's layers.

    Args:
        config: of the whole model.
        vp_stage: virtual pipeline stage, or None.
        norms_apart: these layers' norms always are.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Apex is not installed")
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchSDPA
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm)


def te_block_spec(config: TransformerConfig, *, vp_stage: int | None = None, norms_apart: bool = False) -> TransformerBlockSubmodules:
    """Megatron's Transformer Engine layers, for this pipeline stage's layers. The norm before attention and the one before the MLP are
    parts of the linear layer that follows.

    Args:
        config: of the whole model.
        vp_stage: virtual pipeline stage, or None.
        norms_apart: keep the norm before attention apart, so that adapters see its output.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if norms_apart:
        layer.submodules.input_layernorm = TENorm
        layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        # checkpoints know it by the name that it has inside
        layer.submodules.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=TENorm)
