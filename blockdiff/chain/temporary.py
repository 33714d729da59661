"""Temporary files and directories of the server, which end when they are closed, or when we do."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from blockdiff.shared.errors import BlockdiffError


def unnamed_file() -> BinaryIO:
    """Return a new file that has no name, without a buffer. Raises `BlockdiffError` if there is no place for it."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise failed(error) from error


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data` to a file without a name. Raises `BlockdiffError` if there is no room."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise failed(error) from error


@contextmanager
def directory() -> Iterator[str]:
    """Yield the path of a new directory of ours alone. Raises `BlockdiffError` if there is no place for it."""
    try:
        made = tempfile.TemporaryDirectory(prefix="blockdiff-")
    except OSError as error:
        raise failed(error) from error
    with made as path:
        yield path


def failed(error: OSError) -> BlockdiffError:
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
