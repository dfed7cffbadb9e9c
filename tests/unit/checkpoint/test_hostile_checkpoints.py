"""Checkpoints whose pickles name a function: nothing is run, and the function and the file are named, whichever command reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import finalize_model_grads
from torch.distributed.checkpoint.metadata import MetadataIndex

from endprompt_megatron.checkpoint import random_state as random_states
from endprompt_megatron.checkpoint import training as training_module
from endprompt_megatron.checkpoint import training_directory
from endprompt_megatron.checkpoint.convert import megatron_to_hf
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from endprompt_megatron.checkpoint.training import CheckpointWriter, RunState, load_latest_checkpoint
from endprompt_megatron.config.schema import OptimConfig, ParallelConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.mcore import runtime
from endprompt_megatron.mcore.unpickling import read_metadata
from endprompt_megatron.model.build import wrap_for_training
from endprompt_megatron.training.optimizer import build_optimizer
from tests.support.run_recipe import ROOT
from tests.support.tiny import load_model, tokens_of
from tests.support.tools import tool_caller

pytestmark = pytest.mark.usefixtures("single_process")
REFUSED = "names posix.mkdir, which does not belong in a checkpoint"
WEIGHT = "decoder.final_layernorm.weight"


class Payload:
    """An object whose pickle creates a directory when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Run:
    """A tiny model with its optimizer, and checkpoints of it."""

    def __init__(self, hf_path: Path):
        self.config = {"model": {"hf_path": str(hf_path)}, "rope": {"type": "pi", "factor": 2.0, "target_context_length": 256}}
        self.model = load_model(hf_path).train()
        self.wrapped = wrap_for_training([self.model], ParallelConfig(use_distributed_optimizer=False))
        self.optimizer = build_optimizer(
            self.wrapped, OptimConfig(), bf16=False, use_distributed_optimizer=False, overlap_param_gather=False
        )
        tokens = tokens_of(20)
        self.wrapped[0](tokens, torch.arange(20), None, labels=tokens.roll(-1, 1)).mean().backward()
        finalize_model_grads(self.wrapped)
        self.optimizer.step()  # without a step there are no moments to save

    def save(self, directory: Path) -> Path:
        provenance = {"base": "tiny", "original_context_length": 128, "target_context_length": 256}
        arguments = {"chunks": [self.model], "optimizer": self.optimizer, "config": self.config}
        return CheckpointWriter(directory, keep_last=0, provenance=provenance, **arguments).save(RunState(step=2))

    def load(self, directory: Path) -> RunState | None:
        return load_latest_checkpoint(directory, chunks=[self.model], optimizer=self.optimizer, config=self.config)


@pytest.fixture(scope="module")
def run(single_process, tiny_model_dir) -> Run:
    return Run(tiny_model_dir)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoints directory of a run, its exported model)"""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = run.save(folder / "checkpoints")
    return folder / "checkpoints", megatron_to_hf(describe_megatron_model(checkpoint), folder / "hf")


@pytest.fixture
def convert(monkeypatch, capsys):
    """tools/convert.py in this process, on the process group of `single_process`."""
    monkeypatch.setattr(runtime, "initialize", lambda *args, **options: None)
    monkeypatch.setattr(runtime, "shut_down", lambda **options: None)
    return tool_caller(ROOT / "tools" / "convert.py", monkeypatch, capsys)


def replace_object(checkpoint: Path, key: str, value: Any) -> None:
    """Store `value` under a key of the checkpoint, in place of the tensor or object there."""
    metadata = read_metadata(checkpoint)
    index = next(index for index in metadata.storage_data if index.fqn == key)
    info = metadata.storage_data[index]
    archive = io.BytesIO()
    torch.save(value, archive)
    with (checkpoint / info.relative_path).open("ab") as stream:
        info.offset, info.length = stream.tell(), len(archive.getvalue())
        stream.write(archive.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_metadata(checkpoint: Path, payload: Payload) -> None:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = {WEIGHT: payload}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, payload: Payload) -> None:
    torch.save({"args": payload}, checkpoint / "common.pt")


def in_random_state(checkpoint: Path, payload: Payload) -> None:
    replace_object(checkpoint, "random_state/shard_0_1", {"python": payload})


def in_a_weight(checkpoint: Path, payload: Payload) -> None:
    replace_object(checkpoint, WEIGHT, [torch.ones(1), payload])


def write_checksums(checkpoint: Path) -> None:
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != "checksums.json"]
    (checkpoint / "checksums.json").write_text(json.dumps(training_directory.checksums_of(files)))


# place: (function, commands that read it)
PLACES = {
    ".metadata": (in_metadata, {"show", "megatron-to-hf", "verify", "resume"}),
    "common.pt": (in_common, {"verify", "resume"}),
    "random_state": (in_random_state, {"resume"}),
    ".distcp": (in_a_weight, {"megatron-to-hf", "verify", "resume"}),
}


@pytest.fixture(params=PLACES)
def hostile(request, saved, tmp_path) -> tuple[Path, set[str], str]:
    """(checkpoints directory with a hostile checkpoint of intact checksums, commands that read the hostile file, its name)"""
    change, readers = PLACES[request.param]
    directory = Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))
    step = directory / "step_0000002"
    change(step, Payload(tmp_path / "marker"))
    write_checksums(step)
    return directory, readers, request.param


@pytest.mark.parametrize("command", ["show", "megatron-to-hf", "verify"])
def test_convert_runs_nothing_of_a_checkpoint(command, hostile, saved, convert, tmp_path):
    directory, readers, file = hostile
    arguments = {
        "show": (directory,),
        "megatron-to-hf": (directory, tmp_path / "out", "--no-verify"),
        "verify": ("--hf", saved[1], "--megatron", directory),
    }
    status, out, errors = convert(command, *arguments[command])
    assert not (tmp_path / "marker").exists()
    assert status == (2 if command in readers else 0), out + errors
    if command in readers:
        assert REFUSED in errors and file in errors
        assert not (tmp_path / "out").exists()


def test_resuming_runs_nothing_of_a_checkpoint(hostile, run, tmp_path):
    directory, _, file = hostile
    with pytest.raises(CheckpointError, match=REFUSED) as refused:
        run.load(directory)
    assert file in str(refused.value) and not (tmp_path / "marker").exists()


def test_the_payload_would_run(tmp_path):
    """Otherwise this file proves nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


def test_the_environment_switches_no_check_off(saved, run, tmp_path, monkeypatch):
    """torch reads TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD where its caller leaves weights_only open, as Megatron does for common.pt."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    directory = Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))
    step = directory / "step_0000002"
    in_common(step, Payload(tmp_path / "marker"))
    write_checksums(step)
    with pytest.raises(CheckpointError, match=REFUSED):
        run.load(directory)
    assert not (tmp_path / "marker").exists()


def test_megatrons_loaders_are_as_before_after_a_load(saved, run):
    """What another program in this process does with them is its own affair."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    before = torch.load, FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    assert run.load(saved[0]).step == 2
    assert (torch.load, FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes) == before


class TestRandomState:
    def test_is_stored_as_tensors_alone(self, saved):
        checkpoint = saved[0] / "step_0000002"
        info = read_metadata(checkpoint).storage_data[MetadataIndex("random_state/shard_0_1")]
        with (checkpoint / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            archive = io.BytesIO(stream.read(info.length))
        assert torch.serialization.get_unsafe_globals_in_checkpoint(archive) == []
        archive.seek(0)
        (state,) = torch.load(archive, weights_only=True)
        tracker = state.pop("tracker")
        assert all(isinstance(value, torch.Tensor) for value in [*state.values(), *tracker.values()])

    @pytest.mark.parametrize("draws", [0, 1])
    def test_comes_back_with_the_second_of_two_normal_draws(self, draws):
        random.seed(4)
        np.random.seed(4)
        for _ in range(draws):
            random.gauss(0, 1), np.random.normal()
        state = random_states.random_state()
        expected = [random.gauss(0, 1), float(np.random.normal()), random.random(), float(np.random.rand())]
        random.seed(5)
        np.random.seed(5)
        random_states.set_random_state(state, where="here")
        assert [random.gauss(0, 1), float(np.random.normal()), random.random(), float(np.random.rand())] == expected

    def test_in_the_form_of_older_checkpoints_is_still_read(self, run, tmp_path, monkeypatch):
        def old_form() -> dict[str, Any]:
            return {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(),
                "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }

        def draws() -> list[float]:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                tracked = float(torch.rand(1))
            return [random.random(), float(np.random.normal()), float(torch.rand(1)), tracked]

        monkeypatch.setattr(training_module, "random_state", old_form)
        run.save(tmp_path)
        expected = draws()
        runtime.seed_everything(99)
        assert run.load(tmp_path).step == 2
        assert draws() == expected

    @pytest.mark.parametrize("state", [{}, {"python": torch.zeros(3, dtype=torch.int64), "python_gauss": torch.zeros(0), "numpy": 1}, None])
    def test_that_is_damaged_is_an_error(self, state):
        with pytest.raises(CheckpointError, match="here holds no usable state of the random generators"):
            random_states.set_random_state(state, where="here")
