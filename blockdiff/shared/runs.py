"""Runs of blocks that changed, and the batches in which an image is examined: the parts of a scan that both ends use.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import NamedTuple, Optional

#: Bytes of a batch. Large enough that Python's work for each batch does not matter, and small enough that several
#: batches fit in the agent's 64 MiB.
BATCH_BYTES = 2 << 20
#: Blocks of a batch at most: if blocks are small, the lists of digests need more memory than the buffers.
BATCH_BLOCKS = 8192


class Run(NamedTuple):
    """Neighbouring blocks that changed: `length` bytes at `offset`; `data` is None if all of them are zero."""

    offset: int
    length: int
    data: Optional[memoryview]


def batch_size(block_size: int) -> int:
    """Return the size of a batch in bytes: whole blocks, at least one."""
    return whole_blocks(BATCH_BYTES, block_size)


def whole_blocks(limit: int, block_size: int) -> int:
    """Return how many bytes the blocks have that fit in `limit` bytes: at least one block, at most `BATCH_BLOCKS`."""
    return max(1, min(limit // block_size, BATCH_BLOCKS)) * block_size
