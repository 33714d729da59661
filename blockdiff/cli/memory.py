"""What the C library does with memory that was freed."""

import ctypes

# of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Let the C library keep what is freed for what is allocated next, if it is glibc.

    Compressors return fresh memory. By default large pieces of it go back to the system each time, and come back at the
    cost of a page fault for every 4 KiB: a third of the time of a run. One arena for all threads keeps it together.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)
