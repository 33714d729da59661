"""Buffers that the server can read directly, if it is on the same machine: their content needs no pipe.

Shipped to the host: standard library only, Python 3.6 or newer.

The server makes the memory (`blockdiff.transport.sharedmemory`), and the agent inherits its descriptor. A worker fills
a buffer; the main thread reports to the server where each run is; a buffer is used again only after the server has
copied all its runs out.
"""

import mmap
import os
import threading
from collections import deque
from typing import Deque, Dict, Tuple

from blockdiff.shared import pipeline
from blockdiff.shared.errors import ConnectionLost
from blockdiff.shared.wire import STALL_S

#: The name of the memory: it shows that a descriptor is this memory, and not another file.
NAME = "blockdiff"

#: Runs that are shorter, in bytes, are sent through the pipe: that costs less than the frames for shared memory.
MIN_RUN = 16 << 10

#: Buffers that the server may still have to copy.
_BEHIND = 4


def memory_size(buffer_size: int) -> int:
    """Return how many bytes a scan with such buffers needs: for its threads, and for runs that are to be copied."""
    return (pipeline.worker_count() + 4 + _BEHIND) * _stride(buffer_size)


def _stride(buffer_size: int) -> int:
    return buffer_size + -buffer_size % mmap.PAGESIZE


class SharedBuffers(pipeline.BufferPool):
    """A pool in the memory of the descriptor `fd`, with buffers of `size` bytes.

    Raises `OSError` or `ValueError` if the descriptor is not that memory: a command such as sudo may have closed it.
    The main thread and the workers use the pool; the reader thread calls `taken_out`.
    """

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(size)
        if not os.readlink("/proc/self/fd/{}".format(fd)).startswith("/memfd:{} ".format(NAME)):
            raise ValueError("descriptor {} is something else".format(fd))
        memory = memoryview(mmap.mmap(fd, memory_size(size)))
        places = range(0, len(memory), _stride(size))
        self._free = [memory[place : place + size] for place in places]
        self._places: Dict[int, int] = {id(view): place for view, place in zip(self._free, places)}
        self._lent: Deque[Tuple[int, memoryview]] = deque()
        self._changed = threading.Condition()
        self._told = self._taken = 0

    def lend(self, buffer: memoryview) -> int:
        """Return where in the memory a buffer begins; the caller must then report the run to the server (LENT)."""
        self._told += 1
        return self._places[id(buffer)]

    def taken_out(self) -> None:
        """Note that the server has copied out the next of the runs that were reported to it."""
        with self._changed:
            self._taken += 1
            self._changed.notify()

    def get(self) -> memoryview:
        """Return a buffer; there is always a free one, because `give_back` waits."""
        return self._free.pop()

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back; waits while the server has too many to copy. Raises `ConnectionLost`, like `finish`."""
        self._lent.append((self._told, buffer))
        with self._changed:
            while self._lent and (self._lent[0][0] <= self._taken or len(self._lent) > _BEHIND):
                self._wait(self._lent[0][0])
                self._free.append(self._lent.popleft()[1])

    def finish(self) -> None:
        """Wait until the server has copied out everything that was reported to it.

        Raises `ConnectionLost` if it copies nothing for `wire.STALL_S` seconds.
        """
        with self._changed:
            self._wait(self._told)

    def _wait(self, place: int) -> None:
        while self._taken < place:
            before = self._taken
            self._changed.wait(STALL_S)
            if self._taken == before:
                raise ConnectionLost("the server read nothing for {:g} s".format(STALL_S), silent=True)
