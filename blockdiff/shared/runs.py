"""Runs of blocks that changed, and the batches in which an image is examined: what both ends know of a scan.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import NamedTuple, Optional

#: Bytes of a batch. Large enough that what Python does for each batch does not count, small enough that a handful of
#: them fit in the agent's 64 MiB.
BATCH_BYTES = 2 << 20
#: Blocks of a batch at most: small blocks make lists of digests, not buffers, the larger part.
BATCH_BLOCKS = 8192


class Run(NamedTuple):
    """Neighbouring blocks that changed: `length` bytes at `offset`; `data` is None if all of them are zero."""

    offset: int
    length: int
    data: Optional[memoryview]


def batch_size(block_size: int) -> int:
    """Return the size of a batch in bytes: whole blocks, one at least."""
    return whole_blocks(BATCH_BYTES, block_size)


def whole_blocks(limit: int, block_size: int) -> int:
    """Return the bytes of as many blocks as fit in `limit` bytes: one at least, at most `BATCH_BLOCKS`."""
    return max(1, min(limit // block_size, BATCH_BLOCKS)) * block_size
