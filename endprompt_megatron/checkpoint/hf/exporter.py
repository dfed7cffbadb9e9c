"""Write Megatron model chunks as a Hugging Face model directory: safetensors, config.json, tokenizer, provenance. Adapters are merged into
the weights on the way. Written beside its final name and renamed into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE, copy_companions
from endprompt_megatron.checkpoint.hf.config import extended_hf_config, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import merged_weights_of_whole_model
from endprompt_megatron.checkpoint.hf.mapping import Binding, bindings
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD, model_card
from endprompt_megatron.checkpoint.hf.safetensors_io import TensorPlan, plan_shards, write_index, write_shard
from endprompt_megatron.checkpoint.hf.weights import planned_tensors
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


def export_hf(
    chunks: list[EndPromptGPTModel],
    destination: Path,
    *,
    base_hf_path: Path,
    architecture: ModelArchitecture,
    rope: RopeScaling,
    target_context_length: int,
    max_shard_bytes: int,
    provenance: dict[str, Any],
) -> Path:
    """Export the model; every rank takes part, rank 0 writes.

    Args:
        chunks: this rank's model, without Megatron's wrappers.
        destination: the directory to make; an export that this function made there before is replaced, anything else is refused.
        base_hf_path: where config.json, tokenizer and generation config of the base come from.
        architecture: of the whole model.
        rope: the frequencies that the model was trained with.
        target_context_length: L.
        max_shard_bytes: size of one safetensors file.
        provenance: how the model was made; written as endprompt.json and told in README.md.
    Returns:
        destination.
    Raises:
        CheckpointError: destination holds something that is not an export.
    """
    destination = Path(destination)
    if destination.exists() and not (destination / PROVENANCE_FILE).is_file():
        raise CheckpointError(f"{destination} exists and is no export of this tool: choose another output_dir, or move it away.")
    known = {
        "base": Path(base_hf_path).name,
        "original_context_length": architecture.max_position_embeddings,
        "target_context_length": int(target_context_length),
        "rope_type": rope.type,
        "rope_factor": rope.factor,
    }
    provenance = known | provenance
    partial = destination.with_name(destination.name + ".partial")
    tensors = gather_hf_tensors(chunks, architecture)
    if global_rank() != 0:
        for _ in tensors:
            pass
        barrier()
        return destination
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    dtype = chunks[0].config.params_dtype
    _write_weights(tensors, partial, architecture, dtype, max_shard_bytes)
    config = extended_hf_config(
        read_hf_config(base_hf_path), rope, target_context_length=target_context_length, dtype=str(dtype).removeprefix("torch.")
    )
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_companions(Path(base_hf_path), partial, target_context_length)
    (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
    (partial / MODEL_CARD).write_text(model_card(provenance, base_hf_path=base_hf_path))
    move_into_place(partial, destination)
    barrier()
    return destination


def gather_hf_tensors(chunks: list[EndPromptGPTModel], architecture: ModelArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, whole tensor on the CPU) on rank 0, one Megatron parameter at a time; other ranks yield nothing but take part.

    Args:
        chunks: this rank's model.
        architecture: of the whole model.
    """
    mine = {name: weight for chunk in chunks for name, weight in merged_weights_of_whole_model(chunk).items()}
    yield from gather_tensors(bindings(architecture), mine, architecture)


def gather_tensors(
    wanted: Iterable[Binding], mine: dict[str, Callable[[], torch.Tensor]], architecture: ModelArchitecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, whole tensor on the CPU) on rank 0, one binding at a time; other ranks yield nothing but take part.

    Args:
        wanted: what to gather.
        mine: {Megatron name in the whole model: this rank's share}.
        architecture: of the whole model.
    """
    writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    owners = _owners(mine if writes else {})
    for binding in wanted:
        owner = owners[binding.megatron]
        whole: list[torch.Tensor] | None = None
        if writes and binding.megatron in mine and _stage_of_owner_is_mine(owner):
            shards = _gather_shards(mine[binding.megatron](), binding)
            if global_rank() == owner:
                whole = [tensor.contiguous().cpu() for tensor in binding.layout.join(architecture, shards)]
        yield from _hand_to_rank_zero(binding, whole, owner)


def _owners(held: dict[str, Any]) -> dict[str, int]:
    """Global rank of the first tensor-parallel rank that holds each parameter (the first stage's copy of tied embeddings)."""
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    names = list(held) if is_first else []
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    owners: dict[str, int] = {}
    for rank, theirs in enumerate(everyone):
        for name in theirs:
            owners.setdefault(name, rank)
    return owners


def _stage_of_owner_is_mine(owner: int) -> bool:
    return owner in torch.distributed.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())


def _gather_shards(tensor: torch.Tensor, binding: Binding) -> list[torch.Tensor]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    if binding.layout.tensor_parallel_dim is None or size == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(shards, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards


def _hand_to_rank_zero(binding: Binding, whole: list[torch.Tensor] | None, owner: int) -> Iterator[tuple[str, torch.Tensor]]:
    rank = global_rank()
    if owner == 0:
        if rank == 0:
            yield from zip(binding.hugging_face, whole, strict=True)
        return
    if rank not in (0, owner):
        return
    box: list[Any] = [whole]
    if rank == owner:
        torch.distributed.send_object_list(box, dst=0)
    else:
        torch.distributed.recv_object_list(box, src=owner)
        yield from zip(binding.hugging_face, box[0], strict=True)


def _write_weights(
    tensors: Iterator[tuple[str, torch.Tensor]], directory: Path, architecture: ModelArchitecture, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    shards = plan_shards(planned_tensors(architecture, dtype), max_shard_bytes)

    def next_tensor(planned: TensorPlan) -> list[torch.Tensor]:
        name, tensor = next(tensors)
        if name != planned.name:
            raise AssertionError(f"{name} gathered, {planned.name} planned")
        return [tensor]

    for file, planned in shards.items():
        write_shard(directory / file, planned, next_tensor)
    for _ in tensors:
        raise AssertionError("more tensors than planned")
    write_index(directory, shards)


def move_into_place(partial: Path, destination: Path) -> None:
    """Rename a directory that is whole to its final name; an earlier one there goes."""
    old = destination.with_name(destination.name + ".replaced")
    if old.exists():
        shutil.rmtree(old)
    if destination.exists():
        get_logger().info(f"replacing the earlier export of this run in {destination}")
        destination.rename(old)
    partial.rename(destination)
    if old.exists():
        shutil.rmtree(old)


def barrier() -> None:
    """Wait for every rank."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
