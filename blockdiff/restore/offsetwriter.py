"""What the targets of a restore have in common, files and devices: any thread may write at any offset."""

import errno
import os
from types import TracebackType

from blockdiff.shared.errors import TargetError, printable

_HINTS = {
    errno.ENOSPC: "free some space there, or restore to another place",
    errno.EBUSY: "it is mounted or in use: unmount it first",
    errno.EFBIG: "the file system there cannot hold a file of this size",
    errno.ENOENT: "create the directory first",
}


_ZEROS = bytes(1 << 20)


def write_zeros(fd: int, offset: int, length: int) -> None:
    """Make bytes of a file or device zero. Write nothing if they already are, because writing takes space.

    Every write to a thin volume or a hole allocates space, even a write of zeros. Raises `OSError`.
    """
    stop = offset + length
    while offset < stop:
        zeros = memoryview(_ZEROS)[: min(len(_ZEROS), stop - offset)]
        offset += len(zeros) if _are_zero(fd, offset, len(zeros)) else os.pwrite(fd, zeros, offset)


def _are_zero(fd: int, offset: int, length: int) -> bool:
    try:
        found = os.pread(fd, length, offset)
    except OSError:
        return False  # a sector that cannot be read can often be written
    return found == (_ZEROS if length == len(_ZEROS) else bytes(length))


class OffsetWriter:
    """An open descriptor that is written to. A context manager.

    `warnings` are about the result of a complete restore, `notes` about what could not be checked. `is_changed` says
    whether the old content of the target may have been overwritten.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.is_changed = False
        self._shown = printable(path)
        self._fd = -1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`; raises `TargetError`."""
        try:
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed("write", error) from error

    def _failed(self, action: str, error: OSError) -> TargetError:
        return TargetError(f"cannot {action} {self._shown}: {error.strerror}", _HINTS.get(error.errno or 0))

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed("write", error) from error
