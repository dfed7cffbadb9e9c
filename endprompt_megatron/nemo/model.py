"""EndPrompt's model for NeMo 2.x: a Llama config whose `configure_model` makes our GPT model, and a Llama model that starts from the base's
weights, gives every pipeline stage its positions (NeMo's own step drops them after the first) and optimises the weighted loss (NeMo's own
rounds the sum of the weights to whole tokens).

Shapes: b micro-batch, s physical sequence on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from endprompt_megatron.checkpoint.hf_import import load_hf_weights
from endprompt_megatron.data.batch import MicroBatch, to_micro_batch
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.extension import WindowExtension
from endprompt_megatron.mcore import cpu
from endprompt_megatron.mcore.former_arguments import accept_former_optimizer_arguments
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.training.step import weighted_loss


def data_step(batches: Iterator[Any]) -> MicroBatch:
    """NeMo's data step: the next micro-batch of EndPromptDataModule, on this rank's device, cut for its context-parallel rank."""
    batch = next(batches)
    return to_micro_batch(batch[0] if isinstance(batch, tuple) else batch, torch.device(torch.cuda.current_device()))


def forward_step(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """NeMo's forward step, the same on every pipeline stage: each rotates by the positions of the micro-batch."""
    return model(batch.tokens, batch.position_ids, None, labels=batch.labels)


class EndPromptLossReduction(MegatronLossReduction):
    """Eq. 11 of EndPrompt (arXiv 2605.14589) in the form in which NeMo asks for a loss."""

    def forward(self, batch: MicroBatch, forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As training.step.weighted_loss."""
        return weighted_loss(batch, forward_out)

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """The weighted loss of a global batch, [], for the last pipeline stage; NeMo hands it to the others."""
        loss = torch.stack([entry["figures"][0] for entry in losses_reduced_per_micro_batch]).mean()
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return loss / parallel_state.get_data_parallel_world_size()


@dataclass
class EndPromptLlamaConfig(llm.LlamaConfig):
    """llm.LlamaConfig whose model is ours. `endprompt_llama_config` fills its numbers from the base.

    Attributes:
        extension: what is extended and how.
    """

    extension: WindowExtension | None = None
    data_step_fn: Callable = data_step
    forward_step_fn: Callable = forward_step

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> EndPromptGPTModel:
        """This rank's chunk of the model, weights not yet loaded.

        Args:
            tokenizer: not used: the vocabulary is the base's.
            pre_process, post_process: whether it holds embedding and output layer; None goes by the pipeline stage.
            vp_stage: virtual pipeline stage.
        Raises:
            ConfigError: as WindowExtension.build_chunk.
        """
        if self.extension is None:
            raise ConfigError("EndPromptLlamaConfig(extension=None): name what is extended. endprompt_llama_config(extension) does.")
        stage = (vp_stage or 0) if self.virtual_pipeline_model_parallel_size else None
        return self.extension.build_chunk(self, vp_stage=stage, pre_process=pre_process, post_process=post_process)


def endprompt_llama_config(extension: WindowExtension, **fields: Any) -> EndPromptLlamaConfig:
    """The config of a base whose window is to be extended, with the numbers of its config.json.

    Args:
        extension: what is extended and how.
        fields: further fields of Megatron's TransformerConfig, e.g. recompute_granularity.
    Raises:
        ConfigError, DataError, CheckpointError: as WindowExtension.check.
    """
    base, rope = extension.check()
    # not what Megatron derives from the others, nor what NeMo's strategy and precision plugin set
    names = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "layernorm_epsilon"}
    names |= {"add_qkv_bias", "qk_layernorm", "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion"}
    names |= {"masked_softmax_fusion", "apply_rope_fusion", "persist_layer_norm", "cross_entropy_loss_fusion"}
    return EndPromptLlamaConfig(
        **extension.transformer_fields(names)
        | {
            "extension": extension,
            "seq_length": extension.seq_length,
            "vocab_size": base.architecture.vocab_size,
            "rotary_base": int(rope.rope_theta),
            "share_embeddings_and_output_weights": base.architecture.tied_embeddings,
        }
        | fields
    )


class EndPromptLlamaModel(llm.LlamaModel):
    """llm.LlamaModel that starts from the weights of the base and trains with EndPrompt's loss. A checkpoint that NeMo restores comes
    after them, and replaces them."""

    def configure_model(self, vp_stage: int | None = None) -> None:
        """As llm.GPTModel's, with the weights of the base: each rank reads only its slices."""
        if hasattr(self, "module"):
            return
        if cpu.cpu_shims_installed():  # NeMo seeds Megatron's generators only where it counts a GPU
            tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed())
        accept_former_optimizer_arguments()
        super().configure_model(vp_stage=vp_stage)
        base, _ = self.config.extension.check()
        load_hf_weights([self.module], base.hf_path, base.architecture)

    def on_fit_start(self) -> None:
        """Refuse to train with the samples of another extension.

        Raises:
            ConfigError: the data module's is not the model's.
        """
        theirs = getattr(self.trainer.datamodule, "extension", None)
        if theirs != self.config.extension:
            raise ConfigError(f"the model extends {self.config.extension}, the data module {theirs}: give both the same WindowExtension.")

    @property
    def training_loss_reduction(self) -> EndPromptLossReduction:
        """Of a training step, and of the others."""
        return EndPromptLossReduction()

    validation_loss_reduction = test_loss_reduction = training_loss_reduction


@io.model_exporter(EndPromptLlamaModel, "hf")
class EndPromptExporter(io.ModelConnector[EndPromptLlamaModel, Any]):
    """`llm.export_ckpt(path, "hf")` of a checkpoint of EndPromptLlamaModel, by our exporter: NeMo's own loses RoPE scaling and names the
    physical length as the window."""

    def apply(self, output_path: Path) -> Path:
        """Write the Hugging Face directory."""
        config = io.load_context(Path(str(self)), subpath="model.config")
        return config.extension.export_checkpoint(Path(str(self)), Path(output_path))
