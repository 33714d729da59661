"""Checksums of whole files, as manifests have them: the name of an algorithm, a colon, and hexadecimal digits.

A digest table has a SHA-256, because it proves everything that is restored. The blocks in a delta are proven one by
one, by the digests in that table. So the checksum of a delta only says whether the file is still as it was written: it
is XXH3, which takes a twentieth of the time of SHA-256. (SHA-256 of the delta took a seventh of a full run.)
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
    """The checksum of data that arrives piece by piece. `algorithm` is `sha256` or `xxh3` (XXH3-128)."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._hash = _NEW[algorithm]()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next piece."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the checksum of all pieces so far, as a manifest has it."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def of_sha256(digits: str) -> str:
    """Return the checksum, as a manifest has it, of a file with this SHA-256 (hexadecimal digits)."""
    return f"sha256:{digits}"


def algorithm(text: str) -> str | None:
    """Return the algorithm of a checksum in a manifest; None if the checksum is not valid."""
    name, _colon, digits = text.partition(":")
    fits = len(digits) == _HEX_DIGITS.get(name) and not digits.strip("0123456789abcdef")
    return name if fits else None
