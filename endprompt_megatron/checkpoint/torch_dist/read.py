"""Read model weights from directories of megatron.core.dist_checkpointing (torch_dist) in blocks of rows. The reader needs no process
group, and the model may be larger than the memory. write.py writes such directories.

A torch_dist directory is a distributed checkpoint of torch. `.metadata` is a pickle with the global shape of every tensor, its chunks, and
the file position of each chunk. The *.distcp files contain one `torch.save` archive per chunk. Megatron adds metadata.json and common.pt.
Layers are either stacked (`decoder.layers.<name>`, with the layer as first dimension) or numbered (`decoder.layers.7.<name>`).
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from endprompt_megatron.checkpoint.hf.mapping import FUSED_NAMES, bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import BLOCK_BYTES, FileRange, empty, read_tensor
from endprompt_megatron.checkpoint.training_directory import RUN_FILE
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.mcore.unpickling import METADATA_FILE, load_archive, read_metadata
from endprompt_megatron.model.adapters import is_adapter
from endprompt_megatron.output_files import path_inside
from endprompt_megatron.planning.architecture import ModelArchitecture

LAYERS = "decoder.layers."
_PREFIXES = ("", "module.", "model.")  # NeMo prefixes names with the name of its wrapper
_NO_WEIGHTS = re.compile(r"(^|\.)(optimizer|random_state|rng_state|rerun_state_machine_state|opt_param_scheduler)\b|_extra_state")

_BROKEN_ARCHIVE = (
    OSError, EOFError, RuntimeError, ValueError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, struct.error,
)  # fmt: skip


def find_torch_dist(path: Path) -> Path:
    """Return the torch_dist directory for `path`: `path` itself, or the newest checkpoint in a run directory of this project, Megatron-LM
    or NeMo.

    Raises:
        CheckpointError: no torch_dist directory was found.
    """
    path = Path(path)
    for candidate in (path, path / "weights"):
        if (candidate / METADATA_FILE).is_file():
            return _check_backend(candidate)
    pointer = path / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        iteration = _read_pointer(pointer)
        return find_torch_dist(path / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration))
    for directory in (path, path / "checkpoints"):
        latest = directory / "latest"
        if latest.is_file():
            return find_torch_dist(directory / _read_pointer(latest))
    raise CheckpointError(
        f"{path}: no {METADATA_FILE} of a torch_dist checkpoint in it or in weights/, and no checkpoints of a run. Give the directory "
        f"that contains {METADATA_FILE} and *.distcp files."
    )


def _read_pointer(pointer: Path) -> str:
    try:
        name = pointer.read_text().strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise CheckpointError(f"{pointer} cannot be read ({error}): write the name of a checkpoint into it.") from error
    if name.startswith(".") or path_inside(pointer.parent, name) is None:
        raise CheckpointError(f"{pointer} does not name a checkpoint of its directory ({name[:80]!r}): write the name of one into it.")
    return name


def _check_backend(directory: Path) -> Path:
    description = directory / "metadata.json"
    if description.is_file():
        try:
            backend = json.loads(description.read_text()).get("sharded_backend", "torch_dist")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{description} is damaged ({error}). Copy it again.") from error
        if backend != "torch_dist":
            raise CheckpointError(
                f"{directory} is a checkpoint of the format {backend}: only torch_dist is supported. Save it again as torch_dist."
            )
    return directory


@dataclass(frozen=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    position: int  # position of its archive in the file
    length: int


class TorchDistReader:
    """Reads model weights of a torch_dist directory by their names in the whole model. Use as a context manager.

    Args:
        path: see find_torch_dist.
        reuse_memory: see SafetensorsReader.
    Raises:
        CheckpointError: the directory does not exist or cannot be read.
    """

    def __init__(self, path: Path, *, reuse_memory: bool = False):
        self.directory = find_torch_dist(path)
        self._metadata = read_metadata(self.directory)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in self._metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix + "decoder.") for name in self._tensors)), "")
        self._begin(reuse_memory=reuse_memory)

    def _begin(self, *, reuse_memory: bool) -> None:
        self._scratch, self._gathered = (torch.empty(BLOCK_BYTES, dtype=torch.uint8) if reuse_memory else None for _ in range(2))
        self._chunks: dict[str, list[_Chunk]] = {}
        self._descriptors: dict[Path, int] = {}
        self._positions: dict[tuple[Path, int], int | None] = {}
        self._whole: tuple[Any, torch.Tensor] | None = None

    def for_thread(self) -> TorchDistReader:
        """Return a second reader of the directory for another thread, with `reuse_memory`. The metadata is not parsed again."""
        other = copy.copy(self)
        other._begin(reuse_memory=True)
        return other

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def prefix(self) -> str:
        """Prefix of all parameter names, e.g. the name of a wrapper module."""
        return self._prefix

    @property
    def stacked(self) -> bool:
        """Whether layers are stacked into one tensor per name."""
        return self._locate(LAYERS + "0.self_attention.linear_proj.weight")[1] is not None

    def keys(self) -> dict[str, TensorStorageMetadata]:
        """Return the metadata of all tensors in the directory, including optimizer states, by key."""
        return self._tensors

    def files(self) -> list[Path]:
        """Return the files that contain tensors."""
        return sorted({self.directory / info.relative_path for info in self._metadata.storage_data.values()})

    def unknown_names(self, architecture: ModelArchitecture) -> list[str]:
        """Return the names of tensors that are neither weights of this architecture nor states of an optimizer or a random generator."""
        known = {self._locate(binding.megatron)[0] for binding in bindings(architecture)}
        return sorted(name for name in self._tensors if name not in known and not _NO_WEIGHTS.search(name))

    def adapters(self) -> list[str]:
        """Return the keys of the weights of low-rank adapters."""
        return sorted(name for name in self._tensors if is_adapter(name) and not _NO_WEIGHTS.search(name))

    def holds(self, name: str) -> bool:
        """Return whether the directory contains a parameter of the whole model."""
        return self._locate(name)[0] in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter. `name` is its Megatron name in the whole model, with the layer number."""
        key, layer = self._locate(name)
        size = tuple(self._entry(key, name).size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter."""
        return self._entry(self._locate(name)[0], name).properties.dtype

    def check(self, architecture: ModelArchitecture) -> None:
        """Compare names and shapes with an architecture, without reading weights.

        Raises:
            CheckpointError: a weight is missing, has another shape, or is not part of the architecture.
        """
        for binding in bindings(architecture):
            found, expected = self.shape(binding.megatron), binding.layout.megatron_shape(architecture)
            if binding.layout.padded and found[0] >= architecture.vocab_size:
                expected = (found[0], *expected[1:])  # vocabulary padding differs between programs
            if found != expected:
                raise CheckpointError(
                    f"{self.directory}: {binding.megatron} has shape {list(found)}, but the model's config requires {list(expected)}."
                )
            key, layer = self._locate(binding.megatron)
            if layer is not None and self._tensors[key].size[0] != architecture.num_layers:
                raise CheckpointError(
                    f"{self.directory}: {key} holds {self._tensors[key].size[0]} layers, the model's config says {architecture.num_layers}."
                )
        adapters = self.adapters()
        if adapters:
            raise CheckpointError(
                f"{self.directory} contains {len(adapters)} adapter weights, e.g. {adapters[0]}, but not their scale (alpha): give the "
                f"checkpoint of the run that trained them, with its {RUN_FILE}."
            )
        unexpected = [name for name in self.unknown_names(architecture) if re.search(r"(^|\.)(decoder|embedding|output_layer)\.", name)]
        if unexpected:
            raise CheckpointError(
                f"{self.directory}: {len(unexpected)} weights do not belong to this model, e.g. {', '.join(unexpected[:3])}. A "
                f"Hugging Face model without them would be another model: check that the base is the right one."
            )

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return rows first .. last-1 of a parameter, assembled from its chunks.

        Raises:
            CheckpointError: the parameter is missing, or its chunks do not cover the rows.
        """
        key, layer = self._locate(name)
        entry = self._entry(key, name)
        lead = () if layer is None else (layer,)
        shape = tuple(entry.size)[len(lead) :]
        found: torch.Tensor | None = None
        filled = 0
        for chunk in self._chunks_of(key):
            if layer is not None and not chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                continue
            offsets, sizes = chunk.offsets[len(lead) :], chunk.sizes[len(lead) :]
            low, high = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if low >= high:
                continue
            block = self._rows_of_chunk(
                chunk, entry.properties.dtype, () if layer is None else (layer - chunk.offsets[0],), low - offsets[0], high - offsets[0]
            )
            if block.shape == (last - first, *shape[1:]):
                return block
            if found is None:
                found = empty((last - first, *shape[1:]), entry.properties.dtype, self._gathered)
            place = (slice(low - first, high - first), *(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)))
            found[place] = block
            filled += block.numel()
        if found is None or filled != found.numel():
            raise CheckpointError(f"{self.directory}: the chunks of {key} do not cover rows {first} to {last - 1}. Is a file missing?")
        return found

    def range_of_rows(self, name: str, first: int, last: int) -> FileRange | None:
        """Return the file range of rows first .. last-1 of a parameter, or None if the rows are not contiguous in one file."""
        key, layer = self._locate(name)
        entry = self._entry(key, name)
        lead = 0 if layer is None else 1
        for chunk in self._chunks_of(key):
            offsets, sizes = chunk.offsets[lead:], chunk.sizes[lead:]
            is_layer = layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
            is_whole = sizes[1:] == tuple(entry.size)[lead + 1 :] and offsets[0] <= first and last <= offsets[0] + sizes[0]
            if is_layer and is_whole:
                position = self._position_of(chunk, entry.properties.dtype)
                row_bytes = entry.properties.dtype.itemsize * math.prod(sizes[1:])
                skipped = 0 if layer is None else (layer - chunk.offsets[0]) * sizes[0]
                if position is not None:
                    start = position + (skipped + first - offsets[0]) * row_bytes
                    return FileRange(self._open(chunk.path), start, (last - first) * row_bytes)
        return None

    def layout(self) -> str:
        """Return a text that states whether layers are stacked or numbered, and the number of tensor-parallel shards."""
        key = next((name for name in self._tensors if name.endswith("linear_proj.weight") and not _NO_WEIGHTS.search(name)), None)
        if key is None:
            return "no attention weights"
        layers = self._tensors[key].size[0] if self.stacked else 1
        return f"layers {'stacked' if self.stacked else 'numbered'}, {len(self._chunks_of(key)) // layers} tensor-parallel share(s)"

    def _entry(self, key: str, name: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise CheckpointError(f"{self.directory}: no weight {name} (nor {key}) in it. Is it a complete checkpoint of this model?")
        return self._tensors[key]

    def _locate(self, name: str) -> tuple[str, int | None]:
        """Return (key in the directory, layer index if layers are stacked) of a parameter of the whole model."""
        if not name.startswith(LAYERS):
            return self._prefix + name, None
        layer, rest = name.removeprefix(LAYERS).split(".", 1)
        for spelled in (rest, FUSED_NAMES.get(rest, rest)):
            if f"{self._prefix}{LAYERS}{layer}.{spelled}" in self._tensors:
                return f"{self._prefix}{LAYERS}{layer}.{spelled}", None
            if f"{self._prefix}{LAYERS}{spelled}" in self._tensors:
                return f"{self._prefix}{LAYERS}{spelled}", int(layer)
        return f"{self._prefix}{LAYERS}{FUSED_NAMES.get(rest, rest)}", int(layer)

    def _chunks_of(self, key: str) -> list[_Chunk]:
        if key not in self._chunks:
            storage = self._metadata.storage_data
            found = []
            for chunk in self._tensors[key].chunks:
                info = storage.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise CheckpointError(
                        f"{self.directory / METADATA_FILE} has no file position of {key} at {list(chunk.offsets)}. Copy it again."
                    )
                path = self.directory / info.relative_path
                found.append(_Chunk(tuple(chunk.offsets), tuple(chunk.sizes), path, info.offset, info.length))
            self._chunks[key] = found
        return self._chunks[key]

    def _rows_of_chunk(self, chunk: _Chunk, dtype: torch.dtype, lead: tuple[int, ...], first: int, last: int) -> torch.Tensor:
        position = self._position_of(chunk, dtype)
        if position is None:  # the rows are not contiguous, which is rare, so the whole chunk is read
            where = (chunk.path, chunk.position)
            if self._whole is None or self._whole[0] != where:
                archive = _FileSlice(self._open(chunk.path), chunk.position, chunk.length)
                self._whole = (where, load_archive(archive, where=chunk.path))
            whole = self._whole[1]
            return (whole[lead[0]] if lead else whole)[first:last]
        sizes = chunk.sizes[len(lead) :]
        row_bytes = dtype.itemsize * math.prod(sizes[1:])
        skipped = lead[0] * sizes[0] + first if lead else first
        return read_tensor(self._open(chunk.path), position + skipped * row_bytes, (last - first, *sizes[1:]), dtype, scratch=self._scratch)

    def _position_of(self, chunk: _Chunk, dtype: torch.dtype) -> int | None:
        """Return the file position of the first byte of a chunk, or None if the chunk is not contiguous."""
        where = (chunk.path, chunk.position)
        if where not in self._positions:
            self._positions[where] = self._find_data(chunk, dtype)
        return self._positions[where]

    def _find_data(self, chunk: _Chunk, dtype: torch.dtype) -> int | None:
        archive = _FileSlice(self._open(chunk.path), chunk.position, chunk.length)
        try:
            described = load_archive(archive, where=chunk.path, map_location="meta")
            position = chunk.position + _position_in_archive(archive)
        except CheckpointError:
            raise
        except _BROKEN_ARCHIVE as error:
            raise CheckpointError(
                f"{chunk.path} is damaged or truncated at byte {chunk.position} ({type(error).__name__}: {error}). Copy it again."
            ) from error
        if not isinstance(described, torch.Tensor):
            raise CheckpointError(f"{chunk.path} holds a {type(described).__name__} at byte {chunk.position} where a tensor is expected.")
        if tuple(described.shape) != chunk.sizes or described.dtype != dtype:
            raise CheckpointError(
                f"{chunk.path} holds {list(described.shape)} of {described.dtype} where {METADATA_FILE} says {list(chunk.sizes)} of "
                f"{dtype}."
            )
        if not described.is_contiguous() or described.storage_offset():
            return None
        return position

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}, which {METADATA_FILE} names, cannot be read ({error}). Copy it again.") from error
        return self._descriptors[path]


class SeekableFile(io.RawIOBase):
    """Base class of seekable file-like objects.

    Attributes:
        at: current position in bytes.
        end: length of the file in bytes.
    """

    def __init__(self, end: int):
        super().__init__()
        self.at, self.end = 0, end

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the current position."""
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the current position, and return it."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.end}[whence]
        return self.at


class _FileSlice(SeekableFile):
    """File-like view of bytes position .. position+length-1 of an open file."""

    def __init__(self, descriptor: int, position: int, length: int):
        super().__init__(length)
        self._descriptor, self._start = descriptor, position

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into `buffer`, and return their number."""
        count = max(0, min(len(buffer), self.end - self.at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._start + self.at) if count else 0
        self.at += count
        return count


def _position_in_archive(archive: _FileSlice) -> int:
    """Return the position of the first byte of the tensor in an archive of torch.save, which is an uncompressed zip file."""
    record = next(entry for entry in zipfile.ZipFile(archive).infolist() if entry.filename.endswith("/data/0"))
    archive.seek(record.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", archive.read(30))
    return record.header_offset + 30 + name_length + extra_length
