"""Bring a file to the disk while it is being written, so that the wait for the disk at its end is short."""

from __future__ import annotations

import os
import threading

_EVERY_BYTES = 2**27


class BackgroundSync:
    """Use as a context manager around the writing of an open file; when the block ends well, its bytes are on the disk.

    Args:
        descriptor: of the file.
        enabled: False leaves the disk to the operating system.
    Raises:
        OSError: the disk did not take what was written.
    """

    def __init__(self, descriptor: int, *, enabled: bool = True):
        self._enabled = enabled
        self._descriptor, self._pending, self._error = descriptor, 0, None
        self._wanted = threading.Semaphore(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundSync:
        if self._enabled:
            self._thread.start()
        return self

    def wrote(self, count: int) -> None:
        """Tell that `count` bytes more were written."""
        self._pending += count
        if self._pending >= _EVERY_BYTES:
            self._pending = 0
            self._wanted.release()

    def __exit__(self, failure: type[BaseException] | None, *exc: object) -> None:
        if not self._enabled:
            return
        self._ended = True
        self._wanted.release()
        self._thread.join()
        if failure is None:
            if self._error is not None:
                raise self._error
            os.fsync(self._descriptor)

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._ended:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._error = error
                return
