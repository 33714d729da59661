"""Digest tables: the digests of all blocks of an image, in a file. Only this module contains their two forms.

The plain form is the original's. The sparse form leaves out groups of digests that are all of zero blocks. Otherwise a
large image that is mostly zeros would have a large table in each generation (`docs/format.md`).
"""

import hashlib
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate

from blockdiff.format.deltafile import Sink
from blockdiff.shared.blocks import MAX_BLOCK_SIZE, MAX_IMAGE_SIZE, MIN_BLOCK_SIZE, Hasher, block_count
from blockdiff.shared.errors import DamagedError, StorageError

#: Number of digests in a group. A group is left out if all of its digests are those of zero blocks.
GROUP = 1024
#: A table with at most this many bytes of digests is written in the plain form: the sparse one would save little.
PLAIN_LIMIT = 1 << 20
#: Number of blocks whose digests are read and compared in one step.
PART_BLOCKS = 65536

_U32 = struct.Struct("<I")
_MAGIC = b"\0\0\0\0BDt2"
_SPARSE_HEADER = struct.Struct("<8sIQ")
_PIECE = 1 << 20
_HINT = "restore it from a copy, or store everything again with --full"


class _Layout(ABC):
    """Where the digests are in a file."""

    block_size: int
    count: int

    @abstractmethod
    def spans(self, first: int, count: int) -> Iterator[tuple[int | None, int]]:
        """Yield, for neighbouring digests, their offset in the file (None for zero blocks), and their number."""


class _Plain(_Layout):
    def __init__(self, block_size: int, count: int, digest_size: int) -> None:
        self.block_size, self.count, self._digest_size = block_size, count, digest_size

    def spans(self, first: int, count: int) -> Iterator[tuple[int | None, int]]:
        if count:
            yield _U32.size + first * self._digest_size, count


class _Sparse(_Layout):
    """`stored` has a bit for each group, the lowest bits first; `start` is the offset of the first digest."""

    def __init__(self, block_size: int, count: int, digest_size: int, stored: bytes, start: int) -> None:
        self.block_size, self.count, self._digest_size = block_size, count, digest_size
        self._stored = stored
        self._start = start
        self._ranks = list(accumulate((byte.bit_count() for byte in stored), initial=0))

    def spans(self, first: int, count: int) -> Iterator[tuple[int | None, int]]:
        stop = first + count
        while first < stop:
            is_stored, end = self._is_stored(first // GROUP), first - first % GROUP + GROUP
            while end < stop and self._is_stored(end // GROUP) == is_stored:
                end += GROUP
            taken = min(end, stop) - first
            yield self._place(first) if is_stored else None, taken
            first += taken

    def stored_digests(self) -> int:
        """Return how many digests the file has. All groups are whole except the last one of the image."""
        last = (self.count - 1) // GROUP
        missing = (last + 1) * GROUP - self.count if self.count and self._is_stored(last) else 0
        return self._ranks[-1] * GROUP - missing

    def _is_stored(self, group: int) -> bool:
        return bool(self._stored[group >> 3] >> (group & 7) & 1)

    def _place(self, block: int) -> int:
        group, within = divmod(block, GROUP)
        rank = self._ranks[group >> 3] + (self._stored[group >> 3] & ((1 << (group & 7)) - 1)).bit_count()
        return self._start + (rank * GROUP + within) * self._digest_size


class TableReader:
    """Reads a digest table of either form through a descriptor, and closes it. A context manager.

    The table has `count` digests of `digest_size` bytes, for blocks of `block_size` bytes. Raises `DamagedError` if the
    file cannot be a digest table. Several threads may call `digests` at the same time.
    """

    def __init__(self, fd: int, where: str, digest_size: int) -> None:
        self._fd = fd
        self._where = where
        self.digest_size = digest_size
        self._zero_digest = b""
        try:
            self._length = os.fstat(fd).st_size
            first = self._read(0, min(self._length, _SPARSE_HEADER.size))
            self._layout = self._sparse(first) if first.startswith(_MAGIC) else self._plain(first)
            self.block_size, self.count = self._layout.block_size, self._layout.count
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> "TableReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def _plain(self, first: bytes) -> _Layout:
        length = self._length - _U32.size
        block_size = int(_U32.unpack(first[: _U32.size])[0]) if length >= 0 else 0
        count, rest = divmod(length, self.digest_size)
        if length < 0 or rest or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
            raise DamagedError(
                f"{self._where} is damaged: {self._length} bytes with a block size of {block_size} "
                f"are not a table of {self.digest_size}-byte digests",
                _HINT,
            )
        return _Plain(block_size, count, self.digest_size)

    def _sparse(self, first: bytes) -> _Layout:
        damaged = DamagedError(
            f"{self._where} is damaged: its {self._length} bytes are not a sparse digest table", _HINT
        )
        start = _SPARSE_HEADER.size + self.digest_size
        if self._length < start:
            raise damaged
        _magic, block_size, count = _SPARSE_HEADER.unpack(first)
        groups = block_count(count, GROUP)
        bitmap_size = block_count(groups, 8)
        if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or count > MAX_IMAGE_SIZE:
            raise damaged
        if bitmap_size > self._length - start:
            raise damaged
        self._zero_digest = self._read(_SPARSE_HEADER.size, self.digest_size)
        stored = self._read(self._length - bitmap_size, bitmap_size)
        if groups % 8 and stored[-1] >> groups % 8:
            raise damaged
        layout = _Sparse(block_size, count, self.digest_size, stored, start)
        if start + layout.stored_digests() * self.digest_size + bitmap_size != self._length:
            raise damaged
        return layout

    def digests(self, first: int, count: int) -> bytes:
        """Return the joined digests of `count` blocks from block `first` on; fewer if the table ends before."""
        count = max(0, min(count, self.count - first))
        parts = [
            self._zero_digest * number if place is None else self._read(place, number * self.digest_size)
            for place, number in self._layout.spans(first, count)
        ]
        return b"".join(parts)

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, in hexadecimal."""
        digest, position = hashlib.sha256(), 0
        while position < self._length:
            data = self._read(position, min(_PIECE, self._length - position))
            digest.update(data)
            position += len(data)
        return digest.hexdigest()

    def _read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise StorageError(f"cannot read {self._where}: {error.strerror}") from error
            if not part:
                raise DamagedError(f"{self._where} was cut off while it was read")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)


class TableWriter:
    """Writes a digest table in large pieces: `append` all digests in order, then `finish`.

    `count` is the number of digests that were appended, `sha256()` that of the bytes that the sink has received. With
    `sparse_count`, the number of digests that will be appended, it writes the sparse form.
    """

    def __init__(self, sink: Sink, hasher: Hasher, sparse_count: int | None = None) -> None:
        self._sink = sink
        self._digest_size = hasher.digest.size
        self._hash = hashlib.sha256()
        self._sparse_count = sparse_count
        self._zeros = hasher.zero_digest * GROUP
        self._group = bytearray()  # only in the sparse form: the digests of a group that is not whole yet
        self._stored = bytearray()  # a byte for each group: 1 if it is stored
        self.count = 0
        if sparse_count is None:
            self._buffer = bytearray(_U32.pack(hasher.block_size))
        else:
            header = _SPARSE_HEADER.pack(_MAGIC, hasher.block_size, sparse_count)
            self._buffer = bytearray(header + hasher.zero_digest)

    def append(self, digests: bytes) -> None:
        """Append joined digests."""
        self.count += len(digests) // self._digest_size
        if self._sparse_count is None:
            self._hand_on(digests)
            return
        self._group += digests
        whole = len(self._group) - len(self._group) % len(self._zeros)
        if whole:
            groups = bytes(memoryview(self._group)[:whole])
            del self._group[:whole]
            for start in range(0, whole, len(self._zeros)):
                self._put(groups[start : start + len(self._zeros)])

    def _put(self, group: bytes) -> None:
        is_stored = group != self._zeros[: len(group)]
        self._stored.append(is_stored)
        if is_stored:
            self._hand_on(group)

    def _hand_on(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _PIECE:
            self._flush()

    def finish(self) -> None:
        """Write what is left."""
        if self._sparse_count is not None:
            assert self.count == self._sparse_count, "another number of digests than was said"
            if self._group:
                self._put(bytes(self._group))
            self._buffer += _bitmap(self._stored)
        self._flush()

    def _flush(self) -> None:
        data = bytes(self._buffer)
        self._buffer.clear()
        self._hash.update(data)
        self._sink.write(data)

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes that the sink has received, in hexadecimal."""
        return self._hash.hexdigest()


def _bitmap(flags: bytearray) -> bytes:
    """Return the flags, each 0 or 1, as bits: eight to a byte, the lowest bit first."""
    return bytes(sum(flag << bit for bit, flag in enumerate(flags[i : i + 8])) for i in range(0, len(flags), 8))


def first_difference(digests: bytes, others: bytes, digest_size: int) -> int:
    """Return the index of the first digest that differs; raises `StopIteration` if none does."""
    ends = range(digest_size, max(len(digests), len(others)) + 1, digest_size)
    return next(i for i, end in enumerate(ends) if digests[end - digest_size : end] != others[end - digest_size : end])


def sparse_count(hasher: Hasher, delta_format: int, image_size: int | None) -> int | None:
    """Return the number of digests if a table is to be written in the sparse form, else None.

    Version 1 deltas and MD5 are those of the original. Its commands may continue such a chain, and read only the plain
    form.
    """
    if delta_format == 1 or hasher.digest.name == "md5" or image_size is None:
        return None
    count = block_count(image_size, hasher.block_size)
    return count if count * hasher.digest.size > PLAIN_LIMIT else None
