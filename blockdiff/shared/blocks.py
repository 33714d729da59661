"""Blocks and their digests: the arithmetic and the algorithms, in one place for both sides.

Shipped to the host: standard library only, Python 3.6 or newer; `xxhash` is used if it is installed.
"""

import hashlib
from typing import Callable, Dict, List, NamedTuple, Optional

from blockdiff.shared.errors import UsageError

try:
    import xxhash
except ImportError:  # the one optional import of the shipped modules
    xxhash = None  # type: ignore[assignment]

#: Smallest and largest block size in bytes. The largest is the longest data record of a version 2 delta.
MIN_BLOCK_SIZE = 1
MAX_BLOCK_SIZE = 4 << 20

#: A block is compared with these zeros piece by piece.
_ZEROS = bytes(64 << 10)

#: An image has at most this many bytes (8 EiB - 1: the largest `off_t`).
MAX_IMAGE_SIZE = (1 << 63) - 1


def check_block_size(block_size: int) -> None:
    """Raise `UsageError` for a block size, in bytes, that is out of range."""
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise UsageError(
            "the block size {} is not between {} and {} bytes".format(block_size, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
        )


class Digest(NamedTuple):
    """A digest algorithm: its `name` (also the suffix of digest tables), `size` in bytes, and `new(data).digest()`."""

    name: str
    size: int
    new: "Callable[[memoryview], hashlib._Hash]"


def _md5(data: memoryview) -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)  # type: ignore[call-arg,unused-ignore]


def _md5_function() -> "Callable[[memoryview], hashlib._Hash]":
    """Return an MD5 that also works on hosts in FIPS mode, if Python (3.9 or newer) knows `usedforsecurity`."""
    try:
        _md5(memoryview(b""))
    except TypeError:
        return hashlib.md5
    return _md5


def _blake2b(data: memoryview) -> "hashlib._Hash":
    return hashlib.blake2b(data, digest_size=32)  # type: ignore[return-value,unused-ignore]


def _xxh3(data: memoryview) -> "hashlib._Hash":
    return xxhash.xxh3_128(data)  # type: ignore[return-value,unused-ignore]


def _available() -> Dict[str, Digest]:
    digests = [
        Digest("sha256", 32, hashlib.sha256),
        Digest("blake2b", 32, _blake2b),
        Digest("md5", 16, _md5_function()),
    ]
    if xxhash is not None and hasattr(xxhash, "xxh3_128"):
        digests.append(Digest("xxh3", 16, _xxh3))
    return {digest.name: digest for digest in digests}


#: The algorithms that this Python has, by name. xxh3 is XXH3-128 in its canonical (big-endian) form.
AVAILABLE = _available()

#: All algorithms, by name, with the size of their digests in bytes.
DIGEST_SIZES = {"sha256": 32, "blake2b": 32, "xxh3": 16, "md5": 16}


def digest_named(name: str) -> Digest:
    """Return the algorithm called `name`; raise `UsageError` if this Python does not have it."""
    digest = AVAILABLE.get(name)
    if digest is None:
        others = ", ".join(sorted(AVAILABLE))
        raise UsageError(
            "python on this machine cannot compute {} digests".format(name),
            "choose another with --digest ({}), or install python3-xxhash there".format(others),
        )
    return digest


def block_count(image_size: int, block_size: int) -> int:
    """Return how many blocks of `block_size` bytes an image of `image_size` bytes has; the last may be shorter."""
    return -(-image_size // block_size)


def shown_size(size: int) -> str:
    """Return a number of bytes as text for people: ``20 MiB``, ``1.5 GiB``, in powers of 1024 with one decimal.

    A size below 1 KiB becomes ``1 byte`` or ``512 bytes``.
    """
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            shown = "{:.1f}".format(size / unit)
            return "{} {}".format(shown[:-2] if shown.endswith(".0") else shown, name)
    return "1 byte" if size == 1 else "{} bytes".format(size)


def _is_zero(view: memoryview, start: int, stop: int) -> bool:
    """Return whether all bytes from `start` to `stop` are zero.

    Three bytes are checked first: that is enough for nearly all blocks that are not zero. Then copies are compared,
    which is fast; Python compares a view with bytes element by element.
    """
    if view[start] or view[(start + stop) >> 1] or view[stop - 1]:
        return False
    for i in range(start, stop, len(_ZEROS)):
        piece = view[i : min(i + len(_ZEROS), stop)].tobytes()
        if piece != (_ZEROS if len(piece) == len(_ZEROS) else bytes(len(piece))):
            return False
    return True


class Hasher:
    """Computes the digests of runs of blocks of one size; zero blocks are recognised, not hashed.

    A zero block is found by comparing it with a constant, at the speed of `memcmp`, several times faster than any
    digest. Instances are immutable, and several threads may use one at the same time.
    """

    def __init__(self, digest: Digest, block_size: int) -> None:
        self.digest = digest
        self.block_size = block_size
        self._zeros = bytes(block_size)
        self.zero_digest = digest.new(memoryview(self._zeros)).digest()

    def zero_digests(self, length: int) -> bytes:
        """Return the digests of `length` zero bytes, cut into blocks."""
        whole, tail = divmod(length, self.block_size)
        joined = self.zero_digest * whole
        if tail:
            joined += self.digest.new(memoryview(self._zeros)[:tail]).digest()
        return joined

    def zero_flags(self, view: memoryview) -> List[bool]:
        """Return for each block of `view` whether all its bytes are zero."""
        size, length = self.block_size, len(view)
        return [_is_zero(view, start, min(start + size, length)) for start in range(0, length, size)]

    def digests(self, view: memoryview, flags: Optional[List[bool]] = None) -> List[bytes]:
        """Return the digest of each block of `view`; blocks that `flags` marks as zero are not read again."""
        size, new, zero = self.block_size, self.digest.new, self.zero_digest
        whole = len(view) - len(view) % size
        if flags is None:
            found = [new(view[i : i + size]).digest() for i in range(0, whole, size)]
        else:
            found = [
                zero if is_zero else new(view[i : i + size]).digest()
                for i, is_zero in zip(range(0, whole, size), flags)
            ]
        if whole < len(view):
            found.append(new(view[whole:]).digest())
        return found

    def run_digests(self, length: int, data: Optional[memoryview]) -> bytes:
        """Return the joined digests of a run of blocks: of `data`, or of `length` zero bytes if `data` is None."""
        return self.zero_digests(length) if data is None else b"".join(self.digests(data))
