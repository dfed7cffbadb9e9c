"""Export Megatron model chunks as a Hugging Face model directory with safetensors, config.json, tokenizer and provenance. Adapters are
merged into the weights. The directory is written under a temporary name and renamed when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE, copy_auxiliary_files
from endprompt_megatron.checkpoint.hf.config import extended_hf_config, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import merged_weights_of_whole_model
from endprompt_megatron.checkpoint.hf.mapping import Binding, bindings
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD, model_card
from endprompt_megatron.checkpoint.hf.safetensors_io import TensorPlan, plan_shards, write_index, write_shard
from endprompt_megatron.checkpoint.hf.weights import planned_tensors
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.output_files import writing
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
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Export the model on rank 0. All ranks must call this function.

    The directory gets its final name after its verification. A directory that fails its verification is renamed to `destination` with the
    suffix .failed, and an earlier export is kept.

    Args:
        chunks: this rank's model chunks, without Megatron's wrappers.
        destination: directory to create. An earlier export of this function is replaced.
        base_hf_path: directory of the base model, which provides config.json, tokenizer and generation config.
        architecture: architecture of the whole model.
        rope: RoPE of the trained model.
        target_context_length: extended window L, in positions.
        max_shard_bytes: maximum size of a safetensors file.
        provenance: description of the training, written to endprompt.json and README.md.
        verify: function that is called on every rank with the complete directory, which still has a temporary name. The function must raise
            on every rank or on none. None skips the verification.
    Returns:
        destination.
    Raises:
        CheckpointError: destination exists and is not an export.
        OutputError: rank 0 cannot write the directory. An earlier export is kept.
        Exception: `verify` raised this exception.
    """
    destination = Path(destination)
    for place in (destination, *([_failed(destination)] if verify else [])):
        if place.exists() and not (place / PROVENANCE_FILE).is_file():
            raise CheckpointError(f"{place} exists and is not an export of this tool: choose another output_dir, or move it away.")
    known = {
        "base": Path(base_hf_path).name,
        "original_context_length": architecture.max_position_embeddings,
        "target_context_length": int(target_context_length),
        "rope_type": rope.type,
        "rope_factor": rope.factor,
    }
    provenance = known | provenance
    partial = _partial(destination)
    tensors = gather_hf_tensors(chunks, architecture)
    if global_rank() != 0:
        for _ in tensors:
            pass
        return _finish(partial, destination, verify)
    dtype = chunks[0].config.params_dtype
    with _partial_directory(destination):
        _write_weights(tensors, partial, architecture, dtype, max_shard_bytes)
        config = extended_hf_config(
            read_hf_config(base_hf_path), rope, target_context_length=target_context_length, dtype=str(dtype).removeprefix("torch.")
        )
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_auxiliary_files(Path(base_hf_path), partial, target_context_length)
        (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
        (partial / MODEL_CARD).write_text(model_card(provenance, base_hf_path=base_hf_path))
    return _finish(partial, destination, verify)


def _finish(partial: Path, destination: Path, verify: Callable[[Path], None] | None) -> Path:
    """Verify a written directory, and rename it on rank 0. All ranks must call this function. A failed export replaces an earlier failed
    export."""
    barrier()
    if verify is not None:
        failed = _failed(destination)
        try:
            verify(partial)
        except Exception as error:
            if global_rank() == 0:
                _move_into_place(partial, failed)
                get_logger().warning(f"the export failed its verification: it is in {failed} and not in {destination}")
            if isinstance(error, CheckpointError):
                raise CheckpointError(*(problem.replace(str(partial), str(failed)) for problem in error.problems)) from error
            raise
    if global_rank() == 0:
        _move_into_place(partial, destination)
    barrier()
    return destination


def _failed(destination: Path) -> Path:
    return destination.with_name(destination.name + ".failed")


def _partial(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


def gather_hf_tensors(chunks: list[EndPromptGPTModel], architecture: ModelArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, whole tensor on the CPU) on rank 0, one Megatron parameter at a time. All ranks must exhaust the iterator, which
    yields nothing on the other ranks.

    Args:
        chunks: this rank's model chunks.
        architecture: architecture of the whole model.
    """
    shards = {name: weight for chunk in chunks for name, weight in merged_weights_of_whole_model(chunk).items()}
    yield from gather_tensors(bindings(architecture), shards, architecture)


def gather_tensors(
    requested: Iterable[Binding], shards: dict[str, Callable[[], torch.Tensor]], architecture: ModelArchitecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, whole tensor on the CPU) on rank 0, one binding at a time. All ranks must exhaust the iterator, which yields nothing
    on the other ranks.

    Args:
        requested: bindings to gather.
        shards: {Megatron name in the whole model: function that returns this rank's shard}.
        architecture: architecture of the whole model.
    """
    writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    owners = _owners(shards if writes else {})
    for binding in requested:
        owner = owners[binding.megatron]
        whole: list[torch.Tensor] | None = None
        if writes and binding.megatron in shards and _is_in_tensor_parallel_group_of(owner):
            gathered = _gather_shards(shards[binding.megatron](), binding)
            if global_rank() == owner:
                whole = [tensor.contiguous().cpu() for tensor in binding.layout.join(architecture, gathered)]
        yield from _send_to_rank_zero(binding, whole, owner)


def _owners(held: dict[str, Any]) -> dict[str, int]:
    """Return {parameter: global rank of the first tensor-parallel rank that holds the parameter}. For tied embeddings, this rank is in the
    first pipeline stage."""
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    names = list(held) if is_first else []
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    owners: dict[str, int] = {}
    for rank, theirs in enumerate(everyone):
        for name in theirs:
            owners.setdefault(name, rank)
    return owners


def _is_in_tensor_parallel_group_of(owner: int) -> bool:
    return owner in torch.distributed.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())


def _gather_shards(tensor: torch.Tensor, binding: Binding) -> list[torch.Tensor]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    if binding.layout.tensor_parallel_dim is None or size == 1:
        return [tensor]
    shards = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(shards, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards


def _send_to_rank_zero(binding: Binding, whole: list[torch.Tensor] | None, owner: int) -> Iterator[tuple[str, torch.Tensor]]:
    rank = global_rank()
    if owner == 0:
        if rank == 0:
            assert whole is not None  # the owner gathered the tensors
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


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory to write to. After the block, the directory is renamed to `destination`, and an earlier export of that name
    is deleted. If the block fails, the new directory is deleted to free disk space.

    Raises:
        OutputError: the directory cannot be written. An earlier export is kept.
    """
    with _partial_directory(destination) as partial:
        yield partial
    _move_into_place(partial, destination)


@contextmanager
def _partial_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory beside `destination`, and delete it if the block fails.

    Raises:
        OutputError: the directory cannot be written.
    """
    partial = _partial(destination)
    with writing(destination):
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _move_into_place(partial: Path, destination: Path) -> None:
    """Rename a complete directory to its final name, and delete an earlier export of that name.

    Raises:
        OutputError: the directory cannot be renamed. The earlier export is kept, and the new directory is deleted to free disk space.
    """
    old = destination.with_name(destination.name + ".replaced")
    with writing(destination):
        try:
            if old.exists():
                shutil.rmtree(old)
            if destination.exists():
                get_logger().info(f"replacing the earlier export of this run in {destination}")
                destination.rename(old)
            try:
                partial.rename(destination)
            except OSError:
                if old.exists():
                    old.rename(destination)
                raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)  # the next export deletes remaining files


def barrier() -> None:
    """Wait for every rank."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
