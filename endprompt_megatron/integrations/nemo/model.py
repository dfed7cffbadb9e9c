"""EndPrompt's model for NeMo 2.x: a Llama config whose `configure_model` makes our GPT model, and a Llama model that starts from the base's
weights, gives every pipeline stage its positions (NeMo's own step drops them after the first) and optimises the weighted loss (NeMo's own
rounds the sum of the weights to whole tokens).

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
    """NeMo's data step: the next micro-batch of EndPromptDataModule, on this rank's device, cut for its context-parallel rank."""
    batch = next(batches)
    return to_micro_batch(batch[0] if isinstance(batch, tuple) else batch, torch.device(torch.cuda.current_device()))


def forward_step(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """NeMo's forward step, the same on every pipeline stage: each rotates by the positions of the micro-batch."""
    return model(batch.tokens, batch.position_ids, None, labels=batch.labels)


class EndPromptLossReduction(MegatronLossReduction):
    """training.step.weighted_loss as NeMo's loss."""

    def forward(self, batch: MicroBatch, forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, [], and its figures."""
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
        extension: the base model, its target window and how to extend it.
    """

    extension: WindowExtension | None = None
    data_step_fn: Callable = data_step
    forward_step_fn: Callable = forward_step

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> EndPromptGPTModel:
        """Same as WindowExtension.build_chunk. Ignores the tokenizer, because the vocabulary size is that of the base."""
        if self.extension is None:
            raise ConfigError("EndPromptLlamaConfig(extension=None): name what is extended. endprompt_llama_config(extension) does.")
        stage = (vp_stage or 0) if self.virtual_pipeline_model_parallel_size else None
        return self.extension.build_chunk(self, vp_stage=stage, pre_process=pre_process, post_process=post_process)


def endprompt_llama_config(extension: WindowExtension, **fields: Any) -> EndPromptLlamaConfig:
    """EndPromptLlamaConfig with the numbers of the base's config.json.

    Args:
        extension: the base model, its target window and how to extend it.
        fields: additional fields of llm.LlamaConfig, e.g. recompute_granularity.
    Raises:
        ConfigError, DataError, CheckpointError: same as WindowExtension.check.
    """
    base, rope = extension.check()
    shape = {"vocab_size": base.architecture.vocab_size, "share_embeddings_and_output_weights": base.architecture.tied_embeddings}
    known: dict[str, Any] = {**shape, "rotary_base": int(rope.rope_theta), "seq_length": extension.seq_length, "extension": extension}
    return EndPromptLlamaConfig(**extension.transformer_fields() | known | fields)


class EndPromptLlamaModel(llm.LlamaModel):
    """llm.LlamaModel that starts from the weights of the base and trains with EndPrompt's loss. A checkpoint that NeMo restores comes
    after them, and replaces them."""

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Same as llm.GPTModel.configure_model, and then load the weights of the base. Each rank reads only its slices."""
        if hasattr(self, "module"):
            return
        if cpu.cpu_shims_installed():  # NeMo seeds Megatron's generators only where it counts a GPU
            tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed())
        accept_legacy_optimizer_arguments()
        super().configure_model(vp_stage=vp_stage)
        base, _ = self.config.extension.check()
        load_hf_weights([self.module], base.hf_path, base.architecture)

    def on_fit_start(self) -> None:
        """Refuse to train with the samples of another extension.

        Raises:
            ConfigError: the extensions of the data module and of the model differ.
        """
        theirs = getattr(self.trainer.datamodule, "extension", None)
        if theirs != self.config.extension:
            raise ConfigError(f"the model extends {self.config.extension}, the data module {theirs}: give both the same WindowExtension.")

    @property
    def training_loss_reduction(self) -> EndPromptLossReduction:
        """The loss reduction of training, validation and test steps."""
        return EndPromptLossReduction()

    validation_loss_reduction = test_loss_reduction = training_loss_reduction


@io.model_exporter(EndPromptLlamaModel, "hf")
class EndPromptExporter(io.ModelConnector[EndPromptLlamaModel, Any]):
    """`llm.export_ckpt(path, "hf")` of a checkpoint of EndPromptLlamaModel, by our exporter: NeMo's own loses linear RoPE scaling and names
    the physical length as the window."""

    def nemo_load(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: llm.export_ckpt loads every model onto a GPU first, to see whether ModelOpt exports it, and takes this error for a no."""
        raise RuntimeError("an EndPrompt checkpoint is exported from its files")

    def apply(self, output_path: Path) -> Path:
        """Write the Hugging Face directory; no GPU, no process group."""
        config = io.load_context(Path(str(self)), subpath="model.config")
        return config.extension.export_checkpoint(Path(str(self)), Path(output_path))
