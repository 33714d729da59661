"""Temporary files and directories of the server. The files have no name, so none is left if blockdiff is killed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from blockdiff.shared.errors import BlockdiffError


class UnnamedFile:
    """A new file without a name and without a buffer. A context manager.

    Raises `BlockdiffError` if it cannot be created, or if there is no space left for it.
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
        """Close it, which deletes it."""
        self._file.close()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    def seek(self, offset: int) -> None:
        """Continue to read or write at `offset`, in bytes."""
        self._file.seek(offset)

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes, by default all that are left; b"" at the end."""
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
    """Yield the path of a new directory that only this user can read. It is removed at the end of the `with` statement.

    Raises `BlockdiffError` if it cannot be created.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="blockdiff-")
    except OSError as error:
        raise _failed(error) from error
    with made as path:
        yield path


def _failed(error: OSError) -> BlockdiffError:
    """Return the error for a temporary file that cannot be created or written."""
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
