"""Apply one delta to a file in place, as the original's merge does: the restore that needs no chain."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from blockdiff.format.deltafile import DeltaReader
from blockdiff.restore.devicetarget import refuse_in_use
from blockdiff.restore.filetarget import refuse_in_dev
from blockdiff.restore.offsetwriter import write_zeros
from blockdiff.shared.errors import BlockdiffError, DamagedError, TargetError, printable
from blockdiff.shared.runs import Run


def apply(pieces: Iterable[bytes], path: str) -> None:
    """Apply the delta whose uncompressed content is `pieces` to the file or device at `path`, made if need be.

    Raises `DamagedError` for a delta that is cut off or malformed, and `TargetError` if the file cannot be written;
    both say that it is not to be trusted. A version 2 delta gives a regular file its exact size. A version 1 delta does
    not know the image's size: if the image shrank, the file must be cut by hand.
    """
    with DeltaReader(pieces, "the delta on standard input") as reader, _opened(path) as fd:
        try:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            for run in reader.runs():
                _check_short(run, reader, fd, is_file, path)
                _write(fd, run, is_file)
            if reader.image_size is not None and is_file:
                os.ftruncate(fd, reader.image_size)
            os.fsync(fd)
        except OSError as error:
            raise _distrusted(TargetError(f"cannot write {printable(path)}: {error.strerror}"), path) from error
        except DamagedError as error:
            raise _distrusted(error, path) from error


def _distrusted(error: BlockdiffError, path: str) -> BlockdiffError:
    return type(error)(
        f"{error.message}; {printable(path)} cannot be trusted now",
        "start again with the deltas from the first one on, from sound copies",
    )


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """Yield a descriptor of the target; a device must not be in use."""
    try:
        device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        device = False
    if device:
        refuse_in_use(path)
    else:
        refuse_in_dev(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if device else os.O_CREAT), 0o600)
    except OSError as error:
        hint = "it is mounted or in use: unmount it first" if error.errno == errno.EBUSY else None
        raise TargetError(f"cannot open {printable(path)}: {error.strerror}", hint) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _check_short(run: Run, reader: DeltaReader, fd: int, is_file: bool, path: str) -> None:
    """Refuse a short last block in the middle of a file: a shrunken image looks like a delta that is cut off."""
    stop = run.offset + run.length
    if reader.format == 1 and is_file and run.length % reader.block_size and os.fstat(fd).st_size > stop:
        raise DamagedError(
            f"the delta ends in a block of {run.length % reader.block_size} bytes at offset {stop}, but"
            f" {printable(path)} is longer: the delta is cut off, or the image shrank (then truncate -s {stop} first)"
        )


def _write(fd: int, run: Run, is_file: bool) -> None:
    if run.data is not None:
        view, offset = run.data, run.offset
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
        return
    # zeros: a file that ends before them grows by a hole, what else is there already is overwritten
    offset, stop = run.offset, run.offset + run.length
    if is_file:
        size = os.fstat(fd).st_size
        if size < stop:
            os.ftruncate(fd, stop)
            stop = max(offset, size)
    write_zeros(fd, offset, stop - offset)
