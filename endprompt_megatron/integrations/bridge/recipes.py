"""Megatron-Bridge recipes for the setting of the paper: Llama 3 extended from 8K to 64K. Run
`pretrain(llama3_8b_64k(paths), endprompt_forward_step)`, and export the checkpoint with WindowExtension.export_checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer

from endprompt_megatron.integrations.bridge.data import EndPromptDatasetProvider
from endprompt_megatron.integrations.bridge.model import endprompt_model_provider
from endprompt_megatron.integrations.window_extension import WindowExtension

_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def endprompt_recipe(extension: WindowExtension, paths: list[str], **fields: Any) -> ConfigContainer:
    """Return Bridge's common pre-training config with the model, data and optimizer settings of EndPrompt. Training takes 1,907 steps of 64
    samples (1.0B tokens at a sequence length of 8,192), with a constant learning rate of 2e-5 after 20 warm-up steps.

    Args:
        extension: base model, target window and method.
        paths: training text, in the format of `paths` of EndPromptDatasetProvider.
        fields: additional fields of GPTModelProvider.
    Source: EndPrompt (arXiv 2605.14589), section on training.
    """
    config = _pretrain_common()
    config.model = endprompt_model_provider(extension, **fields)
    config.dataset = EndPromptDatasetProvider(extension=extension, paths=paths)
    _set(config.tokenizer, tokenizer_model=extension.hf_path)
    if hasattr(config.tokenizer, "use_tokenizer_vocab_size"):  # Megatron-Bridge 0.6 has this field, 0.3 does not
        _set(config.tokenizer, use_tokenizer_vocab_size=False)
    _set(config.train, train_iters=1907, global_batch_size=64, micro_batch_size=1)
    _set(config.optimizer, lr=2e-5, min_lr=2e-5, weight_decay=0.0, adam_beta2=0.95, adam_eps=1e-8)
    _set(config.scheduler, lr_decay_style="constant", lr_warmup_iters=20, start_weight_decay=0.0, end_weight_decay=0.0)
    return config


def _set(section: Any, **values: Any) -> None:
    """Set existing fields of a section, and raise AttributeError for an unknown field. Without this check, an unknown field would be added
    to the section and ignored by Bridge."""
    unknown = sorted(name for name in values if not hasattr(section, name))
    if unknown:
        raise AttributeError(f"{type(section).__name__} of the installed Megatron-Bridge has no field {unknown[0]}")
    for name, value in values.items():
        setattr(section, name, value)


def llama3_8b_64k(paths: list[str], hf_path: str = "models/llama3_8b") -> ConfigContainer:
    """Return the config of Llama-3-8B for nodes with 8 GPUs of 80 GB, with data parallelism only."""
    return endprompt_recipe(WindowExtension(hf_path, target_context_length=65536, seq_length=8192), paths, **_RECOMPUTE)


def llama3_70b_64k(paths: list[str], hf_path: str = "models/llama3_70b") -> ConfigContainer:
    """Return the config of Llama-3-70B for 8 nodes with 8 GPUs of 80 GB. The layout is TP 4, PP 4 with 5 virtual stages, and CP 2."""
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 5}
    layout |= {"context_parallel_size": 2, "sequence_parallel": True, "pipeline_dtype": torch.bfloat16}
    return endprompt_recipe(WindowExtension(hf_path, target_context_length=65536, seq_length=8192), paths, **layout, **_RECOMPUTE)
