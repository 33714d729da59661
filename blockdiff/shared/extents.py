"""Extents of an image: what must be read, what is known to be zero, what is known not to have changed.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import Iterable, Iterator, List, NamedTuple

#: States of an extent, and of a block: its bytes count, all of them are zero, it did not change since the last run.
DATA = "data"
ZEROS = "zeros"
SAME = "same"


class Extent(NamedTuple):
    """The bytes from `start` to `end` of an image, all of one state."""

    start: int
    end: int
    state: str


def aligned(extents: Iterable[Extent], block_size: int, size: int) -> Iterator[Extent]:
    """Yield extents of whole blocks that cover an image of `size` bytes, from ascending ones that need not.

    A block is zeros, or the same as before, only if all of it is said to be; everything else is data.
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
    """Yield the part of ascending extents that stream `index` of `count` examines; what others do is the same to it.

    Data goes to each in turn, `length` bytes at a time, and zeros, which cost nothing, all to the first.
    """
    start, end = 0, 0  # of what others do and was not yielded yet
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
    """Holds what a complete scan found against extents that somebody claims to be the same."""

    def __init__(self, claimed: Iterable[Extent]) -> None:
        self._same: List[Extent] = [extent for extent in claimed if extent.state == SAME]
        self._next = 0

    def first_wrong(self, offset: int, end: int) -> int:
        """Return the first byte of a changed run, from `offset` to `end`, that was claimed to be the same; -1: none.

        Runs must be given in ascending order.
        """
        while self._next < len(self._same) and self._same[self._next].end <= offset:
            self._next += 1
        if self._next < len(self._same) and self._same[self._next].start < end:
            return max(offset, self._same[self._next].start)
        return -1
