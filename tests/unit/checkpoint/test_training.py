"""Training checkpoints: round trips bit for bit, and an error message for every kind of damage."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import finalize_model_grads

from endprompt_megatron.checkpoint import training_directory as checkpoint_directory
from endprompt_megatron.checkpoint.training import CheckpointWriter, RunState, load_latest_checkpoint
from endprompt_megatron.config.schema import OptimConfig, ParallelConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.model.build import wrap_for_training
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.training.optimizer import build_optimizer
from tests.support.tiny import load_model, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

STATE = RunState(
    step=2,
    consumed_samples=16,
    tokens=640,
    train_seconds=1.5,
    loss_first=6.25,
    loss_last=0.1,
    sample_order="ab",
    bad_steps=1,
    grad_norms=[0.5],
)


@dataclass
class Training:
    """A tiny model with its wrappers and optimizer."""

    model: EndPromptGPTModel
    wrapped: Any
    optimizer: Any

    def step(self, seed: int) -> None:
        tokens = tokens_of(20, batch=2, seed=seed)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.wrapped(tokens, torch.arange(20), None, labels=tokens.roll(-1, 1)).mean().backward()
        finalize_model_grads([self.wrapped])
        self.optimizer.step()

    def snapshot(self) -> dict[str, Any]:
        """Copies of weights and optimizer state."""
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return {"weights": weights, "optimizer": _copied(self.optimizer.state_dict())}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Keys at which two nested states are not bit-identical."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        if set(one) != set(other):
            return [f"{path}: keys {set(one) ^ set(other)}"]
        return [found for key in one for found in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [found for index in range(len(one)) for found in differing(one[index], other[index], f"{path}/{index}")]
    return [] if one == other else [path]


def training(hf_path: Path, *, precision: str = "bf16", distributed: bool = False) -> Training:
    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    model = load_model(hf_path, precision=precision).train()
    wrapped = wrap_for_training([model], parallel)
    optimizer = build_optimizer(
        wrapped,
        OptimConfig(lr=1e-2),
        bf16=precision == "bf16",
        use_distributed_optimizer=distributed,
        overlap_param_gather=False,
    )
    return Training(model, wrapped[0], optimizer)


def writer(directory: Path, run: Training, **options: Any) -> CheckpointWriter:
    options = {"config": {"seed": 3}, "keep_last": 0} | options
    return CheckpointWriter(directory, chunks=[run.model], optimizer=run.optimizer, **options)


def save(directory: Path, state: RunState, run: Training, **options: Any) -> Path:
    return writer(directory, run, **options).save(state)


def load(directory: Path, run: Training, **config: Any) -> RunState | None:
    return load_latest_checkpoint(directory, chunks=[run.model], optimizer=run.optimizer, config={"seed": 3} | config)


@pytest.fixture(scope="module")
def saved(single_process, tiny_model_dir, tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(checkpoints directory with step 2, state at the save, state after two more steps)"""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    run = training(tiny_model_dir)
    run.step(0)
    run.step(1)
    before = run.snapshot()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert save(directory, STATE, run) == directory / "step_0000002"
    assert differing(before, run.snapshot()) == [], "saving changes nothing"
    drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": torch.rand(4)}
    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn["tracker"] = torch.rand(4)
    run.step(2)
    run.step(3)
    return directory, before, run.snapshot() | {"drawn": drawn}


@pytest.fixture
def fresh(tiny_model_dir) -> Training:
    return training(tiny_model_dir)


def test_everything_comes_back_bit_for_bit(saved, fresh):
    directory, before, after = saved
    assert differing(before, fresh.snapshot()) != [], "otherwise the test proves nothing"
    assert load(directory, fresh) == STATE
    drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": torch.rand(4)}
    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn["tracker"] = torch.rand(4)
    assert differing(after["drawn"], drawn) == [], "random numbers continue where they stopped"
    assert differing(before, fresh.snapshot()) == []
    fresh.step(2)
    fresh.step(3)
    assert differing({key: after[key] for key in ("weights", "optimizer")}, fresh.snapshot()) == [], "the run continues as if never stopped"


def test_master_weights_and_moments_are_among_what_came_back(saved):
    names = str(saved[1]["optimizer"].keys()) + str(saved[1]["optimizer"]["optimizer"]["state"][0].keys())
    assert all(word in names for word in ("fp32_from_fp16", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(
    ("precision", "distributed"),
    [
        ("fp32", False),
        ("fp32", True),
        ("bf16", True),
    ],
)
def test_other_optimizers_come_back_too(tiny_model_dir, tmp_path, precision, distributed):
    one, other = (training(tiny_model_dir, precision=precision, distributed=distributed) for _ in range(2))
    one.step(0)
    save(tmp_path, RunState(step=1), one)
    assert load(tmp_path, other) == RunState(step=1)
    one.step(1)
    other.step(1)
    assert differing(one.snapshot()["weights"], other.snapshot()["weights"]) == []


def test_directory_and_record(saved):
    directory = saved[0]
    assert (directory / "latest").read_text().strip() == "step_0000002"
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_0000002"], "no partial files are left"
    record = json.loads((directory / "step_0000002" / "run.json").read_text())
    assert record["state"]["tokens"] == 640 and record["config"] == {"seed": 3}


def test_no_checkpoint_is_no_error(fresh, tmp_path):
    assert load(tmp_path, fresh) is None and load(tmp_path / "nowhere", fresh) is None


def test_latest_names_what_is_read_not_the_highest_number(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    shutil.copytree(directory / "step_0000002", directory / "step_0000009")
    (directory / "step_0000007.partial").mkdir()
    assert load(directory, fresh).step == 2


def test_saving_replaces_leftovers_and_keeps_the_newest(saved, fresh, tmp_path):
    """A crash between two saves, the same step saved again, and retention."""
    directory = copied(saved, tmp_path)
    for step in (3, 4, 5):
        shutil.copytree(directory / "step_0000002", directory / f"step_000000{step}")
    (directory / "step_0000005.partial").mkdir()
    (directory / "step_0000005.partial" / "half").write_text("of a crash")
    (directory / "step_0000005" / "old").write_text("of an earlier save")
    fresh.step(0)
    save(directory, RunState(step=5), fresh, keep_last=2)
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_0000004", "step_0000005"]
    assert (directory / "latest").read_text().strip() == "step_0000005"
    assert not (directory / "step_0000005" / "old").exists() and not (directory / "step_0000005" / "half").exists()
    assert load(directory, fresh).step == 5


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_keep_last_is_the_number_of_checkpoints_that_remain(saved, tmp_path, keep_last):
    directory = tmp_path / "checkpoints"
    for step in range(1, 9):
        final = checkpoint_directory.step_directory(directory, step)
        written = checkpoint_directory.begin(final)
        checkpoint_directory.complete(written, final, checksums={}, keep_last=keep_last)
        kept = [f"step_{number:07d}" for number in range(max(1, step - keep_last + 1), step + 1)]
        assert sorted(path.name for path in directory.iterdir()) == ["latest", *kept]


def test_crashes_between_two_renames_cost_nothing(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    (directory / "step_0000002").rename(directory / "step_0000002.replaced")
    (directory / "step_0000001.retired").mkdir()
    (directory / "step_0000009.partial").mkdir()
    assert load(directory, fresh) == STATE
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_0000002"], "also if this start saves nothing"
    (directory / "step_0000002.replaced").mkdir()  # of a save that was complete
    save(directory, RunState(step=3), fresh)
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_0000002", "step_0000003"]


def test_a_crash_before_old_checkpoints_are_retired_keeps_no_more_of_them(saved, fresh, tmp_path):
    """The last save was complete, so that no later one retires them. Later checkpoints than the newest are those of a reset run: they stay."""
    directory = copied(saved, tmp_path)
    for step in (1, 3, 4, 9):
        shutil.copytree(directory / "step_0000002", directory / f"step_000000{step}")
    checkpoint_directory.point_latest_at(directory / "step_0000004")
    writer = CheckpointWriter(directory, chunks=[fresh.model], optimizer=fresh.optimizer, config={"seed": 3}, keep_last=2)
    writer.retire()
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_0000003", "step_0000004", "step_0000009"]


def test_the_newest_checkpoint_survives_an_abandoned_later_one(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    for step in (8, 9):  # later than the step from which the run resumes
        shutil.copytree(directory / "step_0000002", directory / f"step_000000{step}")
    assert load(directory, fresh).step == 2
    fresh.step(2)
    save(directory, RunState(step=3), fresh, keep_last=2)
    assert load(directory, fresh).step == 3


def copied(saved: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def _truncate(pattern: str) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        for path in step.glob(pattern):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def _delete(pattern: str) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        for path in step.glob(pattern):
            path.unlink()

    return damage


def _edit_record(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((step / "run.json").read_text())
    change(record)
    (step / "run.json").write_text(json.dumps(record))


_DAMAGES = {
    "no directory": shutil.rmtree,
    "run.json deleted": _delete("run.json"),
    "run.json truncated": _truncate("run.json"),
    "run.json empty": lambda step: (step / "run.json").write_text("{}"),
    "metadata.json truncated": _truncate("metadata.json"),
    "tensors deleted": _delete("*.distcp"),
    "tensors truncated": _truncate("*.distcp"),
    ".metadata deleted": _delete(".metadata"),
    ".metadata truncated": _truncate(".metadata"),
    "metadata.json deleted": _delete("metadata.json"),
    "run.json without a state": lambda step: _edit_record(step, lambda record: record.pop("state")),
    "run.json with an unknown field": lambda step: _edit_record(step, lambda record: record["state"].update(steps=2)),
}


def _flip_a_bit(step: Path) -> None:
    path = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


_DAMAGES |= {"one bit flipped": _flip_a_bit, "checksums deleted": _delete("checksums.json")}


@pytest.mark.parametrize("name", _DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(saved, fresh, tmp_path, name, caplog):
    directory = copied(saved, tmp_path)
    shutil.copytree(directory / "step_0000002", directory / "step_0000005")
    (directory / "latest").write_text("step_0000005\n")
    _DAMAGES[name](directory / "step_0000005")
    logger = logging.getLogger("endprompt_megatron")
    logger.addHandler(caplog.handler)
    try:
        assert load(directory, fresh) == STATE
    finally:
        logger.removeHandler(caplog.handler)
    assert "step_0000005 is damaged" in caplog.text and f"resuming from {directory / 'step_0000002'}" in caplog.text
    assert (directory / "latest").read_text().strip() == "step_0000002"
    assert not (directory / "step_0000005").exists()
    assert (directory / "step_0000005.damaged").exists() == (name != "no directory"), "a damaged checkpoint is kept for inspection"
    assert differing(saved[1], fresh.snapshot()) == []


@pytest.mark.parametrize("name", _DAMAGES)
def test_the_only_checkpoint_being_damaged_is_an_error(saved, fresh, tmp_path, name):
    directory = copied(saved, tmp_path)
    _DAMAGES[name](directory / "step_0000002")
    with pytest.raises(CheckpointError, match="step_0000002 is damaged(.|\n)*no intact checkpoint is left"):
        load(directory, fresh)


def test_damaged_checkpoints_count_for_nothing_when_old_ones_are_retired(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    shutil.copytree(directory / "step_0000002", directory / "step_0000005")
    _flip_a_bit(directory / "step_0000005")
    (directory / "latest").write_text("step_0000005\n")
    load(directory, fresh)
    save(directory, RunState(step=5), fresh, keep_last=2)
    assert {path.name for path in directory.iterdir()} == {"latest", "step_0000002", "step_0000005", "step_0000005.damaged"}


def test_a_checkpoint_of_another_model_is_refused(saved, untied_model_dir):
    with pytest.raises(CheckpointError, match="does not fit this run's model"):
        load(saved[0], training(untied_model_dir))
    assert (saved[0] / "step_0000002").is_dir(), "it is not damaged"


def test_a_run_that_contradicts_the_checkpoint_is_refused(saved, fresh):
    with pytest.raises(CheckpointError, match="trains something else .seed: 3 there, 4 now"):
        load(saved[0], fresh, seed=4)


def test_latest_may_name_nothing_that_is_there(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    (directory / "latest").write_text("step_0000099\n")
    assert load(directory, fresh) == STATE
    (directory / "latest").unlink()
    assert load(directory, fresh) == STATE, "a crash between the checkpoint's name and `latest`"


def test_an_asynchronous_save_holds_the_state_at_the_time_of_the_call(saved, fresh, tmp_path):
    """Training continues during the write; only `finish` gives the checkpoint its name."""
    load(copied(saved, tmp_path), fresh)
    before = fresh.snapshot()
    beside = writer(tmp_path / "beside", fresh, asynchronous=True)
    beside.save(RunState(step=2))
    assert not (tmp_path / "beside" / "latest").exists()
    fresh.step(2)
    fresh.step(3)
    assert differing(before, fresh.snapshot()) != []
    beside.finish()
    assert load(tmp_path / "beside", fresh).step == 2
    assert differing(before, fresh.snapshot()) == []


def test_a_place_that_cannot_be_written_leaves_the_earlier_ones_alone(saved, fresh, tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="could not be written.*earlier checkpoints are intact"):
        save(blocked, RunState(step=3), fresh)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_leaves_the_earlier_ones_alone(saved, fresh, tmp_path):
    directory = copied(saved, tmp_path)
    directory.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="could not be written.*fix the permissions"):
            save(directory, RunState(step=3), fresh)
    finally:
        directory.chmod(0o755)
    assert load(directory, fresh).step == 2
