"""Export trained adapters as a peft directory with adapter_config.json and adapter_model.safetensors. The embedding and the norms are
included if they were trained. The adapter must be loaded onto the base with the extended RoPE, which peft cannot store. The directory is
written under a temporary name and renamed when it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.exporter import barrier, gather_tensors, new_directory
from endprompt_megatron.checkpoint.hf.importer import adapters_of_whole_model, merged_weights_of_whole_model
from endprompt_megatron.checkpoint.hf.mapping import Binding, Layout, Segment, bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import TensorPlan, write_shard
from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import global_rank
from endprompt_megatron.model.adapters import OUTPUT_TARGET, adapter_name
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.planning.architecture import ModelArchitecture

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_README = """# LoRA adapter in peft's format

The adapter was trained with a different RoPE from the one in `config.json` of the base, and an adapter cannot store a RoPE. Load the
base with the configuration of the merged model, then load the adapter:

    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained("../hf")  # the RoPE scaling and the window
    model = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
    model = PeftModel.from_pretrained(model, ".")

`../hf` contains the same model with the adapter merged, and does not need peft.
"""


def export_peft_adapter(
    chunks: list[EndPromptGPTModel], destination: Path, *, base_hf_path: Path, architecture: ModelArchitecture, adapter: AdapterConfig
) -> Path:
    """Write the adapters on rank 0. All ranks must call this function.

    Args:
        chunks: this rank's model chunks, without Megatron's wrappers.
        destination: directory to create. An earlier adapter directory is replaced.
        base_hf_path: directory of the base model.
        architecture: architecture of the whole model.
        adapter: adapter settings of the run.
    Returns:
        destination.
    Raises:
        CheckpointError: destination exists and is not an adapter directory.
        OutputError: rank 0 cannot write the directory. An earlier adapter is kept.
    """
    destination = Path(destination)
    if destination.exists() and not (destination / CONFIG_FILE).is_file():
        raise CheckpointError(f"{destination} exists and is not an adapter of this tool: choose another output_dir, or move it away.")
    shards: dict[str, Callable[[], torch.Tensor]] = {}
    for chunk in chunks:
        shards |= merged_weights_of_whole_model(chunk) | adapters_of_whole_model(chunk)
    requested = list(_adapter_bindings(architecture, adapter))
    tensors = gather_tensors(requested, shards, architecture)
    if global_rank() != 0:
        for _ in tensors:
            pass
        barrier()
        return destination
    with new_directory(destination) as partial:
        _write_weights(tensors, requested, partial / WEIGHTS_FILE, architecture, adapter, chunks[0].config.params_dtype)
        (partial / CONFIG_FILE).write_text(json.dumps(_peft_config(adapter, architecture, base_hf_path), indent=2) + "\n")
        (partial / "README.md").write_text(_README.format(base=str(base_hf_path)))
    barrier()
    return destination


def _adapter_bindings(architecture: ModelArchitecture, adapter: AdapterConfig) -> Iterator[Binding]:
    """Yield the bindings in file order: the embedding and the norms if they were trained, then A and B of each adapter."""
    for binding in bindings(architecture):
        first = binding.hugging_face[0]
        if (adapter.train_embeddings and first == _EMBEDDING) or (adapter.train_norms and first.endswith("norm.weight")):
            yield Binding(binding.megatron, (_PREFIX + first,), binding.layout)
    for layer in range(architecture.num_layers):
        for target in adapter.target_modules:
            is_output = target == OUTPUT_TARGET
            linear = f"decoder.layers.{layer}.self_attention.linear_{'proj' if is_output else 'qkv'}."
            inputs, outputs = _sizes(architecture, target)
            cut = (1, None) if is_output else (None, 0)  # dimension of A and of B that is split over tensor-parallel ranks
            for matrix, shape, dim in zip("AB", ((adapter.rank, inputs), (outputs, adapter.rank)), cut, strict=True):
                name = f"{_PREFIX}model.layers.{layer}.self_attn.{target}.lora_{matrix}.weight"
                yield Binding(linear + adapter_name(target, matrix), (name,), _layout(dim, shape))


def _sizes(architecture: ModelArchitecture, target: str) -> tuple[int, int]:
    """Return (number of inputs, number of outputs) of a projection."""
    queries = architecture.num_attention_heads * architecture.head_dim
    if target == OUTPUT_TARGET:
        return queries, architecture.hidden_size
    return architecture.hidden_size, queries if target == "q_proj" else architecture.num_query_groups * architecture.head_dim


def _layout(dim: int | None, shape: tuple[int, int]) -> Layout:
    return Layout(dim, lambda arch: [shape], lambda arch: [Segment(0, 0, shape[0])])


def _write_weights(
    tensors: Iterator[tuple[str, torch.Tensor]],
    requested: list[Binding],
    path: Path,
    architecture: ModelArchitecture,
    adapter: AdapterConfig,
    dtype: torch.dtype,
) -> None:
    plans: list[TensorPlan] = []
    for binding in requested:
        shape = binding.layout.shapes(architecture)[0]
        plans.append(TensorPlan(binding.hugging_face[0], dtype, shape))
        if binding.hugging_face[0] == _PREFIX + _EMBEDDING and architecture.tied_embeddings:
            # peft unties modules_to_save, so both copies must be the trained weights
            plans.append(TensorPlan(_PREFIX + _HEAD, dtype, shape))
    last: list[tuple[str, torch.Tensor]] = []

    def next_tensor(planned: TensorPlan) -> list[torch.Tensor]:
        if planned.name != _PREFIX + _HEAD:
            last[:] = [next(tensors)]
            if last[0][0] != planned.name:
                raise AssertionError(f"{last[0][0]} gathered, {planned.name} planned")
        return [last[0][1]]

    write_shard(path, plans, next_tensor)
    for _ in tensors:
        raise AssertionError("more tensors than planned")


def _peft_config(adapter: AdapterConfig, architecture: ModelArchitecture, base_hf_path: Path) -> dict[str, Any]:
    saved = []
    if adapter.train_embeddings:
        saved += ["embed_tokens", *(["lm_head"] if architecture.tied_embeddings else [])]
    if adapter.train_norms:
        saved += ["input_layernorm", "post_attention_layernorm", "norm", *(["q_norm", "k_norm"] if architecture.qk_norm else [])]
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_hf_path),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapter.target_modules),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
