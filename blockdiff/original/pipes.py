"""What the caller opened, whatever it is: a pipe, a file, or a terminal."""

import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from blockdiff.shared.errors import StorageError

_Result = TypeVar("_Result")


def patiently(
    call: Callable[[], _Result],
    readable: Sequence[int] = (),
    writable: Sequence[int] = (),
    patience_s: float | None = None,
) -> _Result:
    """Return what `call` returns. If it would block, wait for a descriptor, and call it again.

    A process that shares a descriptor with us may have made it so, as ssh does. Raises `BlockingIOError` if it
    would still block after `patience_s` seconds (None: waits without limit).
    """
    while True:
        try:
            return call()
        except BlockingIOError:
            if not any(select.select(readable, writable, (), patience_s)):
                raise


class FdSink:
    """Writes to a descriptor. `finish` must be called: a late error shows only when the descriptor is closed."""

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what

    def write(self, data: bytes) -> None:
        """Write all of `data`; raises `StorageError`."""
        view = memoryview(data)
        try:
            while view:
                view = view[patiently(partial(os.write, self._fd, view), writable=[self._fd]) :]
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Close the descriptor; raises `StorageError`."""
        try:
            os.close(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write the {self._what} (descriptor {self._fd}): {error.strerror}")


class FdInput:
    """Reads from a descriptor. `what` names it in messages."""

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what

    def read(self, count: int, /) -> bytes:
        """Return at most `count` bytes, none at the end; raises `StorageError`."""
        try:
            return patiently(partial(os.read, self._fd, count), readable=[self._fd])
        except OSError as error:
            raise StorageError(f"cannot read {self._what}: {error.strerror}") from error
