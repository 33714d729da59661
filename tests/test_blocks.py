"""Block arithmetic, digests, and how zero blocks are recognised."""

import hashlib
import os
import random
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from blockdiff.shared import blocks
from blockdiff.shared.blocks import Hasher, block_count, digest_named, shown_size
from blockdiff.shared.errors import UsageError

DIRECT: dict[str, Callable[[bytes], bytes]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=32).digest(),
    "xxh3": lambda data: xxhash.xxh3_128_digest(data),
    "md5": lambda data: hashlib.md5(data).digest(),
}
NAMES = pytest.mark.parametrize("name", sorted(DIRECT))


def test_the_tests_know_every_digest() -> None:
    assert set(DIRECT) == set(blocks.AVAILABLE) == set(blocks.DIGEST_SIZES)


@pytest.mark.parametrize(
    ("image_size", "block_size", "count"),
    [(0, 4096, 0), (1, 4096, 1), (4096, 4096, 1), (4097, 4096, 2), ((1 << 63) - 1, 1, (1 << 63) - 1)],
)
def test_block_count(image_size: int, block_size: int, count: int) -> None:
    assert block_count(image_size, block_size) == count


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1024, "1 KiB"), (100_000, "97.7 KiB")),
        *((20 << 20, "20 MiB"), (3 << 29, "1.5 GiB"), ((1 << 40) + (1 << 32), "1 TiB"), (5000 << 40, "5000 TiB")),
    ],
)
def test_a_size_is_shown_in_powers_of_1024(size: int, shown: str) -> None:
    assert shown_size(size) == shown


@NAMES
def test_digests_are_what_the_libraries_say(name: str) -> None:
    digest = digest_named(name)
    assert (digest.name, digest.size) == (name, blocks.DIGEST_SIZES[name])
    for data in (b"", b"a", bytes(5000), os.urandom(100_000)):
        assert digest.new(memoryview(data)).digest() == DIRECT[name](data)
        assert len(DIRECT[name](data)) == digest.size


@NAMES
@given(st.integers(1, 70), st.integers(0, 300), st.integers(0, 1 << 32), st.booleans())
def test_each_block_has_its_digest_and_the_tail_that_of_what_it_has(
    name: str, block_size: int, length: int, seed: int, flagged: bool
) -> None:
    """Whether or not zero blocks were marked before."""
    noise = random.Random(seed)
    data = bytearray(noise.choice([b"\0", b"\0", b"x"])[0] for _ in range(length))
    for start in range(0, length, block_size):
        if noise.random() < 0.5:
            stop = min(start + block_size, length)
            data[start:stop] = bytes(stop - start)
    hasher = Hasher(digest_named(name), block_size)
    flags = hasher.zero_flags(memoryview(data))
    parts = [bytes(data[i : i + block_size]) for i in range(0, length, block_size)]
    assert flags == [not part.strip(b"\0") for part in parts]
    found = hasher.digests(memoryview(data), flags if flagged else None)
    assert found == [DIRECT[name](part) for part in parts]


@NAMES
@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 250, 300])
def test_zeros_have_the_digests_of_zero_blocks(name: str, length: int) -> None:
    hasher = Hasher(digest_named(name), 100)
    expected = b"".join(DIRECT[name](bytes(min(100, length - i))) for i in range(0, length, 100))
    assert hasher.zero_digests(length) == expected
    assert hasher.zero_digest == DIRECT[name](bytes(100))


@pytest.mark.parametrize("place", [0, 1, 4094, 4095])
def test_a_block_of_zeros_but_for_one_byte_is_not_zero(place: int) -> None:
    hasher = Hasher(digest_named("md5"), 4096)
    data = bytearray(3 * 4096 + 5)
    data[4096 + place] = 1
    assert hasher.zero_flags(memoryview(data)) == [True, False, True, True]
    data[-1] = 1
    assert hasher.zero_flags(memoryview(data)) == [True, False, True, False]


def test_what_lies_behind_the_length_in_a_buffer_does_not_count() -> None:
    hasher = Hasher(digest_named("md5"), 10)
    buffer = bytearray(25) + b"old bytes"
    assert hasher.zero_flags(memoryview(buffer)[:25]) == [True, True, True]
    assert hasher.zero_flags(memoryview(b"")) == []


def test_a_digest_that_this_python_lacks_is_refused_with_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: digest for name, digest in blocks.AVAILABLE.items() if name != "xxh3"}
    monkeypatch.setattr(blocks, "AVAILABLE", without)
    with pytest.raises(UsageError, match="cannot compute xxh3 digests") as caught:
        digest_named("xxh3")
    assert caught.value.hint is not None
    assert "blake2b, md5, sha256" in caught.value.hint
    assert "python3-xxhash" in caught.value.hint


def test_xxh3_is_there_only_with_a_library_that_has_128_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "xxhash", None)
    assert "xxh3" not in blocks._available()
    monkeypatch.setattr(blocks, "xxhash", object())
    assert "xxh3" not in blocks._available()


def test_md5_works_where_the_python_cannot_be_told_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Python 3.9."""

    def old_md5(data: memoryview) -> "hashlib._Hash":
        raise TypeError("'usedforsecurity' is an invalid keyword argument")

    assert blocks._md5_function() is blocks._md5
    monkeypatch.setattr(blocks, "_md5", old_md5)
    assert blocks._md5_function()(memoryview(b"x")).digest() == DIRECT["md5"](b"x")
