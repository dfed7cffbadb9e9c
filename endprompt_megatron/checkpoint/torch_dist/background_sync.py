"""Sync a file to the disk in the background while it is written, so that the final fsync is short."""

from __future__ import annotations

import os
import threading

_EVERY_BYTES = 2**27


class BackgroundSync:
    """Context manager that syncs an open file while the block writes to it. After a successful block, all written bytes are on the disk.

    Args:
        descriptor: descriptor of the file.
        enabled: False disables all syncing.
    Raises:
        OSError: a sync failed.
    """

    def __init__(self, descriptor: int, *, enabled: bool = True):
        self._enabled = enabled
        self._descriptor, self._pending = descriptor, 0
        self._error: OSError | None = None
        self._requests = threading.Semaphore(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundSync:
        if self._enabled:
            self._thread.start()
        return self

    def wrote(self, count: int) -> None:
        """Record that `count` more bytes were written."""
        self._pending += count
        if self._pending >= _EVERY_BYTES:
            self._pending = 0
            self._requests.release()

    def __exit__(self, failure: type[BaseException] | None, *exc: object) -> None:
        if not self._enabled:
            return
        self._ended = True
        self._requests.release()
        self._thread.join()
        if failure is None:
            if self._error is not None:
                raise self._error
            os.fsync(self._descriptor)

    def _run(self) -> None:
        while True:
            self._requests.acquire()
            if self._ended:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._error = error
                return
