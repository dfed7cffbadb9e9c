"""Bad steps in real training of a tiny model: the weights stay those before them, and the samples are named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from endprompt_megatron.data.dataset import name_samples
from endprompt_megatron.errors import CheckpointError, OutputError, TrainingError
from endprompt_megatron.log import read_metrics
from tests.support.disk_faults import fill_open_file
from tests.support.layout_worker import run_job

BAD_STEP = 4


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir) -> dict:
    directory = tmp_path_factory.mktemp("faults")
    return {"model": str(tiny_model_dir), "data": str(directory / "datasets"), "scheme": "endprompt", "steps": 8, "parallel": {}}


def job(place: dict, output: Path, **trainer: object) -> dict:
    return place | {"output": str(output), "trainer": {"keep_last": 2, **trainer}}


def spoil(kind: str, *, last: int = BAD_STEP):
    """Spoils the loss or the gradients of steps BAD_STEP to `last`."""

    def prepare(trainer):
        forward_step = trainer.forward_step

        def spoilt(batches, model):
            output, loss = forward_step(batches, model)
            if BAD_STEP <= trainer.state.step + 1 <= last:
                if kind == "gradient":
                    output.register_hook(lambda grad: grad * math.nan)
                else:
                    output = output * {"nan": math.nan, "inf": math.inf, "spike": 50.0}[kind]
            return output, loss

        trainer.forward_step = spoilt

    return prepare


def figures(output: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record}


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory) -> dict[int, float]:
    output = tmp_path_factory.mktemp("undisturbed")
    run_job(job(place, output))
    return figures(output)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_stop_keeps_the_weights_and_resumes(place, tmp_path, undisturbed, kind):
    with pytest.raises(TrainingError, match=f"step {BAD_STEP} is bad: its (loss|gradient norm) is (nan|inf)") as caught:
        run_job(job(place, tmp_path), spoil(kind))
    assert "trainer.bad_step=skip" in str(caught.value)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{BAD_STEP - 1:07d}"
    (bad,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "bad_step" in record]
    assert bad["step"] == BAD_STEP and len(bad["samples"]) == 8
    assert all(name in str(caught.value) for name in bad["samples"])
    trainer = run_job(job(place, tmp_path))  # the fault was the machine's, and is gone
    assert figures(tmp_path) == undisturbed
    assert bad["samples"] == name_samples(trainer.train_dataset, range((BAD_STEP - 1) * 8, BAD_STEP * 8))


@pytest.mark.parametrize(("kind", "factor"), [("nan", 0.0), ("gradient", 0.0), ("spike", 10.0)])
def test_skip_passes_over_the_update_and_goes_on(place, tmp_path, undisturbed, kind, factor):
    seen = []

    def watch(trainer):
        spoil(kind)(trainer)
        step = trainer._step

        def watched(batches):
            before = weights(trainer)
            result = step(batches)
            seen.append(all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True)))
            return result

        trainer._step = watched
        trainer.guard.recent_norms[:] = [1.0] * 5 if kind == "spike" else []

    run_job(job(place, tmp_path, bad_step="skip", grad_spike_factor=factor), watch)
    assert seen == [step == BAD_STEP for step in range(1, 9)], "that step alone changed nothing"
    found = figures(tmp_path)
    assert list(found) == [step for step in range(1, 9) if step != BAD_STEP]
    assert all(found[step] == undisturbed[step] for step in range(1, BAD_STEP)) and found[8] < found[1]


class _Crash(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def validating(at: tuple[str, int] | None = None):
    """Measures a validation loss every two steps, and crashes in the named method after so many steps."""

    def prepare(trainer):
        trainer.validation_dataset = trainer.train_dataset
        trainer.config.trainer.eval_interval, trainer.config.trainer.eval_batches = 2, 1
        if at is None:
            return
        method = getattr(trainer, at[0])

        def crashing(*arguments):
            if trainer.state.step == at[1]:
                raise _Crash
            return method(*arguments)

        setattr(trainer, at[0], crashing)

    return prepare


def test_crashes_leave_each_validation_loss_once(place, tmp_path):
    """After a save at the same step, in the measurement, and where nothing is left to train."""
    short = place | {"steps": 4}
    for at in (("validation_figures", 2), ("_step", 3)):
        with pytest.raises(_Crash):
            run_job(job(short, tmp_path, save_interval=2), validating(at))
    for _ in range(2):
        run_job(job(short, tmp_path, save_interval=2), validating())
        rows = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in record]
        assert rows == [0, 2, 4] and list(figures(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_renamed_while_it_is_written_is_one_error_and_goes_on_under_its_name(place, tmp_path, undisturbed, asynchronous):
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def rename(trainer):
        step = trainer._step

        def renaming(batches):
            if trainer.state.step == BAD_STEP and output.is_dir():
                output.rename(elsewhere)
            return step(batches)

        trainer._step = renaming

    options = dict(save_interval=2, async_save=asynchronous, log_interval=100 if asynchronous else 1)
    with pytest.raises(CheckpointError, match="run was renamed or removed while the job was writing to it.*same command again"):
        run_job(job(place, output, **options), rename)
    assert not output.exists(), "it is not created anew"
    elsewhere.rename(output)
    run_job(job(place, output, save_interval=2))
    assert {**undisturbed, **figures(output)} == undisturbed and 8 in figures(output)


def test_too_many_in_a_row_stop_after_all(place, tmp_path):
    with pytest.raises(TrainingError, match="3 bad steps in a row are more than trainer.max_bad_steps=2"):
        run_job(job(place, tmp_path, bad_step="skip", max_bad_steps=2), spoil("nan", last=100))
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{BAD_STEP + 1:07d}"


@pytest.mark.parametrize("name", [pytest.param("metrics.jsonl", marks=pytest.mark.repeated), "tensorboard"])
def test_metrics_that_cannot_be_written_end_the_run_and_the_same_command_goes_on(place, tmp_path, undisturbed, name):
    def prepare(trainer):
        step = trainer._step

        def fill_the_disk(batches):
            if trainer.state.step + 1 == BAD_STEP:
                fill_open_file(tmp_path / name)
            return step(batches)

        trainer._step = fill_the_disk

    with pytest.raises(OutputError, match=f"{tmp_path / name}.* could not be written .*No space left.*start the same command again"):
        run_job(job(place, tmp_path, save_interval=2), prepare)
    run_job(job(place, tmp_path, save_interval=2))
    assert figures(tmp_path) == undisturbed
