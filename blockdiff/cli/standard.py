"""Standard output and standard error: how a command ends does not depend on whether somebody reads what it prints."""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Descriptor(io.RawIOBase):
    """A descriptor to write to. From the first failure on, which `failure` keeps, everything is dropped."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self.is_told = False
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer") -> int:
        view = memoryview(data)
        while self.failure is None:
            try:
                return os.write(self._fd, view)
            except BlockingIOError:  # a process that shares the descriptor with us has made it so
                select.select([], [self._fd], [])
            except OSError as error:
                self.failure = error
        return len(view)


def attach() -> None:
    """Let `sys.stdout` and `sys.stderr` take everything, whether they are there, full, or read by nobody."""
    sys.stdout = _text(_Descriptor(1), getattr(sys.stdout, "encoding", None))
    sys.stderr = _text(_Descriptor(2), getattr(sys.stderr, "encoding", None))


def lost() -> str | None:
    """Return why something that was printed on standard output got lost, the first time; None if all is well.

    It is also None if the stream is closed, or nobody reads any more: then nothing is lost for a reader.
    """
    sys.stdout.flush()
    raw = getattr(sys.stdout.buffer, "raw", None)
    if not isinstance(raw, _Descriptor) or raw.is_told or raw.failure is None:
        return None
    raw.is_told = True
    return None if raw.failure.errno in (errno.EPIPE, errno.EBADF) else raw.failure.strerror or str(raw.failure)


def _text(descriptor: _Descriptor, encoding: str | None) -> io.TextIOWrapper:
    encoding = encoding or "utf-8"
    # what cannot be encoded must not end a command either: of UTF-8, bytes of names that are not text
    errors = "surrogateescape" if encoding.lower() in ("utf-8", "utf8") else "backslashreplace"
    return io.TextIOWrapper(io.BufferedWriter(descriptor), encoding, errors, line_buffering=True)
