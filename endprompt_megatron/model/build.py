"""Build this rank's Megatron model chunks from a model architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig
from endprompt_megatron.model.backends import Backend
from endprompt_megatron.model.fusions import Fusions, choose_fusions
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.lora import prepare_adapters, with_adapters
from endprompt_megatron.model.precision import precision_fields
from endprompt_megatron.model.shifted_sparse import with_shifted_sparse_attention
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


def _skip_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    architecture: ModelArchitecture,
    *,
    parallel: ParallelConfig,
    precision: str,
    bf16_layers: tuple[int, int] = (0, 0),
    fusions: Fusions | None = None,
) -> TransformerConfig:
    """Return the TransformerConfig of an architecture.

    Args:
        architecture: sizes of the model.
        parallel: layout and recomputation.
        precision: bf16 | fp32, or an FP8 precision.
        bf16_layers: for an FP8 precision, numbers of layers at the start and at the end that stay in bf16.
        fusions: fused kernels; None selects the fusions that every backend supports.
    """
    fusions = fusions or choose_fusions(has_te_kernels=False)
    recompute = {}
    if parallel.recompute_granularity == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute_granularity == "selective":
        recompute = {"recompute_granularity": "selective"}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are loaded, so these functions initialise nothing. Megatron's initialisation still runs, because it also marks the
        # tensor-parallel parameters, and the gradient norm needs these marks.
        init_method=_skip_init,
        output_layer_init_method=_skip_init,
        embedding_init_method=_skip_init,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # with two pipeline stages, both neighbours are the same rank, so batched sends of an interleaved schedule would meet wrong receives
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        gradient_accumulation_fusion=fusions.gradient_accumulation,
        bias_activation_fusion=fusions.activation,
        bias_dropout_fusion=fusions.activation,
        apply_rope_fusion=fusions.rope,
        cross_entropy_loss_fusion=fusions.cross_entropy,
        cross_entropy_fusion_impl="te" if fusions.cross_entropy else "native",
        # fusions of layers that no backend here uses
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **precision_fields(precision, bf16_layers),
        **recompute,
    )


def build_model_chunks(
    architecture: ModelArchitecture,
    *,
    rope: RopeScaling,
    max_sequence_length: int,
    parallel: ParallelConfig,
    precision: str,
    backend: Backend,
    device: torch.device,
    bf16_layers: tuple[int, int] = (0, 0),
    fusions: Fusions | None = None,
    adapter: AdapterConfig | None = None,
    attention_groups: int | None = None,
    seed: int = 0,
) -> list[EndPromptGPTModel]:
    """Build this rank's model chunks (one, or one per virtual pipeline stage), without loading weights.

    Args:
        architecture: sizes of the model.
        rope: rotary frequencies.
        max_sequence_length: L. Megatron stores this value and does not use it.
        parallel, precision, backend: parallel layout, number format and kernels.
        device: device of the weights.
        bf16_layers, fusions: same as for transformer_config.
        adapter: settings of the adapters and of the other parameters that train. None or type none trains all parameters.
        attention_groups: number of groups of S2-attention; None selects full attention.
        seed: seed of the run, used to initialise adapters.
    """
    config = transformer_config(architecture, parallel=parallel, precision=precision, bf16_layers=bf16_layers, fusions=fusions)
    virtual = parallel.virtual_pipeline_model_parallel_size
    lora = adapter if adapter is not None and adapter.type == "lora" else None
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        block = backend.block_spec(config, vp_stage=vp_stage, unfused_norms=lora is not None)
        if attention_groups is not None:
            block = with_shifted_sparse_attention(block, num_groups=attention_groups)
        if lora is not None:
            block = with_adapters(block, lora)
        chunk = EndPromptGPTModel(
            config,
            block,
            architecture.padded_vocab_size(parallel.tensor_model_parallel_size),
            max_sequence_length,
            num_real_tokens=architecture.vocab_size,
            rope=rope,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            vp_stage=vp_stage,
        )
        if lora is not None:
            prepare_adapters(chunk, lora, seed=seed)
        chunks.append(chunk.to(device))
    return chunks


def wrap_for_training(chunks: list[EndPromptGPTModel], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap loaded chunks in Megatron's mixed-precision and data-parallel modules. Gradients accumulate in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        wrapped.append(DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=module, disable_bucketing=index > 0))
    return wrapped


def unwrap(model: torch.nn.Module) -> EndPromptGPTModel:
    """Return the model inside Megatron's wrappers."""
    while not isinstance(model, EndPromptGPTModel):
        model = model.module
    return model
