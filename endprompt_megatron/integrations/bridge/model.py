"""EndPrompt's model for Megatron-Bridge (0.3 on Python 3.11, 0.6 on 3.12): a provider whose `provide` makes our GPT model and that loads
the base's weights itself. Bridge's own conversion is left out on both ways: it drops or rewrites linear RoPE scaling."""

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
    """GPTModelProvider whose model is ours. `endprompt_model_provider` fills its numbers from the base.

    Attributes:
        extension: the base model, its target window and how to extend it.
    """

    extension: WindowExtension | None = None

    def provide(self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None) -> EndPromptGPTModel:
        """Same as WindowExtension.build_chunk."""
        if self.extension is None:
            raise ConfigError("EndPromptModelProvider(extension=None): name what is extended. endprompt_model_provider(extension) does.")
        return self.extension.build_chunk(self, vp_stage=vp_stage, pre_process=pre_process, post_process=post_process)

    def load_base_weights(self, chunks: list[EndPromptGPTModel]) -> list[EndPromptGPTModel]:
        """Bridge's hook before it wraps a model: fill this rank's chunks from the base, each rank reading only its slices. A checkpoint
        that Bridge resumes comes after, and replaces them."""
        assert self.extension is not None  # `provide` has refused None
        base, _ = self.extension.check()
        load_hf_weights(chunks, base.hf_path, base.architecture)
        return chunks


def endprompt_model_provider(extension: WindowExtension, **fields: Any) -> EndPromptModelProvider:
    """EndPromptModelProvider with the numbers of the base's config.json.

    Args:
        extension: the base model, its target window and how to extend it.
        fields: additional fields of GPTModelProvider: layout, recomputation.
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
