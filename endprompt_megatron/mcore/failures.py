"""Publish the error of one rank to all ranks. If an operation fails on one rank only, the other ranks hang in a collective without an error
message. The failed rank therefore writes its error into the store of the default process group, and the watchdogs of the other ranks read
the error there."""

from __future__ import annotations

import contextlib
import itertools
import time

import torch

_BOARDS = itertools.count()  # number of the next board, equal on all ranks; it separates the boards of several runs in one process
_MESSAGE, _READ = "message", "read"


class FailureBoard:
    """Holds the error of the first rank that failed. All ranks must create their boards in the same order.

    Attributes:
        error: class of the error that was read or published last.
    """

    def __init__(self) -> None:
        number = next(_BOARDS)
        self._store = None
        self.error = ""
        self._ranks, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        if self._ranks > 1:
            store = torch.distributed.distributed_c10d._get_default_store()
            self._store = torch.distributed.PrefixStore(f"endprompt_failure_{number}", store)

    def publish(self, message: str, *, error: str = "CheckpointError", seconds: float = 10.0) -> str:
        """Write the message unless a rank already did, then wait until the other ranks have read it.

        Rank 0 must wait because it serves the store: when rank 0 exits, the message is lost.

        Args:
            message: this rank's error.
            error: its class, with which the other ranks report it.
            seconds: maximum wait.
        Returns:
            The message of the first rank that failed, prefixed with its rank if there are several ranks.
        """
        if self._store is None:
            return message
        published = f"rank {self._rank}: {message}"
        with contextlib.suppress(RuntimeError):  # the store no longer exists because rank 0 has exited
            self.error, published = self._store.compare_set(_MESSAGE, "", f"{error}\n{published}").decode().split("\n", 1)
            deadline = time.monotonic() + seconds
            self._store.add(_READ, 1)
            while self._store.add(_READ, 0) < self._ranks and time.monotonic() < deadline:
                time.sleep(0.1)
        return published

    def read(self) -> str | None:
        """Return the message, or None if no rank has failed. This call does not block."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if self._store.check([_MESSAGE]):
                self.error, message = self._store.get(_MESSAGE).decode().split("\n", 1)
                return message
        return None

    def wait(self, seconds: float = 10.0) -> str | None:
        """Wait up to `seconds` for a message. Return the message, or None if no rank has failed by then."""
        deadline = time.monotonic() + seconds
        while (message := self.read()) is None and self._store is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        if message is not None:
            self.acknowledge()
        return message

    def acknowledge(self) -> None:
        """Count this rank among those that have read the message, because the failed rank waits for them."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.add(_READ, 1)
