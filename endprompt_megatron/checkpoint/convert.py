"""Convert between Hugging Face directories and torch_dist directories of megatron.core in blocks of rows. A conversion needs no process
group and only a few megabytes of memory. An interrupted conversion continues when it is started again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE, check_links, copy_auxiliary_files, copy_files
from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, extended_hf_config, known_fields, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.mapping import Binding, bindings
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD, model_card
from endprompt_megatron.checkpoint.hf.no_code import refuse_code
from endprompt_megatron.checkpoint.hf.safetensors_io import (
    BLOCK_BYTES,
    FileRange,
    SafetensorsReader,
    TensorPlan,
    plan_shards,
    row_blocks,
    write_index,
    write_shard,
)
from endprompt_megatron.checkpoint.hf.tokenizer import check_token_ids, load_tokenizer
from endprompt_megatron.checkpoint.hf.transformers_config import check_same_config
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights, is_finite, not_finite, planned_tensors
from endprompt_megatron.checkpoint.lora_reader import open_torch_dist
from endprompt_megatron.checkpoint.megatron_model import AUXILIARY_FOLDER, MegatronModel
from endprompt_megatron.checkpoint.resumable_directory import ResumableDirectory
from endprompt_megatron.checkpoint.torch_dist.read import TorchDistReader
from endprompt_megatron.checkpoint.torch_dist.write import DistcpWriter, StoredChunks, extra_state_keys, write_metadata
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import Progress, get_logger
from endprompt_megatron.planning.architecture import ModelArchitecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMAT = 1
_FILES_AT_ONCE = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class ConversionPlan:
    """The files, sizes and memory of a conversion.

    Attributes:
        files: {file name: bytes of weights}.
        dtype: dtype of the written weights.
        largest_tensor: size of the largest tensor in bytes.
        memory_bytes: upper bound on the memory of the conversion in bytes, without the memory of the Python interpreter.
    """

    files: dict[str, int]
    dtype: torch.dtype
    largest_tensor: int
    memory_bytes: int

    def describe(self) -> str:
        """Return the plan as text."""
        total = sum(self.files.values())
        return (
            f"{total / 1e9:.1f} GB of {str(self.dtype).removeprefix('torch.')} weights in {len(self.files)} file(s) of at most "
            f"{max(self.files.values()) / 1e9:.1f} GB; largest tensor {self.largest_tensor / 1e9:.2f} GB; memory at most "
            f"{self.memory_bytes / 2**20:.0f} MiB over the interpreter's own"
        )


def plan_conversion(
    architecture: ModelArchitecture, *, dtype: torch.dtype, max_shard_bytes: int, to_megatron: bool, tensor_parallel_size: int = 1
) -> ConversionPlan:
    """Plan the files, sizes and memory of a conversion from the architecture, without reading weights."""
    if to_megatron:
        groups = _assign_to_files(architecture, dtype, max_shard_bytes, tensor_parallel_size)
        sizes = {file: [_size(binding, architecture, dtype, tensor_parallel_size) for binding in group] for file, group in groups.items()}
    else:
        shards = plan_shards(planned_tensors(architecture, dtype), max_shard_bytes)
        sizes = {file: [tensor.num_bytes for tensor in shard] for file, shard in shards.items()}
    widest = max(architecture.hidden_size, architecture.ffn_hidden_size, architecture.num_attention_heads * architecture.head_dim) * 4
    return ConversionPlan(
        {file: sum(found) for file, found in sizes.items()},
        dtype,
        max(max(found) for found in sizes.values()),
        # each open file needs memory for a block as read, as converted and as gathered from shards; headers and metadata need 64 MiB
        _FILES_AT_ONCE * 4 * max(BLOCK_BYTES, widest) + 2**26,
    )


def hf_to_megatron(
    hf_path: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel_size: int = 1,
    max_shard_bytes: int = 5 * 10**9,
    sync: bool = True,
) -> Path:
    """Convert a Hugging Face directory into a torch_dist directory, which Megatron-Core loads in any layout.

    Args:
        hf_path: model directory.
        destination: directory to create.
        dtype: dtype of the written weights; None keeps the dtype of the source.
        tensor_parallel_size: number of shards of each matrix. A run with this tensor-parallel size then reads only its own shard on each
            rank. The vocabulary is also padded for this size.
        max_shard_bytes: maximum size of a .distcp file.
        sync: fsync all files before returning, so that the result survives a power failure.
    Returns:
        destination.
    Raises:
        CheckpointError: the source is incomplete or not a supported model, or destination exists or is not writable.
    """
    hf_path = Path(hf_path)
    refuse_code(hf_path)
    check_links(hf_path)
    config = read_hf_config(hf_path)
    architecture = architecture_from_hf(config)
    check_hf_weights(hf_path, architecture)
    check_same_config(hf_path, architecture, rope_from_hf(config))
    if (hf_path / "tokenizer.json").is_file():
        check_token_ids(hf_path, load_tokenizer(hf_path), num_rows=architecture.vocab_size)
    _check_tensor_parallel(architecture, tensor_parallel_size)
    with SafetensorsReader(hf_path) as reader:
        dtype = dtype or _common_dtype(reader.dtype(name) for name in reader.names())
        groups = _assign_to_files(architecture, dtype, max_shard_bytes, tensor_parallel_size)
        identity = _identity(
            [*reader.files(), hf_path / "config.json"],
            dtype=str(dtype),
            shares=tensor_parallel_size,
            files=list(groups),
            boot=_boot_id(sync),
        )
        count = sum(len(group) for group in groups.values())
        with ResumableDirectory(destination, identity, sync=sync) as output, Progress("converting", count) as progress:

            def make(file: str) -> StoredChunks:
                group, note = groups[file], StoredChunks.from_json(output.note_of(file) or "")
                if note is not None:
                    progress.advance(len(group))
                    return note
                with (
                    SafetensorsReader(hf_path, reuse_memory=True) as own,  # each read overwrites the tensor that the previous read returned
                    output.writing(file) as (path, notes),
                ):
                    written = _write_distcp(path, group, own, architecture, dtype, tensor_parallel_size, progress, sync)
                    notes.append(written.to_json())
                    return written

            stored = dict(zip(groups, _in_threads(make, groups), strict=True))
            write_metadata(output.partial, stored, dtype=dtype)
            auxiliary = output.partial / AUXILIARY_FOLDER
            shutil.rmtree(auxiliary, ignore_errors=True)
            auxiliary.mkdir()
            copy_auxiliary_files(hf_path, auxiliary)
            (auxiliary / "config.json").write_text(json.dumps(known_fields(config), indent=2) + "\n")
            copy_files(hf_path, auxiliary, (MODEL_CARD, PROVENANCE_FILE))
            return output.finish()


def megatron_to_hf(
    model: MegatronModel,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    sync: bool = True,
) -> Path:
    """Convert a torch_dist directory of any parallel layout into a complete Hugging Face model directory. The adapters of a training run
    are merged.

    Args:
        model: model to convert, from megatron_model.describe_megatron_model.
        destination: directory to create.
        dtype: dtype of the written weights; None keeps the dtype of the source.
        max_shard_bytes: maximum size of a safetensors file.
        sync: see hf_to_megatron.
    Returns:
        destination.
    Raises:
        CheckpointError: weights are missing or belong to another model, or destination exists or is not writable.
    """
    architecture = model.architecture
    refuse_code(model.base_hf_path)
    check_links(model.base_hf_path)
    with open_torch_dist(model.directory, architecture, model.adapter) as reader:
        reader.check(architecture)
        for name in reader.unknown_names(architecture):
            get_logger().warning(f"{model.directory}: {name} is not a weight of this model and is not converted")
        every = list(bindings(architecture))
        dtype = dtype or _common_dtype(reader.dtype(binding.megatron) for binding in every)
        shards = plan_shards(planned_tensors(architecture, dtype), max_shard_bytes)
        source_of = {name: (binding, index) for binding in every for index, name in enumerate(binding.hugging_face)}
        files = [*reader.files(), model.directory / ".metadata", model.base_hf_path / "config.json"]
        meaning = {"rope": str(model.rope), "window": model.context_length, "adapter": str(model.adapter)}
        identity = _identity(files, dtype=str(dtype), files=list(shards), boot=_boot_id(sync), **meaning)
        with ResumableDirectory(destination, identity, sync=sync) as output, Progress("converting", len(source_of)) as progress:

            def make(file: str) -> None:
                if output.note_of(file) is not None:
                    progress.advance(len(shards[file]))
                    return
                with reader.for_thread() as own, output.writing(file) as (path, _):
                    write_shard(path, shards[file], partial(blocks, own), sync=sync)

            def blocks(own: TorchDistReader, tensor: TensorPlan) -> Iterator[torch.Tensor | FileRange]:
                binding, source = source_of[tensor.name]
                for first, last in binding.layout.rows_of_source(architecture, source):
                    yield from _rows(own, binding.megatron, first, last, dtype)
                progress.advance()

            _in_threads(make, shards)
            write_index(output.partial, shards)
            _write_auxiliary_files(output.partial, model, dtype)
            return output.finish()


def _in_threads(make: Callable[[str], Any], files: Iterable[str]) -> list[Any]:
    """Call `make` for each file in a few threads, and return the results in order. The kernel copies the data, so other copies continue
    while one copy waits for the disk."""
    pool = ThreadPoolExecutor(_FILES_AT_ONCE)
    try:
        return [made.result() for made in [pool.submit(make, file) for file in files]]
    finally:
        pool.shutdown(cancel_futures=True)


def _write_auxiliary_files(directory: Path, model: MegatronModel, dtype: torch.dtype) -> None:
    config = extended_hf_config(
        model.base_config, model.rope, target_context_length=model.context_length, dtype=str(dtype).removeprefix("torch.")
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    extended = model.context_length != model.architecture.max_position_embeddings
    copy_auxiliary_files(model.base_hf_path, directory, model.context_length if extended else None)
    if model.provenance is not None:
        (directory / PROVENANCE_FILE).write_text(json.dumps(model.provenance, indent=2) + "\n")
        (directory / MODEL_CARD).write_text(model_card(model.provenance, base_hf_path=model.base_hf_path))
        return
    copy_files(model.base_hf_path, directory, (MODEL_CARD, PROVENANCE_FILE))


def _write_distcp(
    path: Path,
    group: list[Binding],
    reader: SafetensorsReader,
    architecture: ModelArchitecture,
    dtype: torch.dtype,
    size: int,
    progress: Progress,
    sync: bool,
) -> StoredChunks:
    with DistcpWriter(path, tensor_parallel_size=size, sync=sync) as writer:
        for binding in group:
            layout = binding.layout
            writer.write_parameter(
                binding.megatron,
                layout.megatron_shape(architecture, size),
                dtype,
                dim=layout.tensor_parallel_dim,
                parts=layout.parts,
                blocks=partial(_megatron_rows, binding, reader, architecture, dtype),
            )
            if binding.megatron.endswith("mlp.linear_fc2.weight"):
                for key in extra_state_keys(int(binding.megatron.split(".")[2]), architecture.num_layers):
                    writer.write_object(key, [None])
            progress.advance()
    return writer.stored


def _megatron_rows(
    binding: Binding,
    reader: SafetensorsReader,
    architecture: ModelArchitecture,
    dtype: torch.dtype,
    first: int,
    last: int,
    may_be_ranges: bool,
) -> Iterator[torch.Tensor | FileRange]:
    """Yield rows first .. last-1 of a whole Megatron parameter. Padding rows are zero."""
    shape = binding.layout.megatron_shape(architecture)
    for piece in binding.layout.pieces(architecture, first, last):
        yield from _rows(reader, binding.hugging_face[piece.source], piece.first, piece.last, dtype, may_be_ranges)
        first += piece.last - piece.first
    for low, high in row_blocks(last, dtype.itemsize * math.prod(shape[1:]), first):
        yield torch.zeros((high - low, *shape[1:]), dtype=dtype)


def _rows(
    reader: SafetensorsReader | TorchDistReader, name: str, first: int, last: int, dtype: torch.dtype, may_be_ranges: bool = True
) -> Iterator[torch.Tensor | FileRange]:
    """Yield rows first .. last-1 of a stored tensor in `dtype`: one file range if the rows need no conversion, else blocks.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for `dtype`, or the tensor has no floating-point dtype.
    """
    stored = reader.dtype(name)
    if not stored.is_floating_point:
        raise CheckpointError(f"{name} has dtype {stored}: only floating-point weights can be converted.")
    where = reader.range_of_rows(name, first, last) if may_be_ranges and stored == dtype else None
    for low, high in row_blocks(last, stored.itemsize * math.prod(reader.shape(name)[1:]), first):
        block = reader.rows(name, low, high)
        if not is_finite(block):
            raise not_finite(int((~block.isfinite()).sum()), f"{name}, from row {low:,}")
        if where is not None:  # the block is now in the page cache, and the kernel copies it from there
            continue
        converted = block.to(dtype)
        if not is_finite(converted):
            raise CheckpointError(
                f"{name} holds {float(block.abs().max()):g}, more than {dtype} can represent: choose --dtype bfloat16 or float32."
            )
        yield converted
    if where is not None:
        yield where


def _assign_to_files(architecture: ModelArchitecture, dtype: torch.dtype, max_bytes: int, size: int) -> dict[str, list[Binding]]:
    """Assign the parameters to .distcp files in order. Return {file name: parameters}."""
    groups: list[list[Binding]] = []
    room = 0
    for binding in bindings(architecture):
        needed = _size(binding, architecture, dtype, size)
        if not groups or needed > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(binding)
        room -= needed
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


def _size(binding: Binding, architecture: ModelArchitecture, dtype: torch.dtype, size: int) -> int:
    return dtype.itemsize * math.prod(binding.layout.megatron_shape(architecture, size))


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    found = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    if len(found) > 1 or found[0] not in DTYPES:
        raise CheckpointError(f"the weights have the types {', '.join(found)}: choose the one to write with --dtype {' | '.join(DTYPES)}.")
    return DTYPES[found[0]]


def _check_tensor_parallel(architecture: ModelArchitecture, size: int) -> None:
    for what, count in (
        ("attention heads", architecture.num_attention_heads),
        ("KV heads", architecture.num_query_groups),
        ("feed-forward columns", architecture.ffn_hidden_size),
    ):
        if size < 1 or count % size:
            raise CheckpointError(f"--tensor-model-parallel-size={size}: must divide the model's {count} {what}. Choose another.")


def _boot_id(sync: bool) -> str:
    """Return the boot id if files are not fsynced, else an empty string. Files that are not fsynced are reusable only until the machine
    reboots."""
    identity = Path("/proc/sys/kernel/random/boot_id")
    return "" if sync else identity.read_text().strip() if identity.is_file() else "unknown"


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _identity(source: Iterable[Path], **options: Any) -> dict[str, Any]:
    """Return the identity of a conversion: a hash of the names, sizes and times of its source files, and all of its options. An interrupted
    conversion continues only if its identity is equal."""
    stats = {str(path.resolve()): _stamp(path.stat()) for path in source if path.exists()}
    digest = hashlib.sha256(json.dumps(stats, sort_keys=True).encode()).hexdigest()
    return {"format": _FORMAT, "torch": torch.__version__, "source": digest, **options}
