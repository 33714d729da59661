"""The previous generation's digests on their way into the agent; they arrive no faster than it uses them.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import struct
import threading

from blockdiff.dump import OldDigests
from blockdiff.shared import wire
from blockdiff.shared.errors import ProtocolError

START = struct.Struct("<Q")


class TableFeed(OldDigests):
    """A window of limited size into the table of `block_count` digests; it only moves forward.

    The reader thread calls `feed`, the scanning thread `read` and `skip`. `read` asks the server for more as it goes.
    """

    def __init__(self, link: wire.Link, digest_size: int, block_count: int) -> None:
        self._link = link
        self._digest_size = digest_size
        self._total = block_count * digest_size
        self._buffer = bytearray()
        self._arrived = threading.Condition()
        self._fed = 0  # where the buffer ends; all positions are in bytes of the table's digests
        self._taken = 0
        self._granted = 0
        self._start = 0

    def feed(self, offset: int, data: bytes) -> None:
        """Append digests that arrived, from `offset` on; raises `ProtocolError` if they were not asked for."""
        with self._arrived:
            if offset not in (self._fed, max(self._fed, self._start)):
                raise ProtocolError("the server sent another part of the digest table than was asked for")
            if offset + len(data) > min(self._granted, self._total):
                raise ProtocolError("the server sent more of the digest table than was asked for")
            if offset != self._fed:
                self._buffer.clear()
            self._buffer += data
            self._fed = offset + len(data)
            self._arrived.notify()

    def read(self, count: int) -> bytes:
        """Return the digests of the next `count` blocks, or as many as the table still has."""
        wanted = min(count * self._digest_size, self._total - self._taken)
        if not wanted:  # digests that were skipped need not arrive, so there is nothing to wait for
            return b""
        if self._taken + wanted > self._granted - wire.TABLE_WINDOW // 2 and self._granted < self._total:
            with self._arrived:
                self._granted, self._start = self._taken + wire.TABLE_WINDOW, self._taken
            self._link.send(wire.WANT, START.pack(self._start), offset=self._granted)
        stop = self._taken + wanted
        with self._arrived:
            while self._fed < stop:
                self._arrived.wait()
            begin = len(self._buffer) - (self._fed - self._taken)
            digests = bytes(self._buffer[begin : begin + wanted])
            del self._buffer[: begin + wanted]
        self._taken = stop
        return digests

    def skip(self, count: int) -> None:
        """Skip the digests of the next `count` blocks; the server need not send them."""
        self._taken = min(self._taken + count * self._digest_size, self._total)
