"""Write the runs of a scan as a delta and a digest table, on several threads.

The digests in the new table are computed here, from the bytes that go into the delta. So the table proves the stored
data; it does not repeat what the host claims. Blocks that did not change keep the digests of the previous table.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from blockdiff.format import deltafile, digesttable
from blockdiff.format.deltafile import Sink
from blockdiff.format.digesttable import TableReader, TableWriter
from blockdiff.shared import pipeline
from blockdiff.shared.blocks import Hasher, block_count
from blockdiff.shared.errors import ProtocolError
from blockdiff.shared.runs import Run

#: Bytes of a member of a delta before compression, without the heads of its records: a member is closed when it has
#: MEMBER_BYTES or more, and has MAX_MEMBER_BYTES at most.
MEMBER_BYTES = 1 << 20
MAX_MEMBER_BYTES = 4 << 20
#: A member is closed when it has MEMBER_BLOCKS or more. A long run of zeros is cut into pieces of ZERO_BLOCKS, or fewer
#: in version 1.
MEMBER_BLOCKS = 8192
ZERO_BLOCKS = 65536


@dataclass
class _Member:
    """Runs that will be compressed together, and the buffer that has their bytes.

    In version 2 the buffer is what will be compressed: `used` includes the room for the heads of the records.
    """

    buffer: memoryview
    used: int = 0
    weight: int = 0
    blocks: int = 0
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """A compressed member, and the digests of each of its runs: (offset, length, joined digests)."""

    data: bytes
    digests: list[tuple[int, int, bytes]]


@dataclass(frozen=True)
class Written:
    """What a `DeltaWriter` wrote: the number of blocks of the image, of blocks in the delta, and of their bytes."""

    blocks: int
    changed_blocks: int
    changed_bytes: int


class DeltaWriter:
    """Writes one delta and its digest table: `add` takes the runs, `finish` ends both. A context manager.

    `old` is the previous generation's table, None for a full one. `allocate` returns a buffer for the data of the next
    run; the next call of `add` must then be for this run. `image_size`, in bytes, may be None at first for a version 1
    delta, and must be set before `finish`. The methods raise what the sinks raise, and `ProtocolError` if blocks were
    not added and are not in the previous table. An error that one run causes may be raised by a later call.
    """

    def __init__(
        self,
        delta: Sink,
        table: Sink,
        delta_format: int,
        hasher: Hasher,
        image_size: int | None,
        compress: Callable[[bytes | memoryview], bytes],
        old: TableReader | None,
    ) -> None:
        self._delta = delta
        self._format = delta_format
        self._hasher = hasher
        self.image_size = image_size
        self._compress = compress
        self._old = old
        self._table = TableWriter(table, hasher, digesttable.sparse_count(hasher, delta_format, image_size))
        self._head_size = deltafile.HEAD_SIZE if delta_format == 2 else 0
        self._pool = pipeline.BufferPool(MAX_MEMBER_BYTES + (MEMBER_BLOCKS + 1) * self._head_size)
        self._current = _Member(self._pool.get())
        self._full_members: list[_Member] = []
        workers = pipeline.worker_count()
        self._encoders = pipeline.Follower[_Encoded](workers + 2, workers)
        self._output = pipeline.Follower[object]()
        self._stack = ExitStack()
        self._changed_blocks = 0
        self._changed_bytes = 0

    def __enter__(self) -> "DeltaWriter":
        self._delta.write(self._compress(deltafile.header(self._format, self._hasher.block_size, self.image_size)))
        with ExitStack() as stack:
            stack.enter_context(self._output)
            stack.enter_context(self._encoders)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def allocate(self, length: int) -> memoryview:
        """Return a buffer for the next run, of `length` bytes, which is at most `MAX_MEMBER_BYTES`."""
        if self._current.used + self._head_size + length > len(self._current.buffer):
            self._close_member()
        start = self._current.used + self._head_size
        self._current.used = start + length
        return self._current.buffer[start : start + length]

    def add(self, run: Run) -> None:
        """Write a run. It must not begin before the end of the previous one."""
        for piece in self._pieces(run):
            member = self._current
            member.runs.append(piece)
            member.weight += piece.length if self._takes_room(piece) else 0
            member.used += self._head_size if piece.data is None else 0
            member.blocks += block_count(piece.length, self._hasher.block_size)
            if member.weight >= MEMBER_BYTES or member.blocks >= MEMBER_BLOCKS:
                self._close_member()
            self._encode_full_members()  # inside the loop, because a run of zeros may have any length

    def finish(self) -> Written:
        """Write what remains of the runs, and the ends of both files."""
        self._close_member()
        self._encode_full_members()
        self._store(self._encoders.finish())
        self._output.finish()
        assert self.image_size is not None, "the image's size must be known at its end"
        blocks = block_count(self.image_size, self._hasher.block_size)
        self._keep_until(blocks)
        self._table.finish()
        end = deltafile.end(self._format, blocks, self._changed_blocks, self._table.sha256())
        if end:
            self._delta.write(self._compress(end))
        return Written(blocks, self._changed_blocks, self._changed_bytes)

    def _takes_room(self, run: Run) -> bool:
        return run.data is not None or self._format == 1

    def _pieces(self, run: Run) -> Iterator[Run]:
        """Cut a long run of zeros. Its digests (in version 1 also its bytes) would otherwise fill the memory."""
        if run.data is not None:
            yield run
            return
        size = self._hasher.block_size
        blocks = min(max(MEMBER_BYTES // size, 1), MEMBER_BLOCKS) if self._format == 1 else ZERO_BLOCKS
        for start in range(0, run.length, blocks * size):
            yield Run(run.offset + start, min(blocks * size, run.length - start), None)

    def _close_member(self) -> None:
        if self._current.runs:
            self._full_members.append(self._current)
            self._current = _Member(self._pool.get())

    def _encode_full_members(self) -> None:
        for member in self._full_members:
            self._store(self._encoders.give(partial(self._encode, member)))
        self._full_members.clear()

    def _encode(self, member: _Member) -> _Encoded:
        """Hash, encode and compress a member. The worker threads do this."""
        digests = [(run.offset, run.length, self._hasher.run_digests(run.length, run.data)) for run in member.runs]
        data = self._compress(self._records(member))
        self._pool.give_back(member.buffer)
        return _Encoded(data, digests)

    def _records(self, member: _Member) -> bytes | memoryview:
        if self._format == 1:
            return b"".join(part for run in member.runs for part in deltafile.records_1(run, self._hasher.block_size))
        position = 0
        for run in member.runs:
            deltafile.put_head(member.buffer, position, run)
            position += deltafile.HEAD_SIZE + (0 if run.data is None else run.length)
        return member.buffer[:position]

    def _store(self, members: list[_Encoded]) -> None:
        for encoded in members:
            self._output.give(partial(self._delta.write, encoded.data))
            for offset, length, digests in encoded.digests:
                self._append_digests(offset, length, digests)

    def _append_digests(self, offset: int, length: int, digests: bytes) -> None:
        self._keep_until(offset // self._hasher.block_size)
        self._table.append(digests)
        self._changed_blocks += block_count(length, self._hasher.block_size)
        self._changed_bytes += length

    def _keep_until(self, block: int) -> None:
        """Append the previous digests of the blocks from the table's end up to `block`, which did not change."""
        while self._table.count < block:
            first = self._table.count
            kept = self._old.digests(first, min(block - first, ZERO_BLOCKS)) if self._old is not None else b""
            if not kept:
                raise ProtocolError(f"blocks {first} to {block - 1} were not sent, and no earlier generation has them")
            self._table.append(kept)
