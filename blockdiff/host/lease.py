"""Open files on which another process has a lease, such as a file server for its client.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
import time

from blockdiff.shared import locks
from blockdiff.shared.errors import SourceError, printable

#: How long the other process may take to release the lease, in seconds: by default, the kernel ends it after 45.
TIMEOUT_S = 60.0
_POLL_S = 0.05


def open_for_reading(path: bytes) -> int:
    """Return a descriptor of what is at `path`, without waiting for the other end of a pipe.

    If there is a lease on the file, our attempt to open it makes the kernel ask the holder to release the lease, and we
    wait for that. Raises `SourceError`, which names the holder, if this takes more than `TIMEOUT_S` seconds, and
    `OSError` if the file cannot be opened.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise SourceError(
                    "cannot open {}: {} has a lease on it and did not release it for {:g} s".format(
                        path.decode("utf-8", "replace"), _holder(os.stat(path).st_ino), TIMEOUT_S
                    ),
                    "run again when that program has closed it",
                ) from error
        time.sleep(_POLL_S)


def _holder(inode: int) -> str:
    """Return who has a lease on the file, for a message."""
    for process in locks.holders(inode, "LEASE", "DELEG"):
        try:
            with open("/proc/{}/comm".format(process), encoding="utf-8", errors="replace") as name:
                return "{} (process {})".format(printable(name.read().strip(), 100), process)
        except OSError:
            break  # it has ended, or cannot be seen from here
    return "another process"
