"""The model that NeMo configures: against our own loader's, against transformers, and its configuration field by field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections import llm
from transformers import LlamaConfig, LlamaForCausalLM

from endprompt_megatron.checkpoint.hf.verify import megatron_logits, transformers_logits
from endprompt_megatron.config.schema import MethodConfig, ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.nemo.model import EndPromptLlamaConfig, EndPromptLlamaModel, endprompt_llama_config
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.model.build import transformer_config
from endprompt_megatron.positions.endprompt import endprompt_positions
from tests.support.nemo_worker import extension_of
from tests.support.tiny import WINDOW, architecture_of, load_model, tokens_of

# what NeMo's configs have for themselves: initialisation that our loader overwrites, and what precision plugin and strategy set
OWN = {"init_method", "output_layer_init_method", "embedding_init_method", "embedding_init_method_std", "pipeline_dtype", "autocast_dtype"}
OWN |= {"deallocate_pipeline_outputs", "attention_softmax_in_fp32", "batch_p2p_comm"}


@pytest.mark.parametrize("model", ["tiny_model_dir", "untied_model_dir"])
def test_logits_at_endprompt_positions(single_process, request, model):
    hf_path: Path = request.getfixturevalue(model)
    nemo_model = EndPromptLlamaModel(endprompt_llama_config(extension_of(hf_path)))
    nemo_model.configure_model()
    tokens, positions = tokens_of(64, batch=2), torch.from_numpy(endprompt_positions(52, 12, target_context_length=WINDOW))
    found = megatron_logits(nemo_model.module.eval(), tokens, positions)
    ours = megatron_logits(load_model(hf_path, factor=2.0), tokens, positions)
    assert (found - ours).abs().max() <= 1e-5
    config = LlamaConfig.from_pretrained(hf_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    reference = LlamaForCausalLM.from_pretrained(hf_path, config=config, dtype=torch.float32).eval()
    vocabulary = architecture_of(hf_path).vocab_size
    assert (found[..., :vocabulary] - transformers_logits(reference, tokens, positions)).abs().max() <= 1e-4
    contiguous = megatron_logits(nemo_model.module, tokens, torch.arange(64))
    assert (found - contiguous).abs().max() > 0.1  # positions are obeyed


def test_every_field_is_that_of_our_own_runs(tiny_model_dir):
    theirs = endprompt_llama_config(extension_of(tiny_model_dir))
    ours = transformer_config(architecture_of(tiny_model_dir), parallel=ParallelConfig(), precision="fp32")
    differing = {
        field.name
        for field in dataclasses.fields(TransformerConfig)
        if getattr(theirs, field.name) != getattr(ours, field.name) and not (field.name.startswith("init_method") or field.name in OWN)
    }
    assert not differing, {name: (getattr(theirs, name), getattr(ours, name)) for name in differing}
    assert (theirs.seq_length, theirs.vocab_size, theirs.rotary_base) == (64, 512, 10000)


def test_stock_nemo_model_ignores_positions(single_process, tiny_model_dir):
    """Why the config class has to make another model: the same two calls on llm.LlamaConfig's give the same logits."""
    fields = extension_of(tiny_model_dir).transformer_fields()
    stock = llm.LlamaConfig(**fields, seq_length=64, vocab_size=512, share_embeddings_and_output_weights=True).configure_model(None)
    tokens = tokens_of(64)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).triu(1)
    jumped = torch.from_numpy(endprompt_positions(52, 12, target_context_length=WINDOW))[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(tokens, jumped, mask), stock(tokens, torch.arange(64)[None], mask))


def test_wrong_settings_are_refused(single_process, tiny_model_dir):
    config = endprompt_llama_config(extension_of(tiny_model_dir), calculate_per_token_loss=True)
    with pytest.raises(ConfigError, match="calculate_per_token_loss=True"):
        config.configure_model(None)
    with pytest.raises(ConfigError, match="extension=None"):
        EndPromptLlamaConfig(**extension_of(tiny_model_dir).transformer_fields()).configure_model(None)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=3"):
        config = endprompt_llama_config(extension_of(tiny_model_dir))
        config.tensor_model_parallel_size = 3
        config.configure_model(None)
    with pytest.raises(ConfigError, match="method.attention=s2"):
        method = MethodConfig(attention="s2")
        endprompt_llama_config(WindowExtension(str(tiny_model_dir), target_context_length=256, seq_length=64, method=method))
