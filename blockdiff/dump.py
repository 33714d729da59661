"""Scan a source: find the blocks that changed since the digests of the last run.

Shipped to the host: standard library only, Python 3.6 or newer.

A scan reads the image in batches. Several threads read and examine batches ahead of the consumer, which gets them in
order. Holes of sparse files are never read, and zero blocks are never hashed. Data that was not in the page cache
before the scan is not left there.
"""

import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from typing import Iterable, Iterator, List, NamedTuple, Optional, Tuple

from blockdiff.host import lease
from blockdiff.shared import extents, pipeline
from blockdiff.shared.blocks import Hasher
from blockdiff.shared.errors import SourceError
from blockdiff.shared.extents import DATA, SAME, ZEROS, Extent
from blockdiff.shared.runs import Run, batch_size, whole_blocks

#: Bytes of zeros in one batch; a batch has at most `runs.BATCH_BLOCKS` blocks.
ZEROS_BYTES = 256 << 20


class Batch(NamedTuple):
    """What a scan found in `length` bytes at `offset`. The data of `runs` is valid until the next batch is requested.

    `read` is the number of bytes that were read for it, `changed` the number of blocks in `runs`, and `buffer` the
    buffer that has its bytes, if there are any.
    """

    offset: int
    length: int
    runs: List[Run]
    read: int
    changed: int
    buffer: Optional[memoryview] = None


class OldDigests(ABC):
    """The digest table of the previous generation, from its first digest to its last."""

    @abstractmethod
    def read(self, count: int) -> bytes:
        """Return the digests of the next `count` blocks, or fewer at the end of the table."""

    @abstractmethod
    def skip(self, count: int) -> None:
        """Skip the digests of the next `count` blocks."""


class Piece(NamedTuple):
    """A part of the image that becomes a batch, in one of the states of `extents`.

    `cached` says that the page cache is to keep it. `buffer` has its bytes if they were read already.
    """

    offset: int
    length: int
    state: str = DATA
    cached: bool = True
    buffer: Optional[memoryview] = None


class Image(ABC):
    """An image that can be scanned from its beginning to its end."""

    @abstractmethod
    def pieces(self, block_size: int) -> Iterator[Piece]:
        """Yield the image as pieces of whole blocks, in order; raises `SourceError`."""

    @abstractmethod
    def fill(self, piece: Piece, buffer: memoryview) -> None:
        """Read a piece into `buffer`, unless `buffer` is the piece's own; raises `SourceError`."""


class FileSource(Image):
    """A regular file or block device, open for reading.

    `size` in bytes is read once, at the start: the image ends there even if the file grows. `status` is what `os.fstat`
    returns. `known` are the extents of the image if they are known from elsewhere than the file system. If `streams`
    agents scan it together, this one has the number `stream`, from 0. Raises `SourceError` if `path` is missing,
    unreadable, empty, or of another kind. A context manager.
    """

    def __init__(self, path: bytes, known: Optional[Iterable[Extent]] = None) -> None:
        self.path = path
        self._known = known
        self.stream, self.streams = 0, 1
        self._shown = path.decode("utf-8", "replace")
        try:
            self._fd = lease.open_for_reading(path)
        except OSError as error:
            raise SourceError("cannot open {}: {}".format(self._shown, error.strerror)) from error
        try:
            self.status = os.fstat(self._fd)
            self.kind = self._kind()
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if self.size == 0:
                raise SourceError(
                    "{} is empty: there is nothing to back up".format(self._shown),
                    "is the path right, and is its device attached?",
                )
            # the kernel's read-ahead would read a part of the next piece, which would then look cached
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "FileSource":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def _kind(self) -> str:
        mode = self.status.st_mode
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISBLK(mode):
            return "device"
        what = "a directory" if stat.S_ISDIR(mode) else "neither a regular file nor a block device"
        raise SourceError("{} is {}".format(self._shown, what), "name a file, a disk or a logical volume")

    def flush(self) -> bool:
        """Let the system write its cached changes of the source to the disk; return whether it did."""
        try:
            os.fsync(self._fd)
        except OSError:
            return False
        return True

    def read_past_cache(self) -> None:
        """Read a little of a device from the disk itself, not from the page cache; errors are ignored."""
        try:
            fd = os.open("/proc/self/fd/{}".format(self._fd), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            try:
                with mmap.mmap(-1, mmap.PAGESIZE) as page:  # the buffer must begin at a page
                    os.readv(fd, [page])
            finally:
                os.close(fd)
        except OSError:
            pass

    def forget(self) -> None:
        """Drop the page cache of the source, except unwritten changes, so that it is read from the disk again."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def note_status(self) -> None:
        """Let `changed` report only changes from now on."""
        self.status = os.fstat(self._fd)

    def changed(self) -> str:
        """Return in words what happened to a regular file since it was opened, or since `note_status`; "" for nothing.

        A user can set the size and mtime back to their old values, but not the ctime.
        """
        before, now = self.status, os.fstat(self._fd)
        if (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size):
            return "was written to"
        return (
            "was changed (its ctime says so, though its mtime does not)"
            if now.st_ctime_ns != before.st_ctime_ns
            else ""
        )

    def check_size(self) -> None:
        """Raise `SourceError` if the source is smaller than it was at the start."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size < self.size:
            raise self._shrunk(size)

    def _shrunk(self, size: int) -> SourceError:
        return SourceError(
            "{} shrank from {} to {} bytes while it was read".format(self._shown, self.size, size),
            "back up a snapshot, or run again when nothing resizes it",
        )

    def pieces(self, block_size: int) -> Iterator[Piece]:
        """Yield the image as pieces of whole blocks, in order, and let the kernel read each piece ahead."""
        steps = {
            DATA: batch_size(block_size),
            ZEROS: whole_blocks(ZEROS_BYTES, block_size),
            SAME: self.size,
        }
        mine = extents.striped(self._extents(block_size), steps[DATA], self.stream, self.streams)
        for start, end, state in mine if self.streams > 1 else self._extents(block_size):
            for offset in range(start, end, steps[state]):
                length = min(steps[state], end - offset)
                cached = state != DATA or self._read_ahead(offset, length)
                yield Piece(offset, length, state, cached)

    def _extents(self, block_size: int) -> Iterator[Extent]:
        """Yield the extents of the whole image, cut at block boundaries."""
        if self._known is not None:
            yield from extents.aligned(self._known, block_size, self.size)
            return
        position = 0
        while position < self.size:
            data = self._seek(position, os.SEEK_DATA, self.size) if self.kind == "file" else position
            hole_end = data if data == self.size else data - data % block_size
            if hole_end > position:
                yield Extent(position, hole_end, ZEROS)
                position = hole_end
                continue
            hole = self._seek(data, os.SEEK_HOLE, self.size) if self.kind == "file" else self.size
            end = min(hole + -hole % block_size, self.size)
            yield Extent(position, end, DATA)
            position = end

    def _seek(self, position: int, whence: int, otherwise: int) -> int:
        try:
            return min(os.lseek(self._fd, position, whence), self.size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end, or the file shrank
                self.check_size()
                return otherwise
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # not supported: treat all of it as data
                return position if whence == os.SEEK_DATA else self.size
            raise self._unreadable(position, error) from error

    def _read_ahead(self, offset: int, length: int) -> bool:
        """Start reading a piece; return whether it must stay in the page cache because it was there before.

        To drop pages that the host's programs had cached would hurt the host as much as to fill its cache with our
        reads. A read of the first byte that does not wait for the disk (`RWF_NOWAIT`, Python 3.7) shows whether it was
        cached.
        """
        try:
            if os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1:
                return True
        except (AttributeError, OSError):
            pass
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        return False

    def fill(self, piece: Piece, buffer: memoryview) -> None:
        """Read a piece into `buffer`; if that fails, raises `SourceError`, which names the offset."""
        done = 0
        while done < piece.length:
            try:
                count = self._read(buffer[done : piece.length], piece.offset + done)
            except OSError as error:
                raise self._unreadable(piece.offset + done, error) from error
            if count == 0:
                raise self._shrunk(min(os.lseek(self._fd, 0, os.SEEK_END), piece.offset + done))
            done += count
        if not piece.cached:
            os.posix_fadvise(self._fd, piece.offset, piece.length, os.POSIX_FADV_DONTNEED)

    if hasattr(os, "preadv"):

        def _read(self, view: memoryview, offset: int) -> int:
            return os.preadv(self._fd, [view], offset)

    else:  # Python 3.6

        def _read(self, view: memoryview, offset: int) -> int:
            data = os.pread(self._fd, len(view), offset)
            view[: len(data)] = data
            return len(data)

    def _unreadable(self, offset: int, error: OSError) -> SourceError:
        return SourceError(
            "cannot read {} at offset {}: {}".format(self._shown, offset, error.strerror),
            "the disk may be failing, or the snapshot may have overflowed: see the host's kernel log",
        )


class _Examiner:
    """What the worker threads do with a piece: read it, hash it if there are old digests, and find what changed."""

    def __init__(self, source: Image, hasher: Hasher, pool: pipeline.BufferPool) -> None:
        self._source = source
        self._hasher = hasher
        self._pool = pool

    def examine(self, task: "Tuple[Piece, Optional[bytes]]") -> Batch:
        piece, old = task
        if piece.state == SAME:
            return Batch(piece.offset, piece.length, [], 0, 0)
        if piece.state == ZEROS:
            return self._examine_zeros(piece, old)
        buffer = piece.buffer if piece.buffer is not None else self._pool.get()
        self._source.fill(piece, buffer)
        view = buffer[: piece.length]
        flags = self._hasher.zero_flags(view)
        if old is None:
            states = [ZEROS if is_zero else DATA for is_zero in flags]
        else:
            states = _compare(self._hasher.digests(view, flags), old, flags)
        runs = list(_runs(states, piece, self._hasher.block_size, view))
        changed = len(states) - states.count(SAME)
        return Batch(piece.offset, piece.length, runs, piece.length, changed, buffer)

    def _examine_zeros(self, piece: Piece, old: Optional[bytes]) -> Batch:
        size, block_size = self._hasher.digest.size, self._hasher.block_size
        count = -(-piece.length // block_size)
        new = self._hasher.zero_digests(piece.length) if old is not None else b""
        if old is None:
            states = [ZEROS] * count
        elif new == old:
            states = [SAME] * count
        else:
            states = [SAME if new[i : i + size] == old[i : i + size] else ZEROS for i in range(0, count * size, size)]
        runs = list(_runs(states, piece, block_size, None))
        return Batch(piece.offset, piece.length, runs, 0, count - states.count(SAME))


def _compare(digests: List[bytes], old: bytes, flags: List[bool]) -> List[str]:
    """Return the state of each block. If nothing changed in the batch, one comparison is enough."""
    if b"".join(digests) == old:
        return [SAME] * len(digests)
    size = len(digests[0])
    return [
        SAME if digest == old[i * size : i * size + size] else (ZEROS if is_zero else DATA)
        for i, (digest, is_zero) in enumerate(zip(digests, flags))
    ]


def _runs(states: List[str], piece: Piece, block_size: int, view: Optional[memoryview]) -> Iterator[Run]:
    """Yield the runs of neighbouring changed blocks that have the same state."""
    start = 0
    for i in range(1, len(states) + 1):
        if i < len(states) and states[i] == states[start]:
            continue
        state, first, last = states[start], start * block_size, min(i * block_size, piece.length)
        start = i
        if state == SAME:
            continue
        data = view[first:last] if view is not None and state == DATA else None
        yield Run(piece.offset + first, last - first, data)


def scan(
    source: Image,
    hasher: Hasher,
    pool: pipeline.BufferPool,
    old: Optional[OldDigests] = None,
) -> Iterator[Batch]:
    """Yield what changed in `source`, batch by batch, to the end of the image.

    Without `old` every block counts as changed, and nothing is hashed. If a part of the source cannot be read, raises
    `SourceError` when that part's turn comes.
    """
    examiner = _Examiner(source, hasher, pool)

    def tasks() -> Iterator[Tuple[Piece, Optional[bytes]]]:
        for piece in source.pieces(hasher.block_size):
            count = -(-piece.length // hasher.block_size)
            if old is None:
                yield piece, None
            elif piece.state == SAME:
                old.skip(count)
                yield piece, None
            else:
                yield piece, old.read(count)

    workers = pipeline.worker_count()
    for batch in pipeline.in_order(examiner.examine, tasks(), workers, ahead=workers + 2):
        yield batch
        if batch.buffer is not None:
            for run in batch.runs:
                if run.data is not None:
                    run.data.release()
            pool.give_back(batch.buffer)
