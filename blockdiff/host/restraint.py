"""Limits the load that the agent puts on the host: it sends no faster than allowed, and other processes go first.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
import time
from typing import Optional

from blockdiff.shared import process
from blockdiff.shared.errors import ProcessError

#: Added to the niceness, and the level in the best-effort class of I/O priorities (7 is the lowest). A backup yields to
#: production, but it always gets some time: if it takes too long, its snapshot may overflow.
NICENESS = 10
IO_LEVEL = 7


class Throttle:
    """Limits the sender to `bytes_per_s` on average; None means no limit."""

    def __init__(self, bytes_per_s: Optional[int]) -> None:
        self._bytes_per_s = bytes_per_s
        self._due = time.monotonic()

    def spend(self, count: int) -> None:
        """Pause until `count` more bytes may be sent."""
        if self._bytes_per_s is None:
            return
        self._due = max(self._due, time.monotonic()) + count / self._bytes_per_s
        time.sleep(max(0.0, self._due - time.monotonic()))


def lower_priority() -> None:
    """Let all other processes go first at the CPU and the disk; without ionice(1) on the host, only at the CPU."""
    os.nice(NICENESS)
    try:
        process.run(["ionice", "-c", "2", "-n", str(IO_LEVEL), "-p", str(os.getpid())], timeout_s=10)
    except ProcessError:
        pass
