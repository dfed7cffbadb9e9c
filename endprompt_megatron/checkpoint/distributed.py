"""Training checkpoints through megatron.core.dist_checkpointing: written beside their final name, renamed, and only then named by
`latest`, so that no crash leaves a half-written checkpoint under a name that a resumed run reads.

Layout: checkpoints/step_0000123/ (the tensors, and run.json), checkpoints/latest (the name of the newest).
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore.torch_adam import make_loadable, separate_steps

_LATEST = "latest"
_RUN_FILE = "run.json"
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        consumed_samples: over all ranks.
        tokens: physical tokens trained on.
        train_seconds: spent in training steps, all sittings together.
        loss_first, loss_last: weighted loss of the first and of the newest step.
        sample_order: identity of the order of samples (data.dataset.sample_order).
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    sample_order: str | None = None


def save_checkpoint(
    directory: Path, state: RunState, *, chunks: list[torch.nn.Module], optimizer: Any, config: dict[str, Any], keep_last: int
) -> Path:
    """Save model, optimizer, random state and position in the data; every rank takes part.

    Args:
        directory: the run's checkpoints directory.
        state: where the run stands.
        chunks: this rank's model without Megatron's wrappers.
        optimizer: Megatron's optimizer.
        config: the run's configuration, kept for the record.
        keep_last: newest checkpoints kept; 0 keeps all.
    Returns:
        The checkpoint's directory.
    Raises:
        CheckpointError: the directory cannot be written; earlier checkpoints are intact.
    """
    final = directory / f"step_{state.step:07d}"
    partial = final.with_name(final.name + ".partial")
    try:
        if global_rank() == 0:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        _barrier()
        dist_checkpointing.save(_sharded_state(chunks, optimizer, is_loading=False, with_random_state=True), str(partial))
        _barrier()
        if global_rank() == 0:
            record = {"state": asdict(state), "layout": _layout(), "config": config}
            (partial / _RUN_FILE).write_text(json.dumps(record, indent=2))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _point_latest_at(directory, final.name)
            _retire(directory, final, keep_last)
        _barrier()
    except OSError as error:
        raise CheckpointError(
            f"{final} could not be written ({error}); earlier checkpoints are intact. Free space, or fix the permissions of "
            f"{directory}, and start the same command again: it resumes."
        ) from error
    return final


def load_latest_checkpoint(directory: Path, *, chunks: list[torch.nn.Module], optimizer: Any) -> RunState | None:
    """Load the checkpoint that `latest` names into model and optimizer; every rank takes part.

    Returns:
        Where the run stood, or None if there is no checkpoint.
    Raises:
        CheckpointError: the checkpoint named by `latest` is missing or damaged.
    """
    pointer = directory / _LATEST
    if not pointer.is_file():
        return None
    path = directory / pointer.read_text().strip()
    try:
        record = json.loads((path / _RUN_FILE).read_text())
        same_layout = record["layout"] == _layout()
        wanted = _sharded_state(chunks, optimizer, is_loading=True, with_random_state=same_layout)
        loaded = dist_checkpointing.load(wanted, str(path))
        state = RunState(**record["state"])
    except (Exception, CheckpointException) as error:  # torch's derives from BaseException; megatron, pickle, zip and json raise their own
        raise CheckpointError(
            f"{path}, which {pointer} names, cannot be read ({type(error).__name__}: {error}). Write the name of an earlier checkpoint "
            f"into {pointer}, or choose another output_dir."
        ) from error
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    if same_layout:
        _set_random_state(loaded["random_state"])
    else:
        get_logger().info(
            f"{path} was saved in another layout ({record['layout']}; now {_layout()}): weights, optimizer and data position carry over, "
            f"random states start anew from the seed (nothing in training draws from them while dropout is 0)"
        )
    get_logger().info(f"resuming from {path}")
    return state


def _layout() -> dict[str, int]:
    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }


def _sharded_state(
    chunks: list[torch.nn.Module], optimizer: Any, *, is_loading: bool, with_random_state: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    if is_loading:
        make_loadable(optimizer)
    for index, chunk in enumerate(chunks):
        state[f"model{index}"] = chunk.sharded_state_dict()
    model_state = {key: value for key, value in state.items()} if len(chunks) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
    if with_random_state:
        state["random_state"] = ShardedObject(
            "random_state", None if is_loading else _random_state(), (torch.distributed.get_world_size(),), (global_rank(),)
        )
    return state


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _point_latest_at(directory: Path, name: str) -> None:
    temporary = directory / (_LATEST + ".tmp")
    temporary.write_text(name + "\n")
    temporary.replace(directory / _LATEST)


def _retire(directory: Path, newest: Path, keep_last: int) -> None:
    if keep_last < 1:
        return
    others = [path for path in directory.glob("step_*") if path.is_dir() and path.suffix != ".partial" and path != newest]
    # by age and not by number: who pointed `latest` at an earlier step goes on from there
    others.sort(key=lambda path: (path.stat().st_mtime, path.name))
    for path in others[: len(others) - (keep_last - 1)]:
        shutil.rmtree(path)


def _barrier() -> None:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
