"""Model provider for Megatron-Bridge (0.3 on Python 3.11, 0.6 on 3.12). The provider builds our GPT model and loads the weights of the
base. Import and export do not use Bridge's own conversion, because that conversion drops or rewrites linear RoPE scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.model.gpt import EndPromptGPTModel


@dataclass
class EndPromptModelProvider(GPTModelProvider):
    """GPTModelProvider that builds EndPromptGPTModel. Use `endprompt_model_provider` to create it with the sizes of the base.

    Attributes:
        extension: base model, target window and method; required by `provide`.
    """

    extension: WindowExtension | None = None

    def provide(self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None) -> EndPromptGPTModel:
        """Build this rank's chunk of the model with WindowExtension.build_chunk."""
        if self.extension is None:
            raise ConfigError("EndPromptModelProvider(extension=None): set `extension`, or use endprompt_model_provider(extension).")
        return self.extension.build_chunk(self, vp_stage=vp_stage, pre_process=pre_process, post_process=post_process)

    def load_base_weights(self, chunks: list[EndPromptGPTModel]) -> list[EndPromptGPTModel]:
        """Load the weights of the base into this rank's chunks. Bridge calls this method before it wraps the model. Each rank reads only
        its slices. If Bridge resumes a checkpoint, the weights of the checkpoint replace those of the base afterwards."""
        assert self.extension is not None  # `provide` raises for None
        base, _ = self.extension.check()
        load_hf_weights(chunks, base.hf_path, base.architecture)
        return chunks


def endprompt_model_provider(extension: WindowExtension, **fields: Any) -> EndPromptModelProvider:
    """Return an EndPromptModelProvider with the sizes from config.json of the base.

    Args:
        extension: base model, target window and method.
        fields: additional fields of GPTModelProvider, such as layout and recomputation.
    Raises:
        ConfigError, DataError, CheckpointError: same as WindowExtension.check.
    """
    base, rope = extension.check()
    known: dict[str, Any] = {
        "vocab_size": base.architecture.vocab_size,
        "share_embeddings_and_output_weights": base.architecture.tied_embeddings,
        "rotary_base": int(rope.rope_theta),
        "position_embedding_type": "rope",
        "seq_length": extension.seq_length,
    }
    provider = EndPromptModelProvider(**extension.transformer_fields() | known | {"extension": extension} | fields)
    provider.register_pre_wrap_hook(provider.load_base_weights)
    return provider
