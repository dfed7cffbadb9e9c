"""What the door lets through: the metadata that torch and Megatron write, and plain states; and nothing else."""

from __future__ import annotations

import collections
import io
import os
import pickle
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from endprompt_megatron.errors import CheckpointError, DataError
from endprompt_megatron.mcore.unpickling import arrays_without_pickle, load_archive, plain_extra_state, read_metadata


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def written(directory: Path, content: Any, protocol: int | None = None) -> Path:
    (directory / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return directory


def metadata(**storage: Any) -> Metadata:
    return Metadata({}, storage_data={MetadataIndex("key"): _StorageInfo(**{"relative_path": "a", "offset": 0, "length": 1} | storage)})


class TestMetadata:
    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_of_torch_comes_back_whole(self, tmp_path, protocol):
        tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.int8), "c": {"d": 1.5}}
        save(tensors, storage_writer=FileSystemWriter(tmp_path), planner=DefaultSavePlanner(), no_dist=True)
        expected = pickle.loads((tmp_path / ".metadata").read_bytes())
        expected.storage_meta = StorageMeta(checkpoint_id=tmp_path, save_id="x", load_id="y")
        found = read_metadata(written(tmp_path, expected, protocol))
        assert found == expected and isinstance(found.state_dict_metadata["a"], TensorStorageMetadata)
        assert found.state_dict_metadata["a"].properties.layout is torch.strided

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (Call(os.system, "true"), "posix.system"),
            (Call(eval, "1"), "builtins.eval"),
            (Call(getattr, 1, "real"), "builtins.getattr"),
            (Call(torch.load, "x"), "torch.serialization.load"),
            (Call(torch.storage._load_from_bytes, b""), "_load_from_bytes"),
            (Call(np.load, "x"), "numpy.load"),
            (torch.zeros(1), "torch._utils._rebuild_tensor_v2"),
            (types.SimpleNamespace(), "types.SimpleNamespace"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_that_names_a_foreign_class_is_refused(self, tmp_path, call, name, protocol):
        content = metadata()
        content.planner_data = {"key": call}
        with pytest.raises(CheckpointError, match=r"\.metadata names .*which does not belong in a checkpoint") as refused:
            read_metadata(written(tmp_path, content, protocol))
        assert name in str(refused.value)

    def test_that_reaches_for_a_foreign_name_through_an_allowed_one_is_refused(self, tmp_path):
        """`pickle` follows dots in a name since protocol 4."""
        path = b"\x80\x04\x8c\x05torch\x8c\x0dserialization\x93."
        dotted = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
        for content in (path, dotted):
            with pytest.raises(CheckpointError, match="which does not belong in a checkpoint"):
                read_metadata(written(tmp_path, content))

    @pytest.mark.parametrize(
        ("target", "name"),
        [(b"cMODULE\nMetadata\n", "Metadata"), (b"cMODULE\n_MEM_FORMAT_ENCODING\nK\x00\x85R", "_MEM_FORMAT_ENCODING")],
        ids=["a class", "a member"],
    )
    @pytest.mark.parametrize("state", [b"}X\x02\x00\x00\x00__K\x01s", b"N}X\x02\x00\x00\x00__K\x01s\x86"], ids=["a dict", "slots"])
    def test_that_changes_what_the_process_shares_is_refused(self, tmp_path, state, target, name):
        """The opcode BUILD sets attributes of whatever lies on the stack."""
        content = b"\x80\x02" + target.replace(b"MODULE", Metadata.__module__.encode()) + state + b"b."
        with pytest.raises(CheckpointError, match=f"an assignment to attributes of {Metadata.__module__}.{name}, which does not belong"):
            read_metadata(written(tmp_path, content))
        assert not hasattr(Metadata, "__")

    def test_that_asks_for_much_memory_gets_none(self, tmp_path):
        """pickle.Unpickler allocates 64 GiB for the first and 1 TiB for the second: a flipped bit is enough."""
        for content in (b"\x80\x02Nr\xff\xff\xff\xff.", b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00."):
            with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
                read_metadata(written(tmp_path, content))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "EOFError"),
            (b"no pickle", "KeyError"),
            ({}, "it contains dict instead of Metadata"),
            (Metadata({"key": 1}), "the entry 'key' is a int"),
            (Metadata({}, storage_data={"key": 1}), "the file position of 'key' is a int"),
            (Metadata({}, storage_data=None), "its file positions are a NoneType"),
            (Metadata({"key": TensorStorageMetadata(TensorProperties(), (2, -1), [])}, storage_data={}), "has a chunk at or of (2, -1)"),
            (Metadata({"key": TensorStorageMetadata(TensorProperties("x"), (2,), [])}, storage_data={}), "key has the dtype 'x'"),
            (Metadata({"key": TensorStorageMetadata(TensorProperties(), (2,), [1])}, storage_data={}), "AttributeError"),
            (metadata(relative_path="../a"), "lies in '../a', but files of a checkpoint lie inside its directory"),
            (metadata(relative_path="/etc/passwd"), "lies in '/etc/passwd'"),
            (metadata(relative_path=""), "lies in ''"),
            (metadata(relative_path=5), "lies in 5"),
            (metadata(offset=-1), "lies at byte -1"),
            (metadata(length="1"), "lies at byte 0, with '1' bytes"),
        ],
    )
    def test_that_is_damaged_is_refused(self, tmp_path, content, words):
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read .*Copy it again") as refused:
            read_metadata(written(tmp_path, content))
        assert words in str(refused.value)

    def test_that_is_missing_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="FileNotFoundError"):
            read_metadata(tmp_path)


def archive_of(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


class TestArchives:
    def test_of_plain_states_are_read(self):
        np.random.seed(0)
        state = {
            "numpy": np.random.get_state(),
            "tensor": torch.ones(2),
            "tuple": (1, 2.5, None, "x"),
            "ordered": collections.OrderedDict(a=1),
        }
        found = load_archive(archive_of(state), where="here")
        assert found.keys() == state.keys() and found["tuple"] == state["tuple"] and torch.equal(found["tensor"], state["tensor"])
        assert all(np.array_equal(one, other) for one, other in zip(found["numpy"], state["numpy"], strict=True))

    def test_of_numpy_1_too(self):
        """It writes another name of the same function."""
        content = archive_of(np.random.get_state()).getvalue()
        old = io.BytesIO(content)
        if b"numpy._core" in content:  # the archive's checksums are not compared
            new, name = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
            start = content.index(new)
            pickled = content.index(b"\x80\x02"), content.index(b"PK\x07\x08")
            assert pickled[0] < start < pickled[1]
            state = pickle.loads(content[pickled[0] : pickled[1]].replace(new, name))
            assert state[0] == "MT19937"
            old = _archive_with(content[pickled[0] : pickled[1]].replace(new, name))
        assert load_archive(old, where="here")[0] == "MT19937"

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("function", [os.system, eval, os.path.join, io.open])
    def test_that_name_a_function_are_refused(self, function, legacy, tmp_path):
        torch.save({"a": [Call(function, "true")]}, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
        name = f"{function.__module__}.{function.__name__}"
        with pytest.raises(CheckpointError, match=f"file names {name}, which does not belong in a checkpoint"):
            load_archive(tmp_path / "file", where=tmp_path / "file")


def _archive_with(content: bytes) -> io.BytesIO:
    """An archive of torch.save with this data.pkl."""
    import zipfile

    empty, stream = archive_of(None), io.BytesIO()
    with zipfile.ZipFile(empty) as source, zipfile.ZipFile(stream, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    stream.seek(0)
    return stream


class TestExtraStates:
    """Transformer Engine pickles the scales of FP8 into a tensor of bytes, and unpickles it without restrictions."""

    def bytes_of(self, value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)

    @pytest.fixture
    def recipe(self, monkeypatch) -> Any:
        """A recipe as Transformer Engine pickles it, also where that is not installed."""
        module = types.ModuleType("transformer_engine.common.recipe")

        class Format(Enum):
            HYBRID = 1

        class DelayedScaling:
            margin, fp8_format = 0, Format.HYBRID

        for cls in (Format, DelayedScaling):
            cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
            setattr(module, cls.__name__, cls)
        for name in ("transformer_engine", "transformer_engine.common"):
            monkeypatch.setitem(__import__("sys").modules, name, types.ModuleType(name))
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
        made = DelayedScaling()
        made.fp8_format = Format.HYBRID
        return made

    def test_pass_with_equal_content(self, recipe):
        state = {
            "recipe": recipe,
            "scale_fwd": torch.rand(3),
            "amax_history_fwd": torch.rand(4, 3),
            "extra_fp8_variables": {"fp8_checkpoint": True},
        }
        for stored in (self.bytes_of(state), archive_of({"scale_fwd": state["scale_fwd"]})):
            plain = plain_extra_state(stored, where="here")
            found = pickle.loads(plain.numpy().tobytes())
            assert plain.dtype == torch.uint8 and torch.equal(found["scale_fwd"], state["scale_fwd"])
        found = pickle.loads(plain_extra_state(self.bytes_of(state), where="here").numpy().tobytes())
        assert type(found["recipe"]) is type(recipe) and found["recipe"].fp8_format is recipe.fp8_format
        assert found["extra_fp8_variables"] == {"fp8_checkpoint": True}

    def test_that_are_empty_stay_as_they_are(self):
        empty = torch.empty(0, dtype=torch.uint8)
        assert plain_extra_state(empty, where="here") is empty and plain_extra_state(None, where="here") is None

    def test_that_name_a_function_are_refused(self):
        nested = Call(torch.storage._load_from_bytes, archive_of(Call(os.system, "true")).getvalue())
        for stored in (self.bytes_of({"recipe": Call(os.system, "true")}), archive_of([Call(os.system, "true")]), self.bytes_of(nested)):
            with pytest.raises(CheckpointError, match="here names posix.system"):
                plain_extra_state(stored, where="here")
        with pytest.raises(CheckpointError, match="here cannot be read"):
            plain_extra_state(torch.ones(3, dtype=torch.uint8), where="here")


class TestArrays:
    def test_are_read_without_pickle(self, tmp_path):
        np.save(tmp_path / "plain.npy", np.arange(3))
        (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / "marker"))))
        np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
        before = np.load
        with arrays_without_pickle():
            assert np.load(tmp_path / "plain.npy", allow_pickle=True, mmap_mode="r").tolist() == [0, 1, 2]
            for name in ("pickle", "objects"):
                with pytest.raises(DataError, match=f"{name}.npy is not an array of numbers .*Delete it"):
                    np.load(tmp_path / f"{name}.npy", allow_pickle=True, mmap_mode="r")
        assert np.load is before and not (tmp_path / "marker").exists()
