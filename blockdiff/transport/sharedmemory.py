"""The memory that an agent on this machine puts its data into, as the server sees it (`host.sharedbuffers`)."""

import os

from blockdiff.host import sharedbuffers
from blockdiff.shared.errors import ProtocolError
from blockdiff.shared.runs import batch_size


class SharedMemory:
    """Memory of the descriptor `fd`, which the agent's process is to inherit; `close` releases it.

    It is read like a file, never mapped: whatever the other side does to it, a read fails or returns bytes. Raises
    `OSError` if the system has none to give.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create(sharedbuffers.NAME)
        self._size = 0

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    def prepare(self, block_size: int) -> bool:
        """Make room for a scan with this block size; return whether there is."""
        self._size = sharedbuffers.memory_size(batch_size(block_size))
        try:
            os.ftruncate(self.fd, self._size)
        except OSError:  # a limit on the size of files
            return False
        return True

    def read_into(self, room: memoryview, place: int) -> None:
        """Copy what is at `place` into `room`; raises `ProtocolError` if there is no such place."""
        if place + len(room) > self._size or os.preadv(self.fd, [room], place) < len(room):
            raise ProtocolError(f"points to {len(room)} bytes at {place} of {self._size} that are shared")
