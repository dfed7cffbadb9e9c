"""One rank's failure, published to all ranks: an operation that fails on one rank leaves the others waiting for it in a collective,
without a reason. The rank writes its error into the store through which the process group met, and the others' watchdogs read it there."""

from __future__ import annotations

import contextlib
import itertools
import time

import torch

_BOARDS = itertools.count()  # ranks make their boards in step: a run in the same process after this one has a board of its own
_MESSAGE, _READ = "message", "read"


class FailureBoard:
    """The error of the first rank that failed. Every rank makes one, in step with the others."""

    def __init__(self) -> None:
        number = next(_BOARDS)
        self._store = None
        self._ranks, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if self._ranks > 1:
            store = torch.distributed.distributed_c10d._get_default_store()
            self._store = torch.distributed.PrefixStore(f"endprompt_failure_{number}", store)

    def publish(self, message: str, *, seconds: float = 10.0) -> str:
        """Write the message, unless another rank was first, and wait until the others have read it: with rank 0 the store ends.

        Args:
            message: of this rank's error.
            seconds: longest wait.
        Returns:
            the message of the rank that was first, with its number where there are several ranks.
        """
        if self._store is None:
            return message
        published = f"rank {self._rank}: {message}"
        with contextlib.suppress(RuntimeError):  # the store is gone: its rank has ended
            published = self._store.compare_set(_MESSAGE, "", published).decode()
            deadline = time.monotonic() + seconds
            self._store.add(_READ, 1)
            while self._store.add(_READ, 0) < self._ranks and time.monotonic() < deadline:
                time.sleep(0.1)
        return published

    def read(self) -> str | None:
        """The message, or None while no rank has failed. Never waits."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if self._store.check([_MESSAGE]):
                return self._store.get(_MESSAGE).decode()
        return None

    def wait(self, seconds: float = 10.0) -> str | None:
        """The message, or None where none comes in time."""
        deadline = time.monotonic() + seconds
        while (message := self.read()) is None and self._store is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        if message is not None:
            self.count_as_read()
        return message

    def count_as_read(self) -> None:
        """Let the rank that failed know that this one has read it."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.add(_READ, 1)
