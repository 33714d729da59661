"""Buffers that the server can look into, if it is on the same machine: what they hold goes through no pipe.

Shipped to the host: standard library only, Python 3.6 or newer.

The server makes the memory (`blockdiff.transport.sharedmemory`) and hands its descriptor down. A worker fills a
buffer, the main thread tells the server what is where, and a buffer is used again only when the server has taken
everything out.
"""

import mmap
import os
import threading
from collections import deque
from typing import Deque, Dict, Tuple

from blockdiff.shared import pipeline
from blockdiff.shared.errors import ConnectionLost
from blockdiff.shared.wire import STALL_S

#: The name of the memory, which distinguishes it from any other file of a descriptor.
NAME = "blockdiff"

#: Shorter runs go through the pipe, in bytes: to look after them would cost more.
MIN_RUN = 16 << 10

#: Buffers that the server may still have to copy.
_BEHIND = 4


def memory_size(buffer_size: int) -> int:
    """Return the bytes that a scan with such buffers needs: for its threads, and for what the server has to copy."""
    return (pipeline.worker_count() + 4 + _BEHIND) * _stride(buffer_size)


def _stride(buffer_size: int) -> int:
    return buffer_size + -buffer_size % mmap.PAGESIZE


class SharedBuffers(pipeline.BufferPool):
    """A pool in the memory of the descriptor `fd`, with buffers of `size` bytes.

    Raises `OSError` or `ValueError` if the descriptor is not that memory: a command such as sudo may have closed it.
    Main thread and workers use it, the reader thread calls `taken_out`.
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
        """Return where in the memory a buffer begins; a message to the server must then say that a run is there."""
        self._told += 1
        return self._places[id(buffer)]

    def taken_out(self) -> None:
        """The server took out one more of the runs that were announced to it."""
        with self._changed:
            self._taken += 1
            self._changed.notify()

    def get(self) -> memoryview:
        """Return a buffer; there is always one, because `give_back` waits."""
        return self._free.pop()

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back; waits while the server has too many to copy. Raises `ConnectionLost` like `finish`."""
        self._lent.append((self._told, buffer))
        with self._changed:
            while self._lent and (self._lent[0][0] <= self._taken or len(self._lent) > _BEHIND):
                self._wait(self._lent[0][0])
                self._free.append(self._lent.popleft()[1])

    def finish(self) -> None:
        """Wait until the server has taken out everything that was announced to it.

        Raises `ConnectionLost` if it takes nothing for `wire.STALL_S`, like a write that gets nowhere.
        """
        with self._changed:
            self._wait(self._told)

    def _wait(self, place: int) -> None:
        while self._taken < place:
            before = self._taken
            self._changed.wait(STALL_S)
            if self._taken == before:
                raise ConnectionLost("the server read nothing for {:g} s".format(STALL_S), silent=True)
