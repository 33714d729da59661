"""Extents of an image: the parts that must be read, those that are known to be zero, and those known to be unchanged.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import Iterable, Iterator, List, NamedTuple

#: States of an extent, and of a block: it must be read; all its bytes are zero; it did not change since the last run.
DATA = "data"
ZEROS = "zeros"
SAME = "same"


class Extent(NamedTuple):
    """The bytes from `start` to `end` of an image, all in one state."""

    start: int
    end: int
    state: str


def aligned(extents: Iterable[Extent], block_size: int, size: int) -> Iterator[Extent]:
    """Yield extents of whole blocks that cover an image of `size` bytes.

    `extents` are in ascending order; they may have gaps, and need not begin and end at blocks. A block is `ZEROS` or
    `SAME` only if one of them says so for the whole block; everything else is `DATA`.
    """
    position = 0
    for start, end, state in extents:
        first = start + -start % block_size
        last = size if end >= size else end - end % block_size
        if state == DATA or last <= max(first, position):
            continue
        if first > position:
            yield Extent(position, first, DATA)
        yield Extent(max(first, position), last, state)
        position = last
    if position < size:
        yield Extent(position, size, DATA)


def striped(extents: Iterable[Extent], length: int, index: int, count: int) -> Iterator[Extent]:
    """Yield the part of ascending extents that stream `index` of `count` examines; the other streams' parts are `SAME`.

    Each stream in turn gets `length` bytes of data. All zeros go to the first stream, because they cost nothing.
    """
    start, end = 0, 0  # of what this stream skips and was not yielded yet
    for extent in extents:
        while extent.start < extent.end:
            stop = extent.end
            if extent.state == DATA:
                stop = min(stop, extent.start - extent.start % length + length)
            owner = extent.start // length % count if extent.state == DATA else 0
            mine = Extent(extent.start, stop, extent.state)
            extent = Extent(stop, extent.end, extent.state)
            if owner == index and mine.state != SAME:
                if end > start:
                    yield Extent(start, end, SAME)
                yield mine
                start = stop
            end = stop
    if end > start:
        yield Extent(start, end, SAME)


class Audit:
    """Checks extents that are claimed to be `SAME` against the changes that a complete scan found."""

    def __init__(self, claimed: Iterable[Extent]) -> None:
        self._same: List[Extent] = [extent for extent in claimed if extent.state == SAME]
        self._next = 0

    def first_wrong(self, offset: int, end: int) -> int:
        """Return the first byte of the changed run from `offset` to `end` that was claimed to be `SAME`; -1: none.

        The runs must be passed in ascending order.
        """
        while self._next < len(self._same) and self._same[self._next].end <= offset:
            self._next += 1
        if self._next < len(self._same) and self._same[self._next].start < end:
            return max(offset, self._same[self._next].start)
        return -1
