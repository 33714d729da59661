"""Check that no descriptor stays open."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def all_closed(timeout_s: float = 20.0) -> Iterator[None]:
    """Check that everything opened in the `with` statement is closed at its end, or soon after, by another thread."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + timeout_s
    while left := set(os.listdir("/proc/self/fd")) - before:
        assert time.monotonic() < deadline, f"still open: {left}"
        time.sleep(0.005)
