"""Restore the sound blocks of a damaged generation, and report the others.

The newest delta is read first, as in `merge`, but damage does not end the restore. A block is written, from any delta
in which it can still be read, only if its digest is the one in the generation's table. So what is written is exact;
blocks that are not found are zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockdiff import merge
from blockdiff.chain.generations import Chain, Generation
from blockdiff.format import codec
from blockdiff.format.deltafile import Salvager
from blockdiff.format.digesttable import PART_BLOCKS, TableReader
from blockdiff.shared.blocks import DIGEST_SIZES, Hasher, block_count, digest_named
from blockdiff.shared.errors import DamagedError, StorageError
from blockdiff.shared.runs import Run


@dataclass(frozen=True)
class Salvaged:
    """The result: the size of the image, and its `lost` parts as (offset, length), all in bytes.

    `notes` say what was damaged or missing.
    """

    image_size: int
    lost: list[tuple[int, int]]
    notes: list[str]


def salvage(
    chain: Chain, number: int, target: merge.Target, advance: Callable[[int], object] = lambda length: None
) -> Salvaged:
    """Write the blocks of generation `number` that can be found to `target`, and zeros for the others.

    `advance` is called with the length of each block that was written. Raises `DamagedError` if there is no digest
    table: without it, nothing shows which blocks are sound.
    """
    generation = chain.generations[number]
    notes: list[str] = []
    with _table(generation, notes) as table:
        salvager = _Salvage(generation, table, target, advance)
        for older in _older(chain, number):
            if not salvager.remaining and older is not generation:
                break
            _note(notes, older)
            try:
                salvager.read_delta(older)
            except (DamagedError, StorageError) as error:
                notes.append(error.message)
        return salvager.finish(notes)


def _older(chain: Chain, number: int) -> Iterator[Generation]:
    """Yield the existing generations that may contain blocks of this one, newest first, back to the last full one."""
    for n in sorted((n for n in chain.generations if n <= number), reverse=True):
        yield chain.generations[n]
        known = chain.generations[n].manifest
        if known is not None and known.full:
            return


def _table(generation: Generation, notes: list[str]) -> TableReader:
    """Return the digest table, even if it is damaged: a block and a digest that match prove each other."""
    try:
        return generation.open_table()
    except DamagedError as error:
        notes.append(error.message)
    suffix = generation.table_suffix
    table = TableReader(
        generation.directory.open(generation.name(suffix)), generation.path(suffix), DIGEST_SIZES[generation.digest]
    )
    if generation.manifest is not None:
        table.block_size = generation.manifest.block_size
    return table


def _note(notes: list[str], generation: Generation) -> None:
    try:
        generation.check_files()
    except DamagedError as error:
        notes.append(error.message)


class _Salvage:
    """The salvage of one image: keeps track of the blocks that are still missing."""

    def __init__(
        self, generation: Generation, table: TableReader, target: merge.Target, advance: Callable[[int], object]
    ) -> None:
        self._table = table
        self._target = target
        self._advance = advance
        self._hasher = Hasher(digest_named(generation.digest), table.block_size)
        self._done = bytearray(table.count)
        self._generation = generation
        self.remaining = table.count
        known = generation.manifest
        self._image_size = known.image_size if known is not None else None
        self._end: int | None = None

    def read_delta(self, generation: Generation) -> None:
        """Write those missing blocks that are in this delta."""
        known = generation.manifest
        reader = Salvager(self._table.block_size, known.delta_format if known is not None else 1)
        with merge.open_delta(generation) as file:
            where = generation.path(generation.delta_suffix)
            for piece in codec.sound_pieces(file, where, generation.compression):
                for run in reader.runs(piece.data, piece.begins_file, piece.begins_member):
                    self._write_run(run)
            for run in reader.last():
                self._write_run(run)
        claimed = reader.image_size if generation is self._generation else None
        size = self._table.block_size
        if self._image_size is None and claimed is not None and block_count(claimed, size) == self._table.count:
            self._image_size = claimed

    def _write_run(self, run: Run) -> None:
        size = self._table.block_size
        first = run.offset // size
        stop = min(first + block_count(run.length, size), self._table.count)
        for start in range(first, stop, PART_BLOCKS):
            end = min(start + PART_BLOCKS, stop)
            if self._done.find(0, start, end) < 0:
                continue
            offset, length = start * size, min(end * size, run.offset + run.length) - start * size
            data = None if run.data is None else run.data[offset - run.offset : offset - run.offset + length]
            self._write_part(Run(offset, length, data))

    def _write_part(self, run: Run) -> None:
        """Write those blocks of a run that are still missing and have the digests in the table."""
        size, digest_size = self._table.block_size, self._table.digest_size
        first = run.offset // size
        found = self._hasher.run_digests(self._inside(run), run.data)
        expected = self._table.digests(first, len(found) // digest_size)
        for i in range(len(found) // digest_size):
            at = slice(i * digest_size, (i + 1) * digest_size)
            begin, end = i * size, min((i + 1) * size, self._inside(run))
            if (
                self._done[first + i]
                or found[at] != expected[at]
                or not self._is_block(run.offset + begin, end - begin)
            ):
                continue
            if run.data is None:
                self._target.zero(run.offset + begin, end - begin)
            else:
                self._target.write(run.offset + begin, run.data[begin:end])
            self._done[first + i] = 1
            self.remaining -= 1
            if first + i == self._table.count - 1:
                self._end = run.offset + end
            self._advance(end - begin)

    def _is_block(self, offset: int, length: int) -> bool:
        """Return whether `length` bytes at `offset` are a whole block. Only the last block of an image may be short."""
        if length == self._table.block_size or self._image_size is not None:
            return length == self._table.block_size or offset + length == self._image_size
        return offset // self._table.block_size == self._table.count - 1

    def _inside(self, run: Run) -> int:
        """Return how many bytes of a run are inside the image: a run of zeros may end after the image."""
        if run.data is not None or self._image_size is None:
            return run.length
        return max(0, min(run.length, self._image_size - run.offset))

    def finish(self, notes: list[str]) -> Salvaged:
        """Write zeros for the missing blocks, and return the result, which lists them."""
        size = self._table.block_size
        image_size = self._image_size
        if image_size is None:
            image_size = self._end if self._end is not None else self._table.count * size
        blocks, known = block_count(image_size, size), len(self._done)
        stretches = list(merge.stretches(self._done, 0, stop=min(known, blocks)))
        if known < blocks:  # the table has lost its end
            first = stretches.pop()[0] if stretches and stretches[-1][1] == known else known
            stretches.append((first, blocks))
        lost = []
        for first, last in stretches:
            offset = first * size
            lost.append((offset, min(last * size, image_size) - offset))
            self._target.zero(*lost[-1])
        self._target.finish(image_size)
        return Salvaged(image_size, lost, list(dict.fromkeys(notes)))
