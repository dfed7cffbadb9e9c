"""Write model weights as a torch_dist directory, one file after the other and each file sequentially. read.py describes the format."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from endprompt_megatron.checkpoint.hf.mapping import FUSED_NAMES
from endprompt_megatron.checkpoint.hf.safetensors_io import FileRange, write_all, write_block
from endprompt_megatron.checkpoint.torch_dist.background_sync import BackgroundSync
from endprompt_megatron.checkpoint.torch_dist.read import LAYERS, SeekableFile
from endprompt_megatron.mcore.unpickling import METADATA_FILE

# linear layers that have an `_extra_state` object in a checkpoint; an object that contains None is an empty state
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass
class StoredChunks:
    """Positions of the chunks in one .distcp file. They can be stored as JSON, so that an interrupted conversion can continue.

    Attributes:
        chunks: {key: [(offsets, sizes, position, length)]}, with position and length in bytes.
        objects: {key: (position, length)} of pickled objects, in bytes.
    """

    chunks: dict[str, list[tuple[list[int], list[int], int, int]]] = field(default_factory=dict)
    objects: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the positions as JSON."""
        return json.dumps({"chunks": self.chunks, "objects": self.objects})

    @staticmethod
    def from_json(text: str) -> StoredChunks | None:
        """Parse JSON from `to_json`. Return None if the text is invalid, e.g. after a power failure."""
        try:
            return StoredChunks(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None


class DistcpWriter:
    """Writes one .distcp file sequentially. Use as a context manager.

    Args:
        path: file to create.
        tensor_parallel_size: number of shards of each matrix. Each shard is a separate chunk, so that a rank of this tensor-parallel size
            reads only its own shard.
        sync: fsync the file at the end.
    """

    def __init__(self, path: Path, *, tensor_parallel_size: int, sync: bool = True):
        self._path, self._size, self._wait = path, tensor_parallel_size, sync
        self.stored = StoredChunks()

    def __enter__(self) -> DistcpWriter:
        self._stack = ExitStack()
        self._stream = self._stack.enter_context(self._path.open("wb", buffering=0))
        self._sync = self._stack.enter_context(BackgroundSync(self._stream.fileno(), enabled=self._wait))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def write_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        dim: int | None,
        parts: int,
        blocks: Callable[[int, int, bool], Iterable[torch.Tensor | FileRange]],
    ) -> None:
        """Write all chunks of a parameter.

        Args:
            name: name in the whole model.
            shape: shape of the whole parameter, padding included.
            dtype: dtype of the parameter.
            dim: dimension that is split into shards; None if the parameter is not split.
            parts: number of equal parts of the rows, e.g. 2 for fused gate and up projections. Each part is split into shards separately.
            blocks: function (first row, row past the last, whether file ranges are allowed) -> blocks of these rows of the whole parameter.
        """
        key, layer = stored_key(name)
        lead = () if layer is None else (layer,)
        rows = shape[0] // (self._size * parts) if dim == 0 else shape[0]
        width = shape[1] // self._size if dim == 1 else None
        for share in range({None: 1, 0: self._size * parts, 1: self._size}[dim]):
            first, column = (share * rows, 0) if dim == 0 else (0, share * (width or 0))
            sizes = (*(1 for _ in lead), rows, *(() if len(shape) == 1 else (width or shape[1],)))
            offsets = [*lead, first, *(column for _ in shape[1:])]
            before, after = _archive_around(sizes, dtype)
            start = self._stream.tell()
            write_all(self._stream.fileno(), memoryview(before))
            is_share = width is not None and width != shape[1]
            for block in blocks(first, first + rows, not is_share):
                if is_share:
                    assert isinstance(block, torch.Tensor) and width is not None  # file ranges are only used for unsplit columns
                    block = block[:, column : column + width]
                self._sync.wrote(write_block(self._stream.fileno(), block))
            write_all(self._stream.fileno(), memoryview(after))
            length = self._stream.tell() - start
            if length != len(before) + dtype.itemsize * math.prod(sizes) + len(after):
                raise AssertionError(f"{name}: {length} bytes written for {list(sizes)} of {dtype}")
            self.stored.chunks.setdefault(key, []).append((offsets, list(sizes), start, length))

    def write_object(self, key: str, value: Any) -> None:
        """Append a pickled object."""
        start = self._stream.tell()
        archive = io.BytesIO()
        torch.save(value, archive)
        write_all(self._stream.fileno(), archive.getbuffer())
        self.stored.objects[key] = (start, self._stream.tell() - start)


class _Recorder(SeekableFile):
    """In-memory file that records the bytes that torch.save writes before and after the one range that it skips, the tensor data."""

    def __init__(self) -> None:
        super().__init__(0)
        self.pieces = [bytearray()]

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Record `data`, and return its length in bytes."""
        if self.at != self.end:
            self.pieces.append(bytearray())
        self.pieces[-1] += bytes(data)
        self.at += len(data)
        self.end = self.at
        return len(data)


def _archive_around(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that torch.save writes before and after the data of a contiguous tensor."""
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), recorder)  # virtual memory only: pages that are never touched are not allocated
    before, after = recorder.pieces
    return bytes(before), bytes(after)


def stored_key(name: str) -> tuple[str, int | None]:
    """Return (key, layer index) under which this module stores a parameter. As in Megatron's checkpoints, layers are stacked and norms have
    their fused names."""
    if not name.startswith(LAYERS):
        return name, None
    layer, rest = name.removeprefix(LAYERS).split(".", 1)
    return LAYERS + FUSED_NAMES.get(rest, rest), int(layer)


def extra_state_keys(layer: int, num_layers: int) -> list[str]:
    """Return the keys of the `_extra_state` objects of a layer, which Megatron requires for loading."""
    return [f"{LAYERS}{name}._extra_state/shard_{layer}_{num_layers}" for name in _EXTRA_STATES]


def write_metadata(directory: Path, files: dict[str, StoredChunks], *, dtype: torch.dtype) -> None:
    """Write .metadata, metadata.json and common.pt for complete .distcp files.

    Args:
        directory: directory of the files.
        files: {file name: chunks of the file}.
        dtype: dtype of all tensors.
    """
    described: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    gathered: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for file in sorted(files):
        for key, chunks in files[file].chunks.items():
            for offsets, sizes, position, length in chunks:
                gathered.setdefault(key, []).append((tuple(offsets), tuple(sizes)))
                storage[MetadataIndex(key, torch.Size(offsets))] = _StorageInfo(file, position, length)
        for key, (position, length) in files[file].objects.items():
            described[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(file, position, length)
    for key, parts in sorted(gathered.items()):
        size = torch.Size(max(offsets[i] + sizes[i] for offsets, sizes in parts) for i in range(len(parts[0][0])))
        described[key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), size, [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in sorted(parts)]
        )
    with (directory / METADATA_FILE).open("wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=storage), stream)
    common = io.BytesIO()
    torch.save({}, common)
    # on a full disk, torch.save to the file would raise a RuntimeError that does not state the reason
    (directory / "common.pt").write_bytes(common.getvalue())
    description = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(description))
