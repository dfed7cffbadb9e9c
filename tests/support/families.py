"""A small random model of every supported family, built by transformers' own classes and stored with a config.json as its makers publish
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random

_LLAMA3_BANDS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.40.0",
}  # fmt: skip
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1, "attention_bias": False}
_QWEN = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    # no rope_theta, as many KV heads as heads
    "llama2": {**_LLAMA, "num_key_value_heads": 4, "rope_scaling": None},
    "llama3": {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": None},
    "llama3.1": {**_LLAMA, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_BANDS, "max_position_embeddings": 512, "mlp_bias": False},
    "llama3.2": {
        **_LLAMA, "rope_theta": 500000.0, "rope_scaling": {**_LLAMA3_BANDS, "factor": 32.0}, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "head_dim": 16, "mlp_bias": False,
    },
    "mistral-v0.3": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "smollm2": {**_LLAMA, "rope_theta": 100000, "tie_word_embeddings": True, "rope_interleaved": False, "is_llama_config": True},
    "qwen2.5": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True, **_QWEN},
    "qwen2.5-yarn": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0, **_QWEN, "max_position_embeddings": 512,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 128, "type": "yarn"},
    },
    # heads wider than hidden_size / heads
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1000000, "head_dim": 32, "attention_bias": False,
        **_QWEN, "sliding_window": None, "rope_scaling": None, "tie_word_embeddings": True,
    },
}  # fmt: skip


def build_family(name: str, destination: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write the family's small model; weights at a scale at which attention is neither flat nor one-hot, norms and biases not trivial.

    Args:
        name: key of FAMILIES.
        destination: directory to make.
        changes: fields of config.json.
    """
    config = {**SIZES, **FAMILIES[name], "torch_dtype": str(dtype).removeprefix("torch."), **changes}
    build_tiny_random(destination, vocab_size=config["vocab_size"], tie=False)  # its tokenizer
    (destination / "config.json").write_text(json.dumps(config, indent=2))
    (destination / "model.safetensors").unlink()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_loaded_config(destination), dtype=torch.float32)
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread, centre = 0.3, 0.0 if tensor_name.endswith("bias") else 1.0
            else:
                spread, centre = parameter.shape[-1] ** -0.5, 0.0
            parameter.normal_(centre, spread)
            if "embed" in tensor_name:
                parameter.normal_(0.0, 1.0)
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def _loaded_config(directory: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)
