"""What a training step on this rank really holds, read off the live objects of a real trainer: weights, gradient buffers and optimizer
state as they are, what autograd keeps by hooks, and everything that is allocated besides by a dispatch mode.

A job is one of layout_worker.py; the figures are written to memory_rank_N.json beside its output, all in bytes.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from endprompt_megatron.training.trainer import Trainer
from tests.support import layout_worker


class _Held:
    """A tensor that autograd keeps; counted until autograd lets go of it."""

    def __init__(self, tensor: Tensor, saved: SavedForBackward):
        self.tensor, self.saved, self.key = tensor, saved, tensor.untyped_storage().data_ptr()
        saved.add(self.key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.saved.remove(self.key)


class SavedForBackward:
    """Bytes of the storages that saved tensors keep alive, and their peak; storages of `known` are not counted."""

    def __init__(self, known: set[int]):
        self.known = known
        self.references: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.peak = 0
        self.peak_sizes: Counter[int] = Counter()

    def add(self, key: int, size: int) -> None:
        if key in self.known:
            return
        self.references[key] += 1
        self.sizes[key] = size
        if sum(self.sizes.values()) > self.peak:
            self.peak = sum(self.sizes.values())
            self.peak_sizes = Counter(self.sizes.values())

    def remove(self, key: int) -> None:
        if key in self.known:
            return
        self.references[key] -= 1
        if not self.references[key]:
            del self.references[key], self.sizes[key]

    def hooks(self) -> Any:
        """A context in which everything saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, self), lambda held: held.tensor)


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make while it is active, and their peak; storages of `known` are not counted."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known
        self.seen: set[int] = set()
        self.live = self.peak = 0

    def _freed(self, identity: int, size: int) -> None:
        self.seen.discard(identity)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self.known or id(storage) in self.seen:
                    continue
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def run_job(job: dict) -> None:
    """Train one job and write down what this rank held during its second step, the first with optimizer state."""
    figures: dict[str, Any] = {}

    def watch(trainer: Trainer) -> None:
        buffers = [buffer for chunk in trainer.model for buffer in chunk.buffers]
        parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
        states = [*parameters, *(buffer.grad_data for buffer in buffers)]
        known = {tensor.untyped_storage().data_ptr() for tensor in states}
        schedule = trainer._run_schedule

        def watched(batches: Any, *, forward_only: bool) -> Any:
            saved, allocated = SavedForBackward(known), Allocated(known)
            # SDPA's mask of context parallelism is a tensor subclass, which a dispatch mode cannot see made
            with nullcontext() if trainer.config.parallel.context_parallel_size > 1 else allocated, saved.hooks():
                done = schedule(batches, forward_only=forward_only)
            figures.update(saved=saved.peak, allocated=allocated.peak, saved_sizes=dict(saved.peak_sizes))
            return done

        trainer._run_schedule = watched
        trainer._save = lambda: None
        figures["weights"] = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        figures["weight_bytes_by_name"] = {
            f"{index}.{name}": parameter.numel() * parameter.element_size()
            for index, chunk in enumerate(trainer.chunks)
            for name, parameter in chunk.named_parameters()
        }
        figures["gradients"] = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
        figures["known"] = sorted(known)

    trainer = layout_worker.run_job(job, watch)
    figures["optimizer"] = _optimizer_bytes(trainer, set(figures.pop("known")))
    rank = torch.distributed.get_rank()
    Path(job["output"]).with_name(f"{Path(job['output']).name}_rank_{rank}.json").write_text(json.dumps(figures))


def _optimizer_bytes(trainer: Trainer, known: set[int]) -> int:
    """Storages of moments and master weights; views of the model's weights are not the optimizer's."""
    storages: dict[int, int] = {}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        masters = [weight for group in part.optimizer.param_groups for weight in group["params"]]
        moments = [value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        for tensor in (*masters, *moments):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
