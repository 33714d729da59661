"""Send the previous generation's digest table to the agent, no faster than the agent asks for it."""

import threading

from blockdiff.format.digesttable import TableReader
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost
from blockdiff.shared.process import STOP_TIMEOUT_S

#: Bytes of digests that are sent in one frame.
_FRAME_BYTES = 64 << 10


class TableSender:
    """A thread that sends the previous digest table as far as the agent asks for it."""

    def __init__(self, link: wire.Link, table: TableReader) -> None:
        self._link = link
        self._table = table
        self._start = 0
        self._wanted = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="table", daemon=True)
        self.failure: BlockdiffError | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. It is not stuck in a write: the agent still receives, or the connection is closed.

        If a signal arrived before the thread was started, or during that, it is not waited for.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def want(self, start: int, limit: int) -> None:
        """Continue at byte `start` of the table's digests, unless it was sent already, and send up to byte `limit`."""
        with self._changed:
            self._start = max(self._start, start)
            self._wanted = max(self._wanted, limit)
            self._changed.notify()

    def _run(self) -> None:
        size, step = self._table.digest_size, _FRAME_BYTES // self._table.digest_size
        sent = 0
        try:
            while sent < self._table.count:
                with self._changed:
                    while not self._stopped and self._wanted // size <= max(sent, self._start // size):
                        self._changed.wait()
                    if self._stopped:
                        return
                    sent = max(sent, self._start // size)
                    count = min(step, self._wanted // size - sent, self._table.count - sent)
                if count > 0:
                    self._link.send(wire.TABLE, self._table.digests(sent, count), offset=sent * size)
                sent += count
        except ConnectionLost:
            pass  # the receiving thread notices this, too, and reports the cause
        except BlockdiffError as error:
            self.failure = error
