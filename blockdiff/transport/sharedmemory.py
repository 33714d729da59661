"""The memory into which an agent on this machine writes its data: the server's side of `host.sharedbuffers`."""

import os

from blockdiff.host import sharedbuffers
from blockdiff.shared.errors import ProtocolError
from blockdiff.shared.runs import batch_size


class SharedMemory:
    """Memory with the descriptor `fd`, which the agent's process inherits; `close` releases it.

    It is read like a file, never mapped: whatever the other side does to it, a read can only fail or return bytes.
    Raises `OSError` if the system does not provide such memory.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create(sharedbuffers.NAME)
        self._size = 0

    def close(self) -> None:
        """Release the memory."""
        os.close(self.fd)

    def prepare(self, block_size: int) -> bool:
        """Make room for a scan with this block size; return whether that worked."""
        self._size = sharedbuffers.memory_size(batch_size(block_size))
        try:
            os.ftruncate(self.fd, self._size)
        except OSError:  # a limit on the size of files
            return False
        return True

    def read_into(self, room: memoryview, place: int) -> None:
        """Fill `room` with the bytes from `place` on; raises `ProtocolError` if the memory does not have them."""
        if place + len(room) > self._size or os.preadv(self.fd, [room], place) < len(room):
            raise ProtocolError(f"points to {len(room)} bytes at {place} of {self._size} that are shared")
