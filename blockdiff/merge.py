"""Merge the deltas of a chain into an image. Restore and verify both use this.

The newest delta is merged first: so each block is written once, and only the deltas that are needed are read. Before a
block is written, it is checked against the digest table of the generation that is restored.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from blockdiff.chain.generations import Generation
from blockdiff.format import codec, deltafile
from blockdiff.format.deltafile import DeltaReader
from blockdiff.format.digesttable import PART_BLOCKS, TableReader, first_difference
from blockdiff.shared import pipeline, trace
from blockdiff.shared.blocks import Hasher, block_count, digest_named, shown_size
from blockdiff.shared.errors import DamagedError, printable
from blockdiff.shared.runs import Run


class Target(Protocol):
    """What an image is written to. Several threads may call `write` and `zero` at the same time."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`."""

    def zero(self, offset: int, length: int) -> None:
        """Make `length` bytes at `offset` zero."""

    def finish(self, image_size: int) -> None:
        """Complete the target: everything was written, and the image has this many bytes."""


def open_delta(generation: Generation) -> BinaryIO:
    """Return the file of a generation's delta; raises `DamagedError` if it is missing."""
    return os.fdopen(generation.directory.open(generation.name(generation.delta_suffix)), "rb", buffering=0)


@contextmanager
def read_delta(generation: Generation, file: codec.Readable) -> Iterator[DeltaReader]:
    """Yield a reader of the generation's delta; raises `DamagedError` if its header does not match the manifest."""
    where = generation.path(generation.delta_suffix)
    with DeltaReader(codec.decompressed(file, where, generation.compression), where) as reader:
        known = generation.manifest
        if known is not None and (reader.format, reader.block_size) != (known.delta_format, known.block_size):
            raise DamagedError(f"{where} is not the delta that its manifest describes", "restore it from a copy")
        if known is not None and reader.image_size not in (None, known.image_size):
            raise DamagedError(f"{where} has another image size than its manifest", "restore it from a copy")
        yield reader


def check_table(generation: Generation, reader: DeltaReader, table: TableReader) -> None:
    """Raise `DamagedError` unless a delta that was read to its end was written with this digest table."""
    if reader.table_sha256 not in (None, table.sha256()):
        raise DamagedError(
            f"{generation.path(generation.table_suffix)} is not the table that the delta was written with",
            "restore it from a copy",
        )


def digested(runs: Iterable[Run], hasher: Hasher) -> Iterator[tuple[Run, bytes]]:
    """Yield the runs of a delta with the joined digests of their blocks, computed by several threads."""

    def digest(group: list[Run]) -> list[tuple[Run, bytes]]:
        return [(run, hasher.run_digests(run.length, run.data)) for run in group]

    for group in pipeline.in_order(digest, deltafile.together(runs)):
        yield from group


def stretches(flags: bytearray, value: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (first, last) for each longest sequence of flags that are `value`, 0 or 1, from `start` up to `stop`.

    `last` is excluded. The caller may change the flags of a sequence before it asks for the next one.
    """
    end = len(flags) if stop is None else stop
    first = flags.find(value, start, end) if start < end else -1
    while first >= 0:
        last = flags.find(1 - value, first, end)
        last = end if last < 0 else last
        yield first, last
        first = flags.find(value, last, end)


class _Merger:
    """One restore: the digest table against which everything is checked, and which blocks are done."""

    def __init__(self, generation: Generation, table: TableReader, target: Target) -> None:
        self._generation = generation
        self._table = table
        self._target = target
        self._hasher = Hasher(digest_named(generation.digest), table.block_size)
        self._done = bytearray(table.count)
        self.remaining = table.count
        self.image_size = generation.manifest.image_size if generation.manifest is not None else None

    def apply(self, generation: Generation, advance: Callable[[int], object]) -> None:
        """Write the blocks that are still missing and are in this delta."""
        with open_delta(generation) as file, read_delta(generation, file) as reader:
            if reader.block_size != self._table.block_size:
                raise DamagedError(
                    f"{generation.path(generation.delta_suffix)} has blocks of {reader.block_size} bytes, "
                    f"but generation {self._generation.number}, which needs it, of {self._table.block_size}"
                )
            if generation is self._generation:
                self.image_size = reader.image_size if self.image_size is None else self.image_size
                self._check_size()

            def check_and_write(runs: list[Run]) -> int:
                return sum(self._check_and_write(generation, run) for run in runs)

            missing = self._missing(reader, generation is self._generation)
            for length in pipeline.in_order(check_and_write, deltafile.together(missing)):
                advance(length)
            if generation is self._generation:
                check_table(generation, reader, self._table)

    def _check_size(self) -> None:
        if self.image_size is not None and block_count(self.image_size, self._table.block_size) != self._table.count:
            raise DamagedError(
                f"{self._generation.path(self._generation.table_suffix)} has {self._table.count} digests, "
                f"which do not fit an image of {self.image_size} bytes"
            )

    def _missing(self, reader: DeltaReader, to_the_end: bool) -> Iterator[Run]:
        """Yield the parts of the delta's runs that no newer delta had, and mark them as done.

        The newest delta is read to its end, because its end is checked; an older one only as far as it is needed.
        """
        for run in reader.runs():
            if to_the_end and run.offset + run.length > self._table.count * self._table.block_size:
                raise DamagedError(
                    f"{self._generation.path(self._generation.table_suffix)} has no digests for the end of the delta"
                )
            yield from self._undone_parts(run)
            if not self.remaining and not to_the_end:
                return

    def _undone_parts(self, run: Run) -> Iterator[Run]:
        size = self._table.block_size
        base = run.offset // size
        stop = min(base + block_count(run.length, size), self._table.count)
        for first, last in stretches(self._done, 0, base, stop):
            for start in range(first, last, PART_BLOCKS):
                yield self._part(run, start - base, min(start + PART_BLOCKS, last) - base)
            self._done[first:last] = b"\1" * (last - first)
            self.remaining -= last - first

    def _part(self, run: Run, first: int, last: int) -> Run:
        size = self._table.block_size
        start, end = first * size, min(last * size, run.length)
        part = Run(run.offset + start, end - start, None if run.data is None else run.data[start:end])
        if part.offset // size + last - first == self._table.count and self.image_size is None:
            self.image_size = run.offset + end  # without a manifest, the newest record of the last block shows it
        return part

    def _check_and_write(self, generation: Generation, run: Run) -> int:
        """Check and write a run, in a worker thread. Returns the length of the run in bytes."""
        size, digest_size = self._table.block_size, self._table.digest_size
        first = run.offset // size
        count = block_count(run.length, size)
        expected = self._table.digests(first, count)
        if run.data is None:
            digests = self._hasher.zero_digests(run.length)
            found = [digests[i : i + digest_size] for i in range(0, len(digests), digest_size)]
        else:
            found = self._hasher.digests(run.data)
            digests = b"".join(found)
        if digests != expected:
            bad = first_difference(digests, expected, digest_size)
            raise DamagedError(
                f"{generation.path(generation.delta_suffix)} is damaged: the block at offset {(first + bad) * size} "
                f"does not match the digest table of generation {self._generation.number}",
                "restore it from a copy",
            )
        if run.data is None:
            self._target.zero(run.offset, run.length)
        else:
            self._write(run, run.data, found)
        return run.length

    def _write(self, run: Run, data: memoryview, digests: list[bytes]) -> None:
        """Write neighbouring blocks together, and zero blocks, which their digest shows, as zeros."""
        size, zero = self._table.block_size, self._hasher.zero_digest
        start = 0
        for i in range(1, len(digests) + 1):
            if i < len(digests) and (digests[i] == zero) == (digests[start] == zero):
                continue
            begin, end = start * size, min(i * size, run.length)
            if digests[start] == zero:
                self._target.zero(run.offset + begin, end - begin)
            else:
                self._target.write(run.offset + begin, data[begin:end])
            start = i


def merge(
    generations: Sequence[Generation], target: Target, advance: Callable[[int], object] = lambda length: None
) -> int:
    """Write the image of ``generations[0]`` to `target`, and return its size in bytes.

    `generations` are newest first (`Chain.needed`). `advance` is called with the length of each part that was written.
    Raises `DamagedError` if they do not give the exact image; then the target must not be used.
    """
    newest = generations[0]
    if newest.manifest_error is None:  # verify reports a damaged manifest: nothing here depends on it
        newest.check_files()
    with newest.open_table() as table:
        merger = _Merger(newest, table, target)
        oldest = newest.number
        for generation in generations:
            if not merger.remaining and generation is not newest:
                break
            _apply(merger, generation, newest, advance)
            oldest = generation.number
        if merger.remaining:
            raise _incomplete(newest, oldest, merger.remaining * table.block_size)
        assert merger.image_size is not None or table.count == 0
        image_size = merger.image_size or 0
        trace.phase("complete the image")
        target.finish(image_size)
        return image_size


def _apply(merger: _Merger, generation: Generation, newest: Generation, advance: Callable[[int], object]) -> None:
    try:
        trace.phase(f"apply generation {generation.number}")
        merger.apply(generation, advance)
    except DamagedError as error:
        if generation is newest:
            raise
        raise DamagedError(
            f"generation {newest.number} needs generation {generation.number}, which is damaged: {error.message}",
            error.hint,
        ) from error


def _incomplete(newest: Generation, oldest: int, count: int) -> DamagedError:
    """Return the error for an image with `count` bytes that are not in any delta from generation `oldest` on."""
    deltas = f"the delta of generation {oldest}" if oldest == newest.number else f"the deltas of generations {oldest}"
    until = "" if oldest == newest.number else f" to {newest.number}"
    why = f", and generation {oldest - 1} is missing" if oldest > 1 else ""
    return DamagedError(
        f"generation {newest.number} of {printable(newest.base)} cannot be restored: {shown_size(count)} of it are "
        f"not in {deltas}{until}{why}",
        "restore the files that are missing from a copy",
    )
