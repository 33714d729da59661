"""Two other proofs beside `verify`: of one generation alone, and by merging an image.

One generation alone is proven like the step of an induction: what its delta carries has the digests of its table, and
the table agrees with the one before about everything else. If each generation passes, each restores exactly; and
each can be looked at on another day.
"""

from collections.abc import Callable

from blockdiff import merge
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import MANIFEST_SUFFIX
from blockdiff.check.verify import CheckedFile, short_runs
from blockdiff.format.deltafile import DeltaReader
from blockdiff.format.digesttable import PART_BLOCKS, TableReader, first_difference
from blockdiff.shared.blocks import Hasher, block_count, digest_named, shown_size
from blockdiff.shared.errors import DamagedError, printable

Proof = Callable[[Chain, int, Callable[[int], object]], None]


class _Nowhere:
    """A target that keeps nothing."""

    def write(self, offset: int, data: memoryview) -> None:
        """Forget it."""

    def zero(self, offset: int, length: int) -> None:
        """Forget it."""

    def finish(self, image_size: int) -> None:
        """Nothing is left to do."""


def put_together(chain: Chain, number: int, advance: Callable[[int], object] = lambda length: None) -> None:
    """Do all that a restore of generation `number` does, but keep nothing; raises `DamagedError` if that fails.

    `advance` gets the length of each part of the image.
    """
    _checked(chain, number)
    merge.merge(chain.needed(number), _Nowhere(), advance)


def alone(chain: Chain, number: int, advance: Callable[[int], object] = lambda length: None) -> None:
    """Prove what generation `number` adds to the one before it; raises `DamagedError` if that fails.

    `advance` gets the length of each run of the delta.
    """
    generation = _checked(chain, number)
    with generation.open_table() as table:
        carried = _check_delta(generation, table, advance)
        first = carried.find(0)
        if first < 0:
            return
        parent = chain.generations.get(number - 1)
        if parent is None:
            raise _unproven(generation, first * table.block_size, f"generation {number - 1} is missing")
        with parent.open_table() as old:
            if (old.block_size, parent.digest) != (table.block_size, generation.digest):
                raise _unproven(generation, first * table.block_size, "the table before it has another form")
            _check_rest(generation, table, old, carried)


def _checked(chain: Chain, number: int) -> Generation:
    """Return a generation whose files and manifest look as they should."""
    generation = chain.generations[number]
    generation.check_files()
    chain.check_manifest(generation)
    chain.check_parent(generation)
    return generation


def _check_delta(generation: Generation, table: TableReader, advance: Callable[[int], object]) -> bytearray:
    """Check all that the delta carries against the table; return a byte for each block, 1 for those that it carries."""
    where = generation.path(generation.delta_suffix)
    hasher = Hasher(digest_named(generation.digest), table.block_size)
    carried = bytearray(table.count)

    with merge.open_delta(generation) as raw:
        file = CheckedFile(raw, generation.manifest)
        with merge.read_delta(generation, file) as reader:
            _check_form(generation, reader, table)
            for run, found in merge.digested(short_runs(reader), hasher):
                first, count = run.offset // table.block_size, block_count(run.length, table.block_size)
                if first + count > table.count:
                    raise DamagedError(f"{where} has blocks beyond the digest table", "restore both from a copy")
                if found != table.digests(first, count):
                    raise DamagedError(
                        f"{where} does not match its digest table in the {shown_size(run.length)} "
                        f"at offset {run.offset}",
                        "restore the damaged file from a copy",
                    )
                carried[first : first + count] = b"\1" * count
                advance(run.length)
        file.check(generation)
        merge.check_table(generation, reader, table)
    return carried


def _check_form(generation: Generation, reader: DeltaReader, table: TableReader) -> None:
    size = reader.image_size
    fits = reader.block_size == table.block_size and (
        size is None or block_count(size, table.block_size) == table.count
    )
    known = generation.manifest
    if known is None and reader.format != 1:
        raise DamagedError(f"{generation.path(MANIFEST_SUFFIX)} is missing", "restore it from a copy")
    if not fits or (known is not None and known.blocks != table.count):
        raise DamagedError(f"{generation.path(generation.table_suffix)} does not fit the delta and the manifest")


def _check_rest(generation: Generation, table: TableReader, old: TableReader, carried: bytearray) -> None:
    """Compare the digests of what the delta does not carry with those of the table before."""
    for first, last in merge.stretches(carried, 0):
        for start in range(first, last, PART_BLOCKS):
            count = min(PART_BLOCKS, last - start)
            new, before = table.digests(start, count), old.digests(start, min(count, max(0, old.count - start)))
            if new != before:
                bad = first_difference(new, before, table.digest_size)
                raise _unproven(generation, (start + bad) * table.block_size, "its digest changed")


def _unproven(generation: Generation, offset: int, why: str) -> DamagedError:
    return DamagedError(
        f"the delta of {generation.path()} does not have the block at offset {offset}, and {why}",
        f"restore the files of generation {generation.number - 1} and {generation.number} from a copy; "
        f"`verify` without --subset checks all of {printable(generation.base)} together",
    )
