"""Read and write safetensors files in blocks of rows with plain file I/O, so that a conversion needs only a few megabytes of memory. The
reader of the safetensors package maps whole files into memory, and its writer needs all tensors of a file at once.

Format: 8 bytes with a number n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the bytes of all tensors in
sequence.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from endprompt_megatron.checkpoint.hf.json_files import INDEX_BYTES, read_json_object, shown
from endprompt_megatron.checkpoint.torch_dist.background_sync import BackgroundSync
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.output_files import path_inside

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BLOCK_BYTES = 2**20  # larger blocks leave the CPU cache between read and write, and were several times slower
_COPY_BYTES = 2**26
_HEADER_BYTES = 2**24  # a header has about 100 bytes per tensor
_IGNORED = "rotary_emb.inv_freq"  # rotary frequencies in old checkpoints; config.json determines them
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FileRange:
    """Bytes offset .. offset+length-1 of an open file, which the kernel can copy without user-space memory."""

    descriptor: int
    offset: int
    length: int


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # file position of the first byte


class SafetensorsReader:
    """Reads the tensors of a model directory, which contains one file, or several files and an index. Use as a context manager.

    Args:
        hf_path: model directory.
        reuse_memory: read small ranges of rows into the same buffer. Each call of `rows` then overwrites the tensor that the previous call
            returned.
    Raises:
        CheckpointError: the directory has no safetensors files, a shard is missing or truncated, or the tensors in the index and in the
            files differ.
    """

    def __init__(self, hf_path: Path, *, reuse_memory: bool = False):
        self.hf_path = Path(hf_path)
        self._scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8) if reuse_memory else None
        self._stack = ExitStack()
        self._file_of = _locate_tensors(self.hf_path)
        self._descriptors: dict[Path, int] = {}
        self._stored: dict[str, _Stored] = {}

    def __enter__(self) -> SafetensorsReader:
        for path in sorted(set(self._file_of.values())):
            header = _read_header(path)
            self._check_index(path, header)
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, self._descriptors[path])
            self._stored |= {name: stored for name, stored in header.items() if self._file_of.get(name) == path}
        return self

    def _check_index(self, path: Path, header: dict[str, _Stored]) -> None:
        """Check that a file contains exactly the tensors that the index assigns to the file. transformers reads all tensors of all files,
        in the order of the files."""
        for name in sorted(name for name, file in self._file_of.items() if file == path and name not in header):
            raise CheckpointError(f"{path} lacks {shown(name)[1:-1]}, which {INDEX_FILE} assigns to this file. Download it again.")
        for name in sorted(name for name in header if self._file_of.get(name) != path and not is_ignored(name)):
            other = self._file_of.get(name)
            if other is None:
                raise CheckpointError(f"{path} holds {shown(name)[1:-1]}, which {INDEX_FILE} does not name. Copy all files from one model.")
            raise CheckpointError(f"{path} and {other} both hold {shown(name)[1:-1]}. Copy all files from one model.")

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return sorted(self._file_of)

    def files(self) -> list[Path]:
        """Return all safetensors files."""
        return sorted(set(self._file_of.values()))

    def file_of(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self._file_of[name]

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor."""
        return list(self._find(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._find(name).dtype

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows first .. last-1 of a tensor."""
        stored = self._find(name)
        last = max(first, min(last, stored.shape[0]))
        where = self.range_of_rows(name, first, last)
        return read_tensor(where.descriptor, where.offset, (last - first, *stored.shape[1:]), stored.dtype, scratch=self._scratch)

    def range_of_rows(self, name: str, first: int, last: int) -> FileRange:
        """Return the file range of rows first .. last-1 of a tensor."""
        row_bytes = self.row_bytes(name)
        offset = self._find(name).offset + first * row_bytes
        return FileRange(self._descriptors[self._file_of[name]], offset, (last - first) * row_bytes)

    def columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read columns first .. last-1 of a matrix."""
        height = self._find(name).shape[0]
        return torch.cat([self.rows(name, *block)[:, first:last] for block in row_blocks(height, self.row_bytes(name))])

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor."""
        return self.rows(name, 0, self._find(name).shape[0])

    def row_bytes(self, name: str) -> int:
        """Return the number of bytes of one row of a tensor."""
        stored = self._find(name)
        return stored.dtype.itemsize * math.prod(stored.shape[1:])

    def _find(self, name: str) -> _Stored:
        if name not in self._file_of:
            raise CheckpointError(f"{self.hf_path}: no tensor {name} in its safetensors. Check that the model is complete.")
        return self._stored[name]


def is_ignored(name: str) -> bool:
    """Return whether transformers and this package ignore a tensor of this name."""
    return name.endswith(_IGNORED)


def read_tensor(
    descriptor: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype, *, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Read a contiguous tensor at `offset` of an open file.

    Args:
        scratch: uint8 buffer to read into if it is large enough. Allocating memory is slower than reading.
    """
    tensor = empty(shape, dtype, scratch)
    view = tensor_bytes(tensor)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise _ends_early(offset + done, len(view) - done)
        done += count
    return tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, scratch: torch.Tensor | None) -> torch.Tensor:
    """Return an uninitialised tensor, in the memory of `scratch` if that buffer is large enough."""
    size = dtype.itemsize * math.prod(shape)
    if scratch is None or size > scratch.numel():
        return torch.empty(shape, dtype=dtype)
    return scratch[:size].view(dtype).view(shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B") if tensor.numel() else memoryview(b"")


def row_blocks(height: int, row_bytes: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (first row, row past the last) of blocks of about BLOCK_BYTES that cover rows start .. height-1."""
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for first in range(start, height, step):
        yield first, min(first + step, height)


@dataclass(frozen=True)
class TensorPlan:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def plan_shards(tensors: Iterable[TensorPlan], max_shard_bytes: int) -> dict[str, list[TensorPlan]]:
    """Assign tensors to files in order. Return {file name: tensors}. A file exceeds `max_shard_bytes` only if a single tensor does."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def write_index(directory: Path, shards: dict[str, list[TensorPlan]]) -> None:
    """Write model.safetensors.index.json, unless there is only one file."""
    if list(shards) == [SINGLE_FILE]:
        return
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_shard(
    path: Path, tensors: list[TensorPlan], blocks: Callable[[TensorPlan], Iterable[torch.Tensor | FileRange]], *, sync: bool = True
) -> None:
    """Write one safetensors file, block by block.

    Args:
        path: file to create.
        tensors: tensors of the file.
        blocks: function (tensor) -> rows of the tensor in order, as any number of blocks of its dtype. Blocks are in memory or are file
            ranges.
        sync: fsync the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream, BackgroundSync(stream.fileno(), enabled=sync) as progress:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for block in blocks(tensor):
                if isinstance(block, torch.Tensor) and block.dtype != tensor.dtype:
                    raise AssertionError(f"{tensor.name}: a block of {block.dtype}, planned as {tensor.dtype}")
                count = write_block(stream.fileno(), block)
                progress.wrote(count)
                written += count
            if written != tensor.num_bytes:
                raise AssertionError(f"{tensor.name}: {written} bytes written, planned {tensor.num_bytes}")


def write_block(descriptor: int, block: torch.Tensor | FileRange) -> int:
    """Write a block at the current file position. Return its size in bytes."""
    if isinstance(block, torch.Tensor):
        return write_all(descriptor, tensor_bytes(block))
    done = 0
    copy: Callable[[int, int, int, int], int] = os.copy_file_range
    while done < block.length:
        count = min(block.length - done, _COPY_BYTES)
        try:
            copied = copy(block.descriptor, descriptor, count, block.offset + done)
        except OSError as error:
            if error.errno not in _CANNOT_COPY or copy is _copy_through_memory:
                raise
            copy = _copy_through_memory  # the kernel cannot copy between these file systems
            continue
        if not copied:
            raise _ends_early(block.offset + done, block.length - done)
        done += copied
    return done


def _ends_early(position: int, missing: int) -> CheckpointError:
    return CheckpointError(f"a file of tensors ends at byte {position}, {missing} bytes too early. Copy it again.")


def _copy_through_memory(source: int, target: int, count: int, offset: int) -> int:
    return write_all(target, memoryview(os.pread(source, min(count, BLOCK_BYTES), offset)))


def write_all(descriptor: int, data: memoryview) -> int:
    """Write all bytes at the current file position. Return their number."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])
    return done


def _locate_tensors(hf_path: Path) -> dict[str, Path]:
    index = hf_path / INDEX_FILE
    if index.is_file():
        try:
            weight_map = {name: str(file) for name, file in read_json_object(index, max_bytes=INDEX_BYTES)["weight_map"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}). Copy it again from the model.") from error
        outside = sorted(file for file in weight_map.values() if path_inside(hf_path, file) is None)
        if outside:
            raise CheckpointError(
                f"{index} names the file {outside[0]!r}: names in it must be relative and stay inside the model's directory. Copy the "
                f"index again from the model."
            )
        if (hf_path / SINGLE_FILE).is_file() and set(weight_map.values()) != {SINGLE_FILE}:
            raise CheckpointError(
                f"{hf_path} has {SINGLE_FILE}, which transformers reads, but {INDEX_FILE} names other files. Remove the outdated ones."
            )
        missing = sorted({file for file in weight_map.values() if not (hf_path / file).is_file()})
        if missing:
            raise CheckpointError(
                f"{hf_path}: {len(missing)} shards that the index names are missing, e.g. {missing[0]}. Copy them again from the model."
            )
        return {name: hf_path / file for name, file in weight_map.items()}
    single = hf_path / SINGLE_FILE
    if not single.is_file():
        raise CheckpointError(
            f"{hf_path}: neither {SINGLE_FILE} nor {INDEX_FILE} exists. Only safetensors are supported; convert "
            f"pytorch_model.bin with transformers' save_pretrained."
        )
    return dict.fromkeys(_read_header(single), single)


def _read_header(path: Path) -> dict[str, _Stored]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length:,} bytes, more than the {_HEADER_BYTES:,} that are read. Copy it again."
                )
            safe_open(str(path), framework="pt")  # checks the header against the file size
            header = json.loads(stream.read(length))
        return {
            name: _Stored(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except KeyError as error:
        raise CheckpointError(f"{path} has tensors of dtype {error}: supported are {', '.join(_DTYPES)}.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}): it has {path.stat().st_size} bytes. Copy it again.") from error
