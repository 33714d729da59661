"""See that nothing stays open."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def all_closed(timeout_s: float = 20.0) -> Iterator[None]:
    """What is opened within must be closed at the end, or soon after: some threads close what they read to its end."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + timeout_s
    while left := set(os.listdir("/proc/self/fd")) - before:
        assert time.monotonic() < deadline, f"still open: {left}"
        time.sleep(0.005)
