"""lzop files, as the original's ``--lzop`` makes them, through the program `lzop`: Python has no module for them."""

import os
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from blockdiff.shared import process
from blockdiff.shared.errors import BlockdiffError, ProcessError, UsageError

_CHUNK = 1 << 20
#: How long blockdiff waits for output of lzop, or for its end, in seconds. lzop never waits for anything but blockdiff.
TIMEOUT_S = 120.0


def _start(arguments: list[str], stdout: int) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=stdout)
    except OSError as error:
        raise UsageError(f"cannot start lzop: {error.strerror}", "install lzop, or use gzip") from error


class LzopWriter:
    """Compresses the data and writes it to the descriptor `fd`. A context manager; `finish` must be called."""

    def __init__(self, fd: int) -> None:
        self._child = _start(["lzop", "-cf"], fd)

    def __enter__(self) -> "LzopWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        process.stop(self._child)
        _close(self._child)

    def write(self, data: bytes) -> None:
        """Compress `data`; raises `ProcessError` if lzop has ended."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(data)
        except OSError as error:
            raise ProcessError(f"lzop stopped: {error.strerror}") from error

    def finish(self) -> None:
        """Wait until everything is written; raises `ProcessError` unless lzop ends with status 0."""
        _close(self._child)
        _wait(self._child)


def pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the decompressed content of a lzop file; `read(count)` returns the next part of the file, b"" at its end.

    Raises `ProcessError` if lzop fails (it does if the file is damaged) or hangs, and `UsageError` if it cannot start.
    """
    child = _start(["lzop", "-dc"], subprocess.PIPE)
    failures: list[BlockdiffError] = []

    def feed() -> None:
        assert child.stdin is not None
        try:
            while data := read(_CHUNK):
                child.stdin.write(data)
        except BrokenPipeError:
            pass  # lzop gave up; its exit status says so
        except BlockdiffError as error:
            failures.append(error)
        _close(child)

    feeder = threading.Thread(target=feed, name="lzop", daemon=True)
    feeder.start()
    output_file = child.stdout
    assert output_file is not None
    try:
        output = output_file.fileno()
        while True:
            if not select.select([output], [], [], TIMEOUT_S)[0]:
                raise ProcessError(f"lzop wrote nothing for {TIMEOUT_S:g} s")
            data = os.read(output, _CHUNK)
            if not data:
                break
            yield data
        if not failures:  # otherwise lzop would only report that its input was cut off
            _wait(child)
        feeder.join(TIMEOUT_S)
        if failures:
            raise failures[0]
    finally:
        process.stop(child)
        feeder.join(process.STOP_TIMEOUT_S)  # the caller then closes the file that it reads
        output_file.close()


def _wait(child: "subprocess.Popen[bytes]") -> None:
    try:
        status = child.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ProcessError(f"lzop did not end within {TIMEOUT_S:g} s") from error
    if status != 0:
        raise ProcessError(f"lzop {process.status_text(status)}")


def _close(child: "subprocess.Popen[bytes]") -> None:
    try:
        if child.stdin is not None:
            child.stdin.close()
    except OSError:
        pass  # lzop gave up before it had read everything; its exit status says so
