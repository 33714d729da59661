"""Temporary files and directories of the server, which end when they are closed, or when we do."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from blockdiff.shared.errors import BlockdiffError


class UnnamedFile:
    """A new file that has no name, without a buffer. A context manager.

    Raises `BlockdiffError` if it cannot be made, or if the room for it runs out.
    """

    def __init__(self) -> None:
        try:
            self._file: BinaryIO = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # `close` does
        except OSError as error:
            raise _failed(error) from error

    def __enter__(self) -> "UnnamedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, which ends it."""
        self._file.close()

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._file.fileno()

    def seek(self, offset: int) -> None:
        """Read or write next at `offset` in bytes."""
        self._file.seek(offset)

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes, or all that are left; none at the end."""
        return self._file.read(count)

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _failed(error) from error


@contextmanager
def directory() -> Iterator[str]:
    """Yield the path of a new directory of ours alone. Raises `BlockdiffError` if there is no place for it."""
    try:
        made = tempfile.TemporaryDirectory(prefix="blockdiff-")
    except OSError as error:
        raise _failed(error) from error
    with made as path:
        yield path


def _failed(error: OSError) -> BlockdiffError:
    """Return what to say if a temporary file cannot be made or written."""
    try:
        place = tempfile.gettempdir()
    except OSError:
        places = ", ".join(dict.fromkeys([os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp"]))
        return BlockdiffError(
            f"there is no directory for temporary files: none of {places} can be written to",
            "set TMPDIR to a writable directory",
        )
    return BlockdiffError(
        f"cannot write a temporary file in {place}: {error.strerror}",
        "free some space there, or set TMPDIR to another directory",
    )
