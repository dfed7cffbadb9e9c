"""Unpickle the files of checkpoints with restrictions. No other module unpickles files. Checkpoints of torch.distributed.checkpoint contain
pickles in `.metadata` and in the torch.save archives of common.pt and *.distcp. A pickle can call any function by its name. This module
therefore rejects all names except those listed here, those that torch.load(weights_only=True) allows, and those in
megatron.core.safe_globals."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import megatron.core  # noqa: F401  registers megatron.core.safe_globals, the plain classes that Megatron stores in common.pt
import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from endprompt_megatron.errors import CheckpointError, DataError
from endprompt_megatron.mcore.patching import replaced
from endprompt_megatron.output_files import path_inside

METADATA_FILE = ".metadata"

_DTYPES = frozenset(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype))
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}

# (module, qualified name) that `.metadata` may contain: classes of torch, and two empty classes of megatron-core up to 0.15
_METADATA_CLASSES = _DTYPES | {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),  # StorageMeta.checkpoint_id
    ("pathlib._local", "PosixPath"),  # the name in Python 3.13
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    *(  # Megatron stores all save plans in `.metadata` if it caches them
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),  # torch up to 2.2
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}  # fmt: skip

# (module, qualified name) that the `_extra_state` of a layer may contain: Transformer Engine pickles tensors and the FP8 recipe
_EXTRA_STATE_CLASSES = _DTYPES | {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),  # megatron-core 0.19 replaces _load_from_bytes with this function
    *(
        ("transformer_engine.common.recipe", name)
        for name in (
            "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams", "MXFP8BlockScaling", "NVFP4BlockScaling",
            "QParams", "_FormatHelper",
        )
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}  # fmt: skip

# The random state of numpy in checkpoints of this project up to version 0.1. numpy 1 writes the first name, and numpy 2 the second.
_reconstruct = np.zeros(0).__reduce__()[0]
torch.serialization.add_safe_globals(
    [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        (_reconstruct, "numpy._core.multiarray._reconstruct"),
        (np.ndarray, "numpy.ndarray"),
        (np.dtype, "numpy.dtype"),
        (np.dtypes.UInt32DType, "numpy.dtypes.UInt32DType"),
    ]
)
_torch_load, _numpy_load = torch.load, np.load  # load_sharded and arrays_without_pickle replace both for a block


class _ForeignClassError(pickle.UnpicklingError):
    """A pickle contains the name of a class or function that is not allowed."""


class _Unpickler(pickle._Unpickler):
    """Unpickler that looks up only allowed names. It extends the unpickler written in Python, because the unpickler written in C allocates
    any amount of memory for a damaged file and lets a pickle set attributes of classes.

    Args:
        content: bytes of the pickle.
        allowed: (module, qualified name) of each allowed class and function.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, allowed: frozenset[tuple[str, str]]):
        super().__init__(io.BytesIO(content))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function with this name. Raise _ForeignClassError if the name is not allowed."""
        if (module, name) not in self._allowed:
            raise _ForeignClassError(f"{module}.{name}".replace("__builtin__.", "builtins."))  # protocol 2 writes __builtin__
        if name == "_get_layout":
            return _LAYOUTS.__getitem__
        if name in ("_load_from_bytes", "safe_load_from_bytes"):
            return _tensor_storage
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the attributes of an object. Classes, functions and enum members are shared with the process, so setting their attributes
        raises _ForeignClassError."""
        target = self.stack[-2]  # type: ignore[attr-defined] # typeshed describes only the public methods
        if callable(target) or isinstance(target, Enum):
            shared = type(target) if isinstance(target, Enum) else target
            raise _ForeignClassError(f"an assignment to attributes of {shared.__module__}.{shared.__qualname__}")
        super().load_build()  # type: ignore[misc] # as above

    dispatch[pickle.BUILD[0]] = load_build


def _tensor_storage(data: bytes) -> Any:
    """Load a tensor storage. This function replaces torch.storage._load_from_bytes, which unpickles any class."""
    return _load_plain(io.BytesIO(data))


def _load_plain(file: Any, map_location: Any = None) -> Any:
    """Call torch.load with weights_only=True. Raise _ForeignClassError if a name is not allowed. The messages of other errors omit torch's
    advice to load without the check."""
    try:
        return _torch_load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)|(?:unrecognized function|but got) (.+)", str(error))
        if named is not None:
            raise _ForeignClassError(named[2] or (named[1] if "." in named[1] else f"builtins.{named[1]}")) from None
        lines = [line for line in str(error).splitlines() if line.strip() and "documentation of torch.load" not in line]
        raise pickle.UnpicklingError(lines[-1]) from None


def read_metadata(directory: Path) -> Metadata:
    """Read `.metadata` of a torch_dist directory.

    Args:
        directory: directory of the checkpoint.
    Raises:
        CheckpointError: the file is missing or damaged, is not the metadata of a checkpoint, contains a class that is not allowed, or
            refers to files outside of the directory.
    """
    path = Path(directory) / METADATA_FILE
    try:
        metadata = _Unpickler(path.read_bytes(), _METADATA_CLASSES).load()
        _check_metadata(metadata, Path(directory))
    except _ForeignClassError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except Exception as error:  # damaged pickles raise almost anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}). Copy it again.") from error
    return metadata


def _check_metadata(metadata: Any, directory: Path) -> None:
    """Check that the content has the types that torch writes, and that all files are inside the directory.

    Raises:
        ValueError: a type differs, or a file is outside of the directory.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it contains {type(metadata).__name__} instead of Metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"the entry {key!r} is a {type(entry).__name__}")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry)
    if not isinstance(metadata.storage_data, dict):
        raise ValueError(f"its file positions are a {type(metadata.storage_data).__name__}")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise ValueError(f"the file position of {index!r} is a {type(info).__name__}")
        if path_inside(directory, info.relative_path) is None:
            raise ValueError(f"{index.fqn} lies in {info.relative_path!r}, but files of a checkpoint lie inside its directory")
        if not all(isinstance(value, int) and value >= 0 for value in (info.offset, info.length)):
            raise ValueError(f"{index.fqn} lies at byte {info.offset!r}, with {info.length!r} bytes")


def _check_tensor(key: str, entry: TensorStorageMetadata) -> None:
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"{key} has the dtype {entry.properties.dtype!r}")
    for sizes in (entry.size, *(numbers for chunk in entry.chunks for numbers in (chunk.offsets, chunk.sizes))):
        if not isinstance(sizes, tuple) or len(sizes) != len(entry.size) or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"{key} of shape {entry.size!r} has a chunk at or of {sizes!r}")


def load_archive(file: Any, *, where: str | Path, map_location: Any = None) -> Any:
    """Load an archive of torch.save with tensors, plain values and states of random generators.

    Args:
        file: path or seekable file.
        where: name of the file for error messages.
        map_location: see torch.load.
    Raises:
        CheckpointError: the archive contains a class or function that is not allowed.
        Exception: the archive is missing or damaged. torch.load raises exceptions of many classes.
    """
    try:
        return _load_plain(file, map_location)
    except _ForeignClassError as error:
        raise CheckpointError(_refusal(where, str(error))) from None


def plain_extra_state(state: Any, *, where: str | Path) -> Any:
    """Unpickle the `_extra_state` of a layer with restrictions, and pickle the result again. When the state is loaded into the layer,
    Transformer Engine unpickles it without restrictions.

    Args:
        state: state as stored in the checkpoint.
        where: name of the checkpoint for error messages.
    Returns:
        uint8 [n], the state pickled by this process. A state that is not a pickle is returned unchanged.
    Raises:
        CheckpointError: the state contains a class or function that is not allowed, or is damaged.
    """
    if isinstance(state, io.BytesIO):
        state.seek(0)
        content = load_archive(state, where=where, map_location="cpu")
    elif isinstance(state, torch.Tensor) and state.numel():
        try:
            content = _Unpickler(state.detach().cpu().numpy().tobytes(), _EXTRA_STATE_CLASSES).load()
        except _ForeignClassError as error:
            raise CheckpointError(_refusal(where, str(error))) from None
        except Exception as error:
            raise CheckpointError(f"{where} cannot be read ({type(error).__name__}: {error}). Copy the checkpoint again.") from error
    else:
        return state
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def _refusal(where: str | Path, name: str) -> str:
    return (
        f"{where} names {name}, which does not belong in a checkpoint: it may contain only tensors, plain values and the classes of "
        f"torch.distributed.checkpoint's metadata. None of its code was run. Do not use this checkpoint; copy it again from a source "
        f"that you trust."
    )


@contextlib.contextmanager
def arrays_without_pickle() -> Iterator[None]:
    """Make np.load reject pickles inside the block.

    Megatron's datasets read their index caches with np.load(allow_pickle=True) (megatron-core 0.16-0.19, datasets/gpt_dataset.py and
    blended_dataset.py). Remove this function when upstream passes False.

    Raises:
        DataError: a file that np.load reads inside the block is not an array of numbers.
    """

    def load(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return _numpy_load(file, *args, **(options | {"allow_pickle": False}))
        except (ValueError, EOFError) as error:
            raise DataError(f"{file} is not an array of numbers ({error}). Delete it; it is built again.") from error

    with replaced(np, "load", load):
        yield
