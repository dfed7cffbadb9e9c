"""Layer specs of each backend. A layer spec assigns a class to each submodule of a Megatron transformer layer."""

from __future__ import annotations

import warnings

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.model.norm import RMSNorm
from endprompt_megatron.model.sdpa import TorchSDPA


def torch_block_spec(config: TransformerConfig, *, vp_stage: int | None = None, unfused_norms: bool = True) -> TransformerBlockSubmodules:
    """Return the block spec of this pipeline stage with Megatron's local layers, torch SDPA attention and our RMSNorm.

    Args:
        config: config of the whole model.
        vp_stage: virtual pipeline stage, or None.
        unfused_norms: ignored, because these layers never fuse norms into linear layers.
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


def te_block_spec(config: TransformerConfig, *, vp_stage: int | None = None, unfused_norms: bool = False) -> TransformerBlockSubmodules:
    """Return the block spec of this pipeline stage with Megatron's Transformer Engine layers. The norms before attention and before the MLP
    are fused into the linear layers that follow.

    Args:
        config: config of the whole model.
        vp_stage: virtual pipeline stage, or None.
        unfused_norms: whether to leave the norm before attention unfused, so that adapters can read its output.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if unfused_norms:
        layer.submodules.input_layernorm = TENorm
        layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        # checkpoints use the name of the fused norm
        layer.submodules.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=TENorm)
