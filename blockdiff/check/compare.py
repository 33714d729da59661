"""Compare a generation with a source as it is now."""

import os
from contextlib import ExitStack
from dataclasses import dataclass

from blockdiff.chain.generations import Generation
from blockdiff.progress import Progress
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.session import Session
from blockdiff.shared.blocks import block_count, digest_named
from blockdiff.shared.errors import DamagedError
from blockdiff.transport.address import Address


@dataclass(frozen=True)
class Difference:
    """What differs: `ranges` are (offset, length) in bytes, whole blocks, ascending; sizes in bytes.

    `image_size` is None if that of the generation is not known; `source_size` beyond it counts as different.
    `unrest` says how the source was written to while it was read, or in use, in words that follow its path; "" for
    neither.
    """

    ranges: list[tuple[int, int]]
    image_size: int | None
    source_size: int
    unrest: str = ""

    @property
    def is_none(self) -> bool:
        """Whether source and image are the same."""
        return not self.ranges and self.image_size in (None, self.source_size)


def compare(generation: Generation, session: Session, address: Address, progress: Progress) -> Difference:
    """Return where the source at `address`, reached by `session`, differs from a generation, by their digests.

    The host reads all of it and sends what differs; nothing is kept. Raises `DamagedError` if the digest table
    cannot be read, and whatever reading the source raises.
    """
    ranges: list[tuple[int, int]] = []
    with ExitStack() as stack:
        table = stack.enter_context(generation.open_table())
        if table.count == 0:
            raise DamagedError(f"{generation.path(generation.table_suffix)} has no digests", "restore it from a copy")
        digest = digest_named(generation.digest)
        session.check_digest(digest)
        session.prepare(RunRequest([SourceRequest(os.fsencode(address.path))], low_priority=True))
        session.begin_take()
        session.end_take()
        scan = ScanRequest(table.block_size, digest, table)
        opened = session.scan(scan)
        progress.begin(opened.size)
        for run in session.changes(
            scan,
            opened.size,
            lambda length: memoryview(bytearray(length)),
            lambda offset: progress.update(offset, session.bytes_received),
        ):
            if ranges and sum(ranges[-1]) == run.offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + run.length)
            else:
                ranges.append((run.offset, run.length))
        session.finish()
        known = generation.manifest
        size = known.image_size if known is not None else None
        if size is None and block_count(opened.size, table.block_size) < table.count:
            end = block_count(opened.size, table.block_size) * table.block_size
            ranges.append((end, table.count * table.block_size - end))
    return Difference(ranges, size, opened.size, session.totals.how)
