"""Prove, without writing an image, which generations of a chain restore exactly.

All deltas are read once, oldest first, and for each block the digest of its newest bytes is kept. A generation restores
exactly if and only if these digests are those of its table, which is what a restore checks block by block. A delta that
cannot be read takes everything older with it: a restore that gets so far fails there, too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

from blockdiff import merge
from blockdiff.chain import temporary
from blockdiff.chain.generations import Chain, Generation, missing
from blockdiff.chain.inventory import MANIFEST_SUFFIX
from blockdiff.format import checksum
from blockdiff.format.checksum import Checksum
from blockdiff.format.deltafile import DeltaReader
from blockdiff.format.digesttable import PART_BLOCKS, TableReader, TableWriter, first_difference, sparse_count
from blockdiff.format.manifest import Manifest
from blockdiff.shared import trace
from blockdiff.shared.blocks import DIGEST_SIZES, Digest, Hasher, block_count, digest_named
from blockdiff.shared.errors import BlockdiffError, DamagedError, StorageError
from blockdiff.shared.runs import Run


@dataclass(frozen=True)
class Verdict:
    """What `verify` found of one generation; `error` is None for a sound one.

    `table` is the digest table that the generation has lost, if the deltas still give exactly the one that its manifest
    knows, and the `Verifier` was asked for it.
    """

    number: int
    error: BlockdiffError | None
    table: temporary.UnnamedFile | None = None


class CheckedFile:
    """A file of a delta whose checksum is known when it was read: by the algorithm of its manifest, if it has one."""

    def __init__(self, file: BinaryIO, known: Manifest | None = None) -> None:
        self._file = file
        self._known = known
        algorithm = checksum.algorithm(known.delta.checksum) if known is not None else None
        self._checksum = Checksum(algorithm or checksum.OF_DELTAS)

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes."""
        data = self._file.read(count)
        self._checksum.update(data)
        return data

    def checksum(self) -> str:
        """Return the checksum of what was read."""
        return self._checksum.text()

    def check(self, generation: Generation) -> None:
        """Raise `DamagedError` unless what was read, all of the delta, is what the manifest knows, if there is one."""
        if self._known is not None and self.checksum() != self._known.delta.checksum:
            where = generation.path(self._known.delta.suffix)
            raise DamagedError(f"{where} is damaged: its checksum is not the manifest's", "restore it from a copy")


class _Newest:
    """The digests of the newest bytes of every block, in an unnamed file: they may be more than the memory holds."""

    def __init__(self, digest: Digest, block_size: int) -> None:
        self.digest = digest
        self.digest_size = digest.size
        self.block_size = block_size
        self._file = temporary.UnnamedFile()

    def close(self) -> None:
        self._file.close()

    def put(self, first: int, digests: bytes) -> None:
        self._file.seek(first * self.digest_size)
        self._file.write(digests)

    def get(self, first: int, count: int) -> bytes:
        """Return the digests of `count` blocks, zero bytes for blocks that no delta had."""
        self._file.seek(first * self.digest_size)
        found = self._file.read(count * self.digest_size) or b""
        return found.ljust(count * self.digest_size, b"\0")

    def keep_only(self, carried: bytearray) -> "_Newest":
        """Return a copy that knows only the blocks that are marked in `carried`, and close this one."""
        copy = _Newest(self.digest, self.block_size)
        for first, last in merge.stretches(carried, 1):
            for start in range(first, last, PART_BLOCKS):
                copy.put(start, self.get(start, min(PART_BLOCKS, last - start)))
        self.close()
        return copy


class Verifier:
    """Verifies the generations of a chain, oldest first. A context manager.

    `advance` gets the number of bytes of each stored delta that was read. Without `needs_manifests`, none is missed.
    `tables` keeps the lost digest tables open that are made of the deltas; without it, none is made.
    """

    def __init__(
        self,
        chain: Chain,
        advance: Callable[[int], object] = lambda count: None,
        needs_manifests: bool = True,
        tables: ExitStack | None = None,
    ) -> None:
        self._chain = chain
        self._advance = advance
        self._needs_manifests = needs_manifests
        self._newest: _Newest | None = None
        self._limit = max(map(_most_blocks, chain.generations.values()), default=0)
        self._format = 0
        self._carried_end = 0
        self._is_as_written = False
        #: What could not be read last, for a sentence: younger generations may need it.
        self._lost: str | None = None
        self._tables = tables

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self._forget()

    def all(self, limit: int | None = None) -> Iterator[Verdict]:
        """Yield the verdict on every generation from the first that exists to `limit` or the last complete one."""
        for first, last in self._chain.spans(self._chain.last() if limit is None else limit):
            yield self._verify(first) if first in self._chain.generations else self._missing(first, last)

    def one(self, number: int) -> Verdict:
        """Return the verdict on one generation; the older ones are read as far as a restore would read them."""
        oldest = self._chain.needed(number)[-1].number
        for older in range(oldest, number):
            self._verify(older)
        return self._verify(number)

    def _forget(self) -> None:
        if self._newest is not None:
            self._newest.close()
            self._newest = None

    def _verify(self, number: int) -> Verdict:
        trace.phase(f"verify generation {number}")
        generation = self._chain.generations[number]
        if self._newest is None and self._lost is None and number > 1:
            self._lost = f"generation {number - 1}, which is missing"
        errors = [
            self._try(generation.check_files),
            self._try(lambda: self._chain.check_manifest(generation)),
            self._try(lambda: self._chain.check_parent(generation)),
            self._try(lambda: self._read_delta(generation)),
        ]
        if not any(errors):
            errors.append(self._try(lambda: self._compare(generation)))
        error = next((error for error in errors if error is not None), None)
        return Verdict(number, error, None if error is None else self._lost_table(generation))

    def _lost_table(self, generation: Generation) -> temporary.UnnamedFile | None:
        """Return the table that a generation lacks, if its delta is as it was written and the deltas make the table."""
        known, newest = generation.manifest, self._newest
        if self._tables is None or known is None or newest is None:
            return None
        if not self._is_as_written or _has_table(generation):
            return None
        hasher = Hasher(newest.digest, newest.block_size)
        file = self._tables.enter_context(temporary.UnnamedFile())
        count = sparse_count(hasher, known.delta_format, known.image_size)
        writer = TableWriter(file, hasher, count)
        for first in range(0, known.blocks, PART_BLOCKS):
            writer.append(newest.get(first, min(PART_BLOCKS, known.blocks - first)))
        writer.finish()
        return file if checksum.of_sha256(writer.sha256()) == known.table.checksum else None

    def _missing(self, first: int, last: int) -> Verdict:
        self._forget()
        self._lost = (
            f"generation {first}, which is missing"
            if first == last
            else f"generations {first} to {last}, which are missing"
        )
        return Verdict(first, missing(first, last))

    @staticmethod
    def _try(check: Callable[[], object]) -> BlockdiffError | None:
        try:
            check()
        except (DamagedError, StorageError) as error:
            return error
        return None

    def _read_delta(self, generation: Generation) -> None:
        """Take the digests of all blocks that the delta carries; of no others if it cannot be read to its end.

        Raises `DamagedError` as well if it can be read but is not what was written: younger generations, which are
        checked against tables of their own, do not suffer from that.
        """
        carried = bytearray()
        self._is_as_written = False
        try:
            with ExitStack() as stack:
                file = CheckedFile(stack.enter_context(merge.open_delta(generation)), generation.manifest)
                reader = stack.enter_context(merge.read_delta(generation, file))
                self._prepare(generation, reader)
                self._carried_end = 0
                self._read_runs(generation, reader, carried)
        except (DamagedError, StorageError):
            self._lost = f"generation {generation.number}, which is damaged"
            if self._newest is not None:
                self._newest = self._newest.keep_only(carried)
            raise
        self._format = reader.format
        known = generation.manifest
        if known is not None and known.full:
            self._lost = None
        file.check(generation)
        self._is_as_written = known is not None
        if reader.table_sha256 is not None:
            with generation.open_table() as table:
                merge.check_table(generation, reader, table)

    def _prepare(self, generation: Generation, reader: DeltaReader) -> None:
        newest = self._newest
        digest = self._digest_of(generation)
        if newest is None or (newest.digest.name, newest.block_size) != (digest.name, reader.block_size):
            self._forget()
            self._newest = _Newest(digest, reader.block_size)

    def _digest_of(self, generation: Generation) -> Digest:
        """Return the digest that the chain uses here: the delta is of use to younger generations without its table."""
        if generation.manifest is not None:
            return digest_named(generation.manifest.digest)
        try:
            return digest_named(generation.digest)
        except DamagedError:
            if self._newest is None:
                raise
            return self._newest.digest

    def _read_runs(self, generation: Generation, reader: DeltaReader, carried: bytearray) -> None:
        assert self._newest is not None
        hasher = Hasher(self._newest.digest, reader.block_size)

        failures: list[BlockdiffError] = []

        def readable() -> Iterator[Run]:
            """Yield what comes before an error, which is raised when all of that was taken."""
            try:
                yield from short_runs(reader)
            except (DamagedError, StorageError) as error:
                failures.append(error)

        for run, digests in merge.digested(readable(), hasher):
            first, end = run.offset // reader.block_size, block_count(run.offset + run.length, reader.block_size)
            self._carried_end = end
            end = min(end, self._limit)  # no restore needs blocks beyond, and a damaged offset can be anything
            if first < end:
                self._newest.put(first, digests[: (end - first) * self._newest.digest_size])
                carried.extend(bytes(max(0, end - len(carried))))
                carried[first:end] = b"\1" * (end - first)
            self._advance(run.length)
        if failures:
            raise failures[0]

    def _compare(self, generation: Generation) -> None:
        """Raise `DamagedError` unless the newest digests are those of the generation's table."""
        assert self._newest is not None
        with generation.open_table() as table:
            known = generation.manifest
            if known is None and self._format != 1 and self._needs_manifests:
                raise DamagedError(f"{generation.path(MANIFEST_SUFFIX)} is missing", "restore it from a copy")
            if self._carried_end > table.count:
                raise DamagedError(
                    f"{generation.path(generation.table_suffix)} has no digests for the end of the delta"
                )
            if (table.block_size, known.blocks if known else table.count) != (self._newest.block_size, table.count):
                raise DamagedError(
                    f"{generation.path(generation.table_suffix)} does not fit the delta and the manifest"
                )
            for first in range(0, table.count, PART_BLOCKS):
                expected = table.digests(first, PART_BLOCKS)
                found = self._newest.get(first, len(expected) // table.digest_size)
                if found != expected:
                    raise self._differs(generation, table, first, expected, found)

    def _differs(
        self, generation: Generation, table: TableReader, first: int, expected: bytes, found: bytes
    ) -> DamagedError:
        size = table.digest_size
        bad = first_difference(found, expected, size)
        offset = (first + bad) * table.block_size
        hint = "restore the damaged files from a copy"
        if found[bad * size : (bad + 1) * size] != bytes(size):
            where = generation.path(generation.table_suffix)
            return DamagedError(f"the block at offset {offset} does not match {where}", hint)
        if self._lost is None:
            return DamagedError(f"the block at offset {offset} of {generation.path()} is in none of the deltas", hint)
        return DamagedError(f"it needs {self._lost}", hint)


def _has_table(generation: Generation) -> bool:
    try:
        with generation.open_table():
            return True
    except DamagedError:
        return False


def _most_blocks(generation: Generation) -> int:
    """Return a number of blocks that the generation's image cannot exceed."""
    if generation.manifest is not None:
        return generation.manifest.blocks
    size = max(map(generation.size_of, generation.suffixes), default=0)
    try:
        with generation.open_table() as table:
            count = table.count  # one in the sparse form is smaller than its digests
    except (DamagedError, StorageError):
        count = 0
    return max(count, size // min(DIGEST_SIZES.values()))


def short_runs(reader: DeltaReader) -> Iterator[Run]:
    """Yield the delta's runs in parts whose digests fit in the memory."""
    step = PART_BLOCKS * reader.block_size
    for run in reader.runs():
        for start in range(0, run.length, step):
            length = min(step, run.length - start)
            yield Run(run.offset + start, length, None if run.data is None else run.data[start : start + length])
