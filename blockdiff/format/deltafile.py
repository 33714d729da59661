"""Deltas: from records to bytes and back. Only this module contains their layout (`docs/format.md`)."""

import struct
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol

from blockdiff.shared.blocks import MAX_BLOCK_SIZE, MAX_IMAGE_SIZE, MIN_BLOCK_SIZE, block_count
from blockdiff.shared.errors import DamagedError
from blockdiff.shared.runs import Run

#: Longest data record of a version 2 delta, in bytes.
MAX_RECORD = MAX_BLOCK_SIZE

_U32 = struct.Struct("<I")
_OFFSET = struct.Struct("<Q")
_MAGIC = b"\0\0\0\0BDv2"
_HEADER_2 = struct.Struct("<8sIQ")
_RECORD = struct.Struct("<BQQ")
_DATA, _ZEROS, _END = 1, 2, 3
#: Bytes of a version 2 record before its data.
HEAD_SIZE = _RECORD.size
_SHA256_SIZE = 32

# Neighbouring records of a version 1 delta are joined into one run, up to about this many bytes and blocks.
_RUN_BYTES = 1 << 20
_RUN_BLOCKS = 8192


class Sink(Protocol):
    """What a delta or a digest table is written to."""

    def write(self, data: bytes) -> object:
        """Write all of `data`."""


def header(delta_format: int, block_size: int, image_size: int | None) -> bytes:
    """Return the header of a delta; only that of version 2 contains the image's size."""
    if delta_format == 1:
        return _U32.pack(block_size)
    return _HEADER_2.pack(_MAGIC, block_size, image_size)


def put_head(buffer: memoryview, position: int, run: Run) -> None:
    """Write the head of a version 2 record, `HEAD_SIZE` bytes. The run's data follows it; a run of zeros has none."""
    _RECORD.pack_into(buffer, position, _ZEROS if run.data is None else _DATA, run.offset, run.length)


def records_1(run: Run, block_size: int) -> list[bytes | memoryview]:
    """Return the version 1 records of a run, in parts that are to be joined.

    Version 1 has no zero records: the bytes of a run of zeros are written out.
    """
    data = memoryview(bytes(min(run.length, block_size))) if run.data is None else run.data
    parts: list[bytes | memoryview] = []
    for i in range(0, run.length, block_size):
        start = 0 if run.data is None else i
        parts += (_OFFSET.pack(run.offset + i), data[start : start + min(block_size, run.length - i)])
    return parts


def end(delta_format: int, blocks: int, carried: int, table_sha256: str) -> bytes:
    """Return the end mark of a delta; version 1 has none."""
    if delta_format == 1:
        return b""
    return _RECORD.pack(_END, blocks, carried) + bytes.fromhex(table_sha256)


def together(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Yield the runs of a `DeltaReader` in groups, in order: those of one decompressed member, at most `_RUN_BLOCKS`.

    Scattered blocks make short runs. To give each of them to a thread would take longer than the thread's work.
    """
    group: list[Run] = []
    piece: object = None
    for run in runs:
        its = None if run.data is None else run.data.obj
        if group and ((its is not None and its is not piece) or len(group) >= _RUN_BLOCKS):
            yield group
            group = []
        group.append(run)
        piece = piece if its is None else its
    if group:
        yield group


class _Cursor:
    """The pieces of a decompressed delta as one stream. It returns a view of a piece, or a copy if it needs several."""

    def __init__(self, pieces: Iterable[bytes], where: str) -> None:
        self._pieces = iter(pieces)
        self._view = memoryview(b"")
        self._where = where
        self.position = 0

    def close(self) -> None:
        """Close the generator of the pieces, if it is a generator."""
        if isinstance(self._pieces, Generator):
            self._pieces.close()

    def read(self, count: int, what: str) -> memoryview:
        """Return exactly `count` bytes; raises `DamagedError`, which names `what`, if the delta has fewer left."""
        view = self.read_up_to(count)
        if len(view) < count:
            raise self.damaged(f"it ends in the middle of {what}")
        return view

    def read_up_to(self, count: int) -> memoryview:
        """Return `count` bytes, or what is left of the delta."""
        view, self._view = self._view[:count], self._view[count:]
        if len(view) < count:
            parts = [view] if view else []
            missing = count - len(view)
            while missing and (piece := next(self._pieces, None)) is not None:
                parts.append(memoryview(piece)[:missing])
                self._view = memoryview(piece)[missing:]
                missing -= len(parts[-1])
            view = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        self.position += len(view)
        return view

    def damaged(self, why: str) -> DamagedError:
        """Return the error for a delta that breaks the rules of its format."""
        return DamagedError(
            f"{self._where} is damaged: {why} (at byte {self.position} of the uncompressed delta)",
            "use another copy of it",
        )


class DeltaReader:
    """Reads a delta of either version: the header when it is created, the records in `runs`. A context manager.

    If `pieces` is a generator, it is always closed. A generator that uses threads and was only partly read must not be
    left to the garbage collector, which may run at a place where waiting for a thread could block forever.

    `format` and `block_size` are known from the start, as is `image_size` of version 2 (None in version 1).
    `blocks_carried` is known when `runs` has ended, as is `table_sha256` of version 2. Raises `DamagedError` if the
    delta breaks a rule of the format; `where` names the delta in messages.
    """

    def __init__(self, pieces: Iterable[bytes], where: str) -> None:
        self._cursor = _Cursor(pieces, where)
        self.image_size: int | None = None
        self.table_sha256: str | None = None
        self.blocks_carried = 0
        try:
            self._read_header()
        except BaseException:
            self._cursor.close()
            raise

    def __enter__(self) -> "DeltaReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._cursor.close()

    def _read_header(self) -> None:
        first = self._cursor.read(4, "its header")
        self.block_size = int(_U32.unpack(first)[0])
        self.format = 1
        if self.block_size == 0:
            self._read_header_2(bytes(first))
        if not MIN_BLOCK_SIZE <= self.block_size <= MAX_BLOCK_SIZE:
            raise self._cursor.damaged(f"its block size is {self.block_size}")

    def _read_header_2(self, first: bytes) -> None:
        rest = bytes(self._cursor.read(_HEADER_2.size - 4, "its header"))
        magic, self.block_size, self.image_size = _HEADER_2.unpack(first + rest)
        if magic != _MAGIC:
            raise self._cursor.damaged("it is not a delta")
        if self.image_size is not None and self.image_size > MAX_IMAGE_SIZE:
            raise self._cursor.damaged(f"its image size is {self.image_size}")
        self.format = 2

    def runs(self) -> Iterator[Run]:
        """Yield the runs of blocks in the delta, in ascending order, up to its end."""
        return self._runs_1() if self.format == 1 else self._runs_2()

    def _runs_1(self) -> Iterator[Run]:
        """Yield neighbouring blocks as one run, because a few large steps are faster than many small ones.

        A record that is shorter than a block can only be the last one: there is nothing left to read after it.
        """
        size, expected = self.block_size, 0
        parts: list[memoryview] = []
        start = length = 0
        while head := self._cursor.read_up_to(_OFFSET.size):
            if len(head) < _OFFSET.size:
                raise self._cursor.damaged("it ends in the middle of a record")
            offset = int(_OFFSET.unpack(head)[0])
            if offset < expected or offset % size or offset + size > MAX_IMAGE_SIZE:
                raise self._cursor.damaged(f"a record has the offset {offset}")
            data = self._cursor.read_up_to(size)
            if not data:
                raise self._cursor.damaged("it ends in the middle of a record")
            if parts and (offset != expected or length >= _RUN_BYTES or len(parts) >= _RUN_BLOCKS):
                yield self._joined(start, parts)
                parts, length = [], 0
            if not parts:
                start = offset
            parts.append(data)
            length += len(data)
            expected = offset + size
        if parts:
            yield self._joined(start, parts)

    def _joined(self, start: int, parts: list[memoryview]) -> Run:
        self.blocks_carried += len(parts)
        data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        return Run(start, len(data), data)

    def _runs_2(self) -> Iterator[Run]:
        assert self.image_size is not None
        position = 0
        while True:
            kind, offset, length = _RECORD.unpack(self._cursor.read(_RECORD.size, "a record"))
            if kind == _END:
                self._read_end(offset, length)
                return
            stop = offset + length
            if kind not in (_DATA, _ZEROS) or (kind == _DATA and length > MAX_RECORD):
                raise self._cursor.damaged(f"a record has the kind {kind} and the length {length}")
            if offset < position or offset % self.block_size or not length or stop > self.image_size:
                raise self._cursor.damaged(f"a record covers {length} bytes at offset {offset}")
            if stop % self.block_size and stop != self.image_size:
                raise self._cursor.damaged(f"a record covers {length} bytes, not whole blocks, at offset {offset}")
            data = self._cursor.read(length, "a record") if kind == _DATA else None
            self.blocks_carried += block_count(length, self.block_size)
            position = stop
            yield Run(offset, length, data)

    def _read_end(self, blocks: int, carried: int) -> None:
        self.table_sha256 = bytes(self._cursor.read(_SHA256_SIZE, "its end mark")).hex()
        if blocks != block_count(self.image_size or 0, self.block_size) or carried != self.blocks_carried:
            raise self._cursor.damaged("its end mark has other counts than its records")
        if self._cursor.read_up_to(1):
            raise self._cursor.damaged("something follows its end mark")


class Salvager:
    """Finds the plausible records in what is left of a damaged delta, piece by piece.

    Nothing proves what it yields: the caller must compare the digest of every block. The header shows the format of the
    delta; if the header is lost, it is `delta_format`. After a record that is not plausible, the rest of its member is
    skipped.
    """

    def __init__(self, block_size: int, delta_format: int) -> None:
        self._block_size = block_size
        self._format = delta_format
        self._rest = b""
        self._lost = True
        self.image_size: int | None = None

    def runs(self, data: bytes, begins_file: bool, begins_member: bool) -> Iterator[Run]:
        """Yield the records that this piece completes. A member begins with a record, the file with the header."""
        if begins_member:
            self._rest, self._lost = b"", False
        view = memoryview(self._rest + data if self._rest else data)
        if begins_file:
            view = view[self._header(view) :]
        while not self._lost:
            run, size = self._record_1(view) if self._format == 1 else self._record_2(view)
            if run is not None:
                yield run
            elif size == 0:
                break
            view = view[size:]
        self._rest = bytes(view)

    def last(self) -> Iterator[Run]:
        """Yield the last record of a format 1 delta if it is shorter than the others: the image's last block."""
        if self._format == 1 and not self._lost and len(self._rest) > _OFFSET.size:
            offset = int(_OFFSET.unpack_from(self._rest)[0])
            if offset + len(self._rest) <= MAX_IMAGE_SIZE and offset % self._block_size == 0:
                yield Run(offset, len(self._rest) - _OFFSET.size, memoryview(self._rest)[_OFFSET.size :])

    def _header(self, view: memoryview) -> int:
        """Return the size of the header, which is all in the first piece."""
        if bytes(view[: len(_MAGIC)]) == _MAGIC and len(view) >= _HEADER_2.size:
            self._format = 2
            self.image_size = int(_HEADER_2.unpack_from(view)[2])
            return _HEADER_2.size
        self._format = 1 if bytes(view[:4]) == _U32.pack(self._block_size) else self._format
        return _U32.size if self._format == 1 else _HEADER_2.size

    def _record_1(self, view: memoryview) -> tuple[Run | None, int]:
        size = _OFFSET.size + self._block_size
        if len(view) < size:
            return None, 0
        offset = int(_OFFSET.unpack_from(view)[0])
        if offset % self._block_size or offset > MAX_IMAGE_SIZE:
            self._lost = True
            return None, 0
        return Run(offset, self._block_size, view[_OFFSET.size : size]), size

    def _record_2(self, view: memoryview) -> tuple[Run | None, int]:
        if len(view) < _RECORD.size:
            return None, 0
        kind, offset, length = _RECORD.unpack_from(view)
        size = _RECORD.size + (length if kind == _DATA else 0)
        known = kind == _ZEROS or (kind == _DATA and length <= MAX_RECORD)
        if not known or offset % self._block_size or not 0 < length <= MAX_IMAGE_SIZE - offset:
            self._lost = True
            return None, 0
        if len(view) < size:
            return None, 0
        return Run(offset, length, view[_RECORD.size : size] if kind == _DATA else None), size
