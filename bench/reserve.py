"""Memory that is at hand: what a virtual machine does not use goes back to its host, and is slow to come again."""

import mmap
from types import TracebackType

_HUGE_PAGE = 2 << 20


class Reserve:
    """Holds `size` bytes of memory from `take` to `lend`.

    Where the host takes back what is free (balloon with free page reporting), the first touch of a page costs 2 to 4 s
    for each GiB, or nearly nothing, depending on how long it was free: more than what is measured here. So the pages
    are in use all the time, by the reserve or by the tool that is measured. A context manager.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory: mmap.mmap | None = None

    def __enter__(self) -> "Reserve":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.lend()

    def take(self) -> None:
        """Take the memory and touch each page."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
            for place in range(0, self._size, mmap.PAGESIZE):
                self._memory[place] = 1

    def lend(self) -> None:
        """Let go of the memory for whoever needs it next."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
