"""Checksums of whole files, as manifests know them: the name of an algorithm, a colon, and hexadecimal digits.

A digest table has a SHA-256: everything that is restored is proven by it. What a delta holds is proven block by block,
by the digests in that table, so its own checksum only says whether the file is still as it was written: XXH3, which
costs a twentieth of SHA-256. (A seventh of a full run went into that.)
"""

import hashlib
from collections.abc import Callable
from typing import Protocol

import xxhash


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


_NEW: dict[str, Callable[[], _Hash]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}
_HEX_DIGITS = {"sha256": 64, "xxh3": 32}

#: Algorithms of new deltas, and of everything else.
OF_DELTAS, OF_OTHERS = "xxh3", "sha256"


class Checksum:
    """The checksum of what it is given, piece by piece, by one of the algorithms `sha256` and `xxh3` (XXH3-128)."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._hash = _NEW[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next piece."""
        self._hash.update(data)

    def text(self) -> str:
        """Return what a manifest says of everything so far."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def of_sha256(digits: str) -> str:
    """Return what a manifest says of a file whose SHA-256 is known, in hexadecimal."""
    return f"sha256:{digits}"


def algorithm(text: str) -> str | None:
    """Return the algorithm of what a manifest says; None if it says nothing that makes sense."""
    name, _colon, digits = text.partition(":")
    fits = len(digits) == _HEX_DIGITS.get(name) and not digits.strip("0123456789abcdef")
    return name if fits else None
