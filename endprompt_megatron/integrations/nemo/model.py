"""Llama config and Llama model for NeMo 2.x. The config builds our GPT model. The model starts from the weights of the base, passes the
positions to every pipeline stage, and optimises the weighted loss. NeMo's own forward step drops the positions after the first stage, and
NeMo's own loss rounds the sum of the loss weights to whole tokens.

Shapes: b micro-batch, s physical sequence on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from nemo.collections import llm
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.data.batch import MicroBatch, to_micro_batch
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.mcore import cpu
from endprompt_megatron.mcore.legacy_optimizer_arguments import accept_legacy_optimizer_arguments
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.training.step import weighted_loss


def data_step(batches: Iterator[Any]) -> MicroBatch:
    """Return this rank's part of the next micro-batch of EndPromptDataModule (context parallelism splits the tokens), on its device."""
    batch = next(batches)
    return to_micro_batch(batch[0] if isinstance(batch, tuple) else batch, torch.device(torch.cuda.current_device()))


def forward_step(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Run the forward pass of one micro-batch. Every pipeline stage gets the positions of the micro-batch, because every stage rotates
    queries and keys. Return the loss of each token [b, s] on the last stage, else hidden states."""
    return model(batch.tokens, batch.position_ids, None, labels=batch.labels)


class EndPromptLossReduction(MegatronLossReduction):
    """NeMo's interface to training.step.weighted_loss."""

    def forward(self, batch: MicroBatch, forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a micro-batch and its figures."""
        return weighted_loss(batch, forward_out)

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Return the scalar weighted loss of a global batch on the last pipeline stage. NeMo broadcasts it to the other stages."""
        loss = torch.stack([entry["figures"][0] for entry in losses_reduced_per_micro_batch]).mean()
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return loss / parallel_state.get_data_parallel_world_size()


@dataclass
class EndPromptLlamaConfig(llm.LlamaConfig):
    """llm.LlamaConfig that builds EndPromptGPTModel. Use `endprompt_llama_config` to create it with the sizes of the base.

    Attributes:
        extension: base model, target window and method; required by `configure_model`.
        data_step_fn, forward_step_fn: functions of this module.
    """

    extension: WindowExtension | None = None
    data_step_fn: Callable = data_step
    forward_step_fn: Callable = forward_step

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> EndPromptGPTModel:
        """Build this rank's chunk of the model with WindowExtension.build_chunk. The tokenizer is ignored, because the vocabulary size is
        that of the base."""
        if self.extension is None:
            raise ConfigError("EndPromptLlamaConfig(extension=None): set `extension`, or use endprompt_llama_config(extension).")
        stage = (vp_stage or 0) if self.virtual_pipeline_model_parallel_size else None
        return self.extension.build_chunk(self, vp_stage=stage, pre_process=pre_process, post_process=post_process)


def endprompt_llama_config(extension: WindowExtension, **fields: Any) -> EndPromptLlamaConfig:
    """Return an EndPromptLlamaConfig with the sizes from config.json of the base.

    Args:
        extension: base model, target window and method.
        fields: additional fields of llm.LlamaConfig, e.g. recompute_granularity.
    Raises:
        ConfigError, DataError, CheckpointError: same as WindowExtension.check.
    """
    base, rope = extension.check()
    shape = {"vocab_size": base.architecture.vocab_size, "share_embeddings_and_output_weights": base.architecture.tied_embeddings}
    known: dict[str, Any] = {**shape, "rotary_base": int(rope.rope_theta), "seq_length": extension.seq_length, "extension": extension}
    return EndPromptLlamaConfig(**extension.transformer_fields() | known | fields)


class EndPromptLlamaModel(llm.LlamaModel):
    """llm.LlamaModel that starts from the weights of the base and trains with the loss of EndPrompt. If NeMo restores a checkpoint, its
    weights replace those of the base."""

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Run llm.GPTModel.configure_model and load the weights of the base. Each rank reads only its slices."""
        if hasattr(self, "module"):
            return
        if cpu.cpu_shims_installed():  # NeMo seeds Megatron's generators only if it finds a GPU
            tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed())
        accept_legacy_optimizer_arguments()
        super().configure_model(vp_stage=vp_stage)
        base, _ = self.config.extension.check()
        load_hf_weights([self.module], base.hf_path, base.architecture)

    def on_fit_start(self) -> None:
        """Check that the data module and the model have the same extension.

        Raises:
            ConfigError: the extensions of the data module and of the model differ.
        """
        theirs = getattr(self.trainer.datamodule, "extension", None)
        if theirs != self.config.extension:
            raise ConfigError(f"the model has {self.config.extension}, the data module has {theirs}: give both the same WindowExtension.")

    @property
    def training_loss_reduction(self) -> EndPromptLossReduction:
        """Loss reduction of training, validation and test steps."""
        return EndPromptLossReduction()

    validation_loss_reduction = test_loss_reduction = training_loss_reduction


@io.model_exporter(EndPromptLlamaModel, "hf")
class EndPromptExporter(io.ModelConnector[EndPromptLlamaModel, Any]):
    """Exports a checkpoint of EndPromptLlamaModel for `llm.export_ckpt(path, "hf")`. NeMo's own exporter loses linear RoPE scaling and
    writes the physical length as the window."""

    def nemo_load(self, *args: Any, **kwargs: Any) -> Any:
        """Raise RuntimeError, so that the model is not loaded. llm.export_ckpt first loads every model onto a GPU to find out whether
        ModelOpt can export it. If this fails, llm.export_ckpt calls `apply`."""
        raise RuntimeError("an EndPrompt checkpoint is exported from its files")

    def apply(self, output_path: Path) -> Path:
        """Write the Hugging Face directory and return its path. This needs neither a GPU nor a process group."""
        config = io.load_context(Path(str(self)), subpath="model.config")
        return config.extension.export_checkpoint(Path(str(self)), Path(output_path))
