"""Save and load training checkpoints with megatron.core.dist_checkpointing. A checkpoint contains the model, the optimizer, the random
states and the progress of the run. All ranks write it, either synchronously or in a background process. It can be loaded in the same or
another parallel layout."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from endprompt_megatron.checkpoint import training_directory as checkpoint_directory
from endprompt_megatron.checkpoint.random_state import random_state, set_random_state
from endprompt_megatron.checkpoint.torch_dist.read import TorchDistReader
from endprompt_megatron.checkpoint.training_directory import LATEST, RUN_FILE
from endprompt_megatron.config.resume import resume_differences
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore.checkpointing import begin_save, load_sharded
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.mcore.torch_adam import make_loadable, separate_steps
from endprompt_megatron.mcore.unpickling import plain_extra_state, read_metadata
from endprompt_megatron.output_files import check_not_moved, writing

_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# CheckpointException of torch derives from BaseException; megatron, pickle, zip and json have their own exceptions
_ANY_FAILURE = (Exception, CheckpointException)


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        step: number of optimizer steps, including skipped steps.
        consumed_samples: number of samples that all ranks have consumed.
        tokens: number of physical tokens trained on.
        train_seconds: seconds spent in training steps, summed over all restarts.
        loss_first, loss_last: weighted loss of the first and of the latest step.
        sample_order: hash of the order of samples (data.dataset.sample_order).
        bad_steps: number of consecutive bad steps so far.
        grad_norms: gradient norms of the latest good steps (training.guard).
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    sample_order: str | None = None
    bad_steps: int = 0
    grad_norms: list[float] = field(default_factory=list)

    def identity(self) -> list[Any]:
        """Return JSON values that identify the weights of a state. Two states of one run with different weights differ in these values,
        because losses and gradient norms depend on the weights."""
        return [self.step, self.consumed_samples, self.sample_order, self.loss_first, self.loss_last, *self.grad_norms]


class CheckpointWriter:
    """Writes the checkpoints of one run. Every rank has a writer, and all ranks must call its methods in the same order.

    Args:
        directory: checkpoints directory of the run.
        chunks: this rank's model chunks, without Megatron's wrappers.
        optimizer: Megatron's optimizer.
        config: configuration of the run (RunConfig.to_dict()), stored in each checkpoint.
        provenance: description of the base and the data, which exports need; stored in each checkpoint.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        asynchronous: write in a background process. `finish` must then be called regularly and at the end.
        failures: board on which a failed rank publishes its error, because other ranks may wait in a collective; None if no rank reads a
            board.
    """

    def __init__(
        self,
        directory: Path,
        *,
        chunks: list[torch.nn.Module],
        optimizer: Any,
        config: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        keep_last: int,
        asynchronous: bool = False,
        failures: FailureBoard | None = None,
    ):
        self.directory, self.chunks, self.optimizer, self.config = Path(directory), chunks, optimizer, config
        self.provenance, self.keep_last, self.failures = provenance or {}, keep_last, failures
        self._queue = AsyncCallsQueue() if asynchronous else None

    def save(self, state: RunState) -> Path:
        """Save the model, optimizer, random states and data position.

        Returns:
            Directory of the checkpoint, which an asynchronous save completes later.
        Raises:
            CheckpointError: the directory is not writable. Earlier checkpoints stay intact.
        """
        self.finish()
        final = checkpoint_directory.step_directory(self.directory, state.step)
        # serialised now, because the state of the run changes before an asynchronous save ends
        record = json.dumps({"state": asdict(state), "layout": _layout(), "config": self.config, "provenance": self.provenance}, indent=2)
        try:
            unfinished = [str(checkpoint_directory.begin(final)) if global_rank() == 0 else None]
            if torch.distributed.get_world_size() > 1:
                torch.distributed.broadcast_object_list(unfinished, src=0)
            written = Path(str(unfinished[0]))
            sharded = _sharded_state(self.chunks, self.optimizer, is_loading=False, with_random_state=True)
            request = begin_save(sharded, str(written), asynchronous=self._queue is not None)
            if self._queue is None:
                self._complete(written, final, record)
            else:
                request.add_finalize_fn(partial(self._complete, written, final, record))
                self._queue.schedule_async_request(request)
        except _ANY_FAILURE as error:
            self._fail(final, error)
        return final

    def finish(self, *, wait: bool = True) -> None:
        """Complete the asynchronous saves whose data is written.

        Args:
            wait: also wait for unfinished saves.
        Raises:
            CheckpointError: a save failed. Earlier checkpoints stay intact.
        """
        if self._queue is None or not self._queue.get_num_unfinalized_calls():
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except _ANY_FAILURE as error:
            self._fail(self.directory / "step_*", error)

    def retire(self) -> None:
        """Delete the old checkpoints that a save of an earlier start left because of a crash. Call it after the last save."""
        if global_rank() == 0:
            checkpoint_directory.retire_earlier(self.directory, self.keep_last)

    def _complete(self, written: Path, final: Path, record: str) -> None:
        _barrier()
        rank, world_size = global_rank(), torch.distributed.get_world_size()
        if rank == 0:
            (written / RUN_FILE).write_text(record)
        _barrier()
        mine = sorted(path for path in written.iterdir() if path.is_file())[rank::world_size]
        checksums = {name: value for share in _gathered(checkpoint_directory.checksums_of(mine)) for name, value in share.items()}
        if rank == 0:
            checkpoint_directory.complete(written, final, checksums=checksums, keep_last=self.keep_last)
        _barrier()

    def _fail(self, final: Path, error: BaseException) -> None:
        cause = _root_cause(error)
        if "[Errno" not in cause:  # torch reports a full disk as "unexpected pos 704 vs 598"
            with suppress(OSError):
                cause += f"; {shutil.disk_usage(self.directory).free / 2**20:,.1f} MiB are free on its disk"
        if global_rank() == 0:
            for partial_directory in self.directory.glob(f"{final.name}.partial"):
                checkpoint_directory.abandon(partial_directory)
        message = (
            f"{final} could not be written ({cause}); earlier checkpoints are intact. Free space, or fix the permissions of "
            f"{self.directory}, and start the same command again: it resumes."
        )
        try:
            check_not_moved(self.directory.parent)
        except CheckpointError as moved:
            message = str(moved)
        if self.failures is not None:
            # if Megatron detected the failure in a collective, all ranks fail here, and only the coordinator rank has the cause
            has_cause = not isinstance(error, CheckpointException) or bool(error.failures)
            message = self.failures.publish(message) if has_cause else self.failures.wait() or message
        raise CheckpointError(message) from error


def load_latest_checkpoint(directory: Path, *, chunks: list[torch.nn.Module], optimizer: Any, config: dict[str, Any]) -> RunState | None:
    """Load a checkpoint into the model and the optimizer. All ranks must call this function.

    The first intact checkpoint in the order of training_directory.candidates is loaded. Damaged checkpoints before it are renamed and
    reported in the log. If all checkpoints are damaged, none is renamed.

    Args:
        directory: checkpoints directory of the run.
        chunks, optimizer: see CheckpointWriter.
        config: configuration of the resuming run.
    Returns:
        State of the run in the checkpoint, or None if there is no checkpoint.
    Raises:
        CheckpointError: all checkpoints are damaged, or the checkpoint belongs to another run or another model.
    """
    path = _newest_intact(directory)
    if path is None:
        return None
    try:
        record = json.loads((path / RUN_FILE).read_text())
        _check_same_run(path, record["config"], config)
        same_layout = record["layout"] == _layout()
        requested = _sharded_state(chunks, optimizer, is_loading=True, with_random_state=same_layout)
        metadata = read_metadata(path)
        _drop_absent_extra_states(requested, metadata, len(chunks))
        loaded = load_sharded(requested, path, metadata)
        state = RunState(**record["state"])
    except CheckpointError:
        raise
    except _ANY_FAILURE as error:
        raise CheckpointError(
            f"{path} is intact but does not fit this run's model and optimizer ({type(error).__name__}: {error}). Write the name of "
            f"another checkpoint into {directory / LATEST}, or choose another output_dir."
        ) from error
    for index, chunk in enumerate(chunks):
        _fill(chunk, loaded[f"model{index}"], path)
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    if same_layout:
        set_random_state(loaded["random_state"], where=path)
    else:
        get_logger().info(
            f"{path} was saved in another layout ({record['layout']}; now {_layout()}): weights, optimizer and data position are loaded, "
            f"random states restart from the seed (training does not use them while dropout is 0)"
        )
    get_logger().info(f"resuming from {path}")
    return state


def load_torch_dist(chunks: list[torch.nn.Module], directory: Path) -> None:
    """Load the weights of model chunks from a torch_dist directory, which any program may have written. The loading code is Megatron's. All
    ranks must call this function.

    Raises:
        CheckpointError: the directory does not contain this model.
    """
    with TorchDistReader(directory) as reader:
        prefix, metadata = reader.prefix, None if reader.stacked else {"non_homogeneous_layers": True}
    requested = {}
    for index, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
        # `_extra_state` objects are not requested, because they contain no weights and not every program stores them
        requested[f"model{index}"] = {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}
    try:
        loaded = load_sharded(requested, directory, read_metadata(directory))
    except CheckpointError:
        raise
    except _ANY_FAILURE as error:
        raise CheckpointError(f"{directory} cannot be loaded ({_root_cause(error)}).") from error
    for index, chunk in enumerate(chunks):
        weights = {name.removeprefix(prefix): value for name, value in loaded[f"model{index}"].items()}
        missing = set(dict(chunk.named_parameters())) - set(weights)
        if missing:
            raise CheckpointError(f"{directory} lacks {min(missing)}.")
        chunk.load_state_dict(weights, strict=False)


def _drop_absent_extra_states(requested: dict[str, Any], metadata: Metadata, num_chunks: int) -> None:
    """Remove the `_extra_state` objects that the checkpoint lacks from the request. The backend that wrote the checkpoint determines which
    layers have such an object. All of these objects are empty except those with Transformer Engine's FP8 scales, which are recomputed."""
    stored = metadata.state_dict_metadata
    for index in range(num_chunks):
        state = requested[f"model{index}"]
        for name in [name for name, entry in state.items() if isinstance(entry, ShardedObject) and entry.unique_key not in stored]:
            del state[name]


def _fill(chunk: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load all weights of a chunk, and the `_extra_state` objects in `state`, from the checkpoint `path`."""
    for name in [name for name in state if name.endswith("_extra_state")]:
        state[name] = plain_extra_state(state[name], where=f"{path}, object {name},")
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if wrong:
        raise AssertionError(f"missing or unexpected weights: {wrong[:5]}")


def _newest_intact(directory: Path) -> Path | None:
    """Return the checkpoint to resume from, which is the same on every rank, or None if there is no checkpoint."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file where the directory of checkpoints belongs: move it away.")
    with writing(directory):  # `candidates` completes a rename that a crash interrupted
        known = checkpoint_directory.candidates(directory) if global_rank() == 0 else None
    listed = _gathered(known)[0]
    rank, world_size = global_rank(), torch.distributed.get_world_size()
    damages: list[str] = []
    for position, path in enumerate(listed):
        found = [text for text in _gathered(checkpoint_directory.damage(path, share=rank, shares=world_size)) if text]
        if not found:
            if rank == 0:
                with writing(directory):
                    for damaged in listed[:position]:
                        checkpoint_directory.set_aside(damaged)
                    if not checkpoint_directory.is_latest(path):
                        checkpoint_directory.point_latest_at(path)
            for text in damages:
                get_logger().warning(f"{text}. It was renamed; resuming from {path}.")
            _barrier()
            return path
        damages.append(f"{path} is damaged: {found[0]}")
    if damages:
        raise CheckpointError(
            *damages,
            f"no intact checkpoint is left in {directory}. Restore one, or remove the directory to start this run again.",
        )
    return None


def _check_same_run(path: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    # the base model may have moved: preflight compares the fingerprints of the weights instead
    differing = [found for found in resume_differences(stored, current, RunConfig().to_dict()) if found[0] != "model.hf_path"]
    if differing:
        shown = "; ".join(f"{key}: {was!r} there, {now!r} now" for key, was, now in differing[:5])
        raise CheckpointError(
            f"{path} belongs to a run that trains something else ({shown}). Undo the change, or choose another output_dir."
        )


def _root_cause(error: BaseException) -> str:
    """Return the message of the first OSError in the chain of exceptions, or else of the innermost exception."""
    failures = getattr(error, "failures", None)  # torch: {rank: (exception, traceback)}
    if failures:
        return _root_cause(next(iter(failures.values()))[0])
    inner = error.__cause__ or error.__context__
    return _root_cause(inner) if inner is not None and not isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _layout() -> dict[str, int]:
    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }


def _sharded_state(chunks: list[torch.nn.Module], optimizer: Any, *, is_loading: bool, with_random_state: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    if is_loading:
        make_loadable(optimizer)
    for index, chunk in enumerate(chunks):
        state[f"model{index}"] = chunk.sharded_state_dict()
    model_state = dict(state) if len(chunks) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
    if with_random_state:
        state["random_state"] = ShardedObject(
            "random_state", None if is_loading else random_state(), (torch.distributed.get_world_size(),), (global_rank(),)
        )
    return state


def _barrier() -> None:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def _gathered(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone
