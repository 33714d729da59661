"""Memory that is at hand: what a virtual machine does not use goes back to its host, and is slow to come again."""

import mmap
from types import TracebackType

#: Every other stretch of this many bytes is lent: what is free never makes up a huge page (2 MiB).
_STRETCH = 256 << 10


class Reserve:
    """Keeps `size` bytes of memory for whoever is measured, between `lend` and the next `take`.

    Where the host takes back what is free (free page reporting), the first touch of a page costs 2 to 4 s for each GiB,
    or nearly nothing, depending on how long it was free: more than what is measured here. Linux reports free pages by
    the huge page. So twice as much is held, and only every other stretch is let go. A context manager.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)

    def __enter__(self) -> "Reserve":
        for place in range(0, len(self._memory), mmap.PAGESIZE):
            self._memory[place] = 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._memory.close()

    def take(self) -> None:
        """Take back what was lent."""
        for start in range(0, len(self._memory), 2 * _STRETCH):
            for place in range(start, start + _STRETCH, mmap.PAGESIZE):
                self._memory[place] = 1

    def lend(self) -> None:
        """Let go of `size` bytes for whoever needs memory next."""
        for start in range(0, len(self._memory), 2 * _STRETCH):
            self._memory.madvise(mmap.MADV_DONTNEED, start, _STRETCH)
