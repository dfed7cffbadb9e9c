"""A name that one file gives for another never leads out of its directory: index of safetensors, metadata, pointers, checksums."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from endprompt_megatron.checkpoint.hf.safetensors_io import INDEX_FILE, SafetensorsReader
from endprompt_megatron.checkpoint.torch_dist.read import METADATA_FILE, find_torch_dist
from endprompt_megatron.checkpoint.training_directory import begin, candidates, damage
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import path_inside
from tests.support.tiny import copy_model

OUTSIDE = ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\0b", "n" * 256]


@pytest.fixture
def logged(caplog) -> Iterator[pytest.LogCaptureFixture]:
    get_logger().propagate = True
    yield caplog
    get_logger().propagate = False


@pytest.mark.parametrize("name", [*OUTSIDE, None, 7, ["a"], b"a"])
def test_names_that_lead_outside(tmp_path, name):
    assert path_inside(tmp_path, name) is None


@pytest.mark.parametrize("name", ["a", "a/b", "./a", "..a", "a..", "step_0000001", "__0_0.distcp"])
def test_names_that_stay_inside(tmp_path, name):
    assert path_inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/dev/zero", ".."])
def test_an_index_of_safetensors_that_leads_outside_is_refused(tiny_model_dir, tmp_path, name):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    copy_model(tiny_model_dir, tmp_path / "other")
    (model / "model.safetensors").unlink()
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="names the file .*stay inside the model's directory"):
        SafetensorsReader(model)


def test_the_cache_of_hugging_face_stays_readable(tiny_model_dir, tmp_path):
    """snapshots/REVISION/FILE is a link to ../../blobs/HASH there."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    copy_model(tiny_model_dir, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    with SafetensorsReader(snapshot) as reader:
        assert reader.tensor("model.norm.weight").shape == (64,)


@pytest.mark.parametrize(
    "name", ["../victim", "{root}/victim", "..", ".", "", "victim", "step_", "step_0000001/../../victim", "step_1\n2", "\udcff"]
)
def test_a_latest_that_names_no_step_is_ignored_with_a_warning(tmp_path, logged, name):
    directory = tmp_path / "checkpoints"
    for folder in (directory / "step_0000001", directory / "step_0000002", directory / "victim", tmp_path / "victim"):
        folder.mkdir(parents=True)
    (directory / "latest").write_text(name.format(root=tmp_path), errors="surrogateescape")
    assert [path.name for path in candidates(directory)] == ["step_0000002", "step_0000001"]
    (warning,) = logged.records
    assert warning.levelno == logging.WARNING and "is ignored" in warning.getMessage()
    (directory / "latest").write_text("step_0000001\n")
    assert [path.name for path in candidates(directory)] == ["step_0000001", "step_0000002"] and len(logged.records) == 1


@pytest.mark.parametrize("pointer", ["latest", "checkpoints/latest", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("name", ["../elsewhere", "{root}/elsewhere", "inside/../../elsewhere"])
def test_a_pointer_of_a_checkpoint_to_convert_stays_inside(tmp_path, pointer, name):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for folder in (elsewhere, run / "checkpoints", run / "inside", run / "checkpoints" / "inside"):
        folder.mkdir(parents=True)
    (elsewhere / METADATA_FILE).write_bytes(b"never read")
    (run / pointer).write_text(name.format(root=tmp_path))
    with pytest.raises(CheckpointError, match="does not name a checkpoint of its directory"):
        find_torch_dist(run)


def test_a_leftover_that_is_a_link_is_removed_and_not_its_target(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("of somebody else")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    for suffix in (".partial", ".retired"):
        (directory / f"step_0000001{suffix}").symlink_to(tmp_path / "victim")
    assert begin(directory / "step_0000002").is_dir()
    assert [path.name for path in directory.iterdir()] == ["step_0000002.partial"] and (tmp_path / "victim" / "file").is_file()


@pytest.mark.parametrize("name", ["../secret", "/dev/zero"])
def test_checksums_of_files_outside_are_damage(tmp_path, name):
    checkpoint = tmp_path / "step_0000001"
    checkpoint.mkdir()
    (tmp_path / "secret").write_text("not of this checkpoint")
    (checkpoint / "checksums.json").write_text(json.dumps({name: "0"}))
    assert "something else than the checksums of files of this directory" in damage(checkpoint)
