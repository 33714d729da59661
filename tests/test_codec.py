"""Compressed files: members that stand alone and tell their sizes, and whatever else gzip and zstd may be."""

import gzip
import io
import random
import struct
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import zstandard

from blockdiff.format import codec, lzop
from blockdiff.shared.errors import DamagedError, ProcessError, StorageError, UsageError
from tests import conftest

NOISE = random.Random(1)
#: Members of many kinds: short, zeros, noise, text, larger than a chunk.
PARTS = [b"a", bytes(3 << 20), NOISE.randbytes(100_000), b"some text\n" * 200_000, NOISE.randbytes(3 << 20)]
CONTENT = b"".join(PARTS)
PROGRAMS = {"gzip": ["gzip", "-dc"], "zstd": ["zstd", "-dcq"]}
BOTH = pytest.mark.parametrize("name", ["gzip", "zstd"])


def members(name: str, level: int | None = None, parts: list[bytes] = PARTS) -> list[bytes]:
    compress = codec.compressor(name, level)
    return [compress(part) for part in parts]


def content(data: bytes, name: str | None = None) -> bytes:
    return b"".join(codec.decompressed(io.BytesIO(data), "the delta", name))


def program(arguments: list[str], data: bytes) -> bytes:
    conftest.require_program(arguments[0])
    return subprocess.run(arguments, input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout


ALL_LEVELS = [("gzip", level) for level in range(1, 10)] + [("zstd", level) for level in (1, 3, 9, 19)]


@pytest.mark.parametrize(("name", "level"), [*ALL_LEVELS, ("none", None)])
def test_what_was_compressed_comes_back_at_every_level(name: str, level: int | None) -> None:
    data = b"".join(members(name, level))
    assert content(data, name) == CONTENT
    assert name == "none" or len(data) < len(CONTENT) * 0.5


@pytest.mark.parametrize(("name", "level"), [("gzip", 1), ("gzip", 2), ("gzip", 6), ("zstd", 3)])
def test_the_ordinary_programs_read_it(name: str, level: int) -> None:
    assert program(PROGRAMS[name], b"".join(members(name, level))) == CONTENT


@pytest.mark.parametrize("length", [32 << 10, 0xFFFF, 0x10000, 2 * 0xFFFF, (1 << 20) + 17])
def test_noise_is_stored_as_it_is(length: int) -> None:
    noise = NOISE.randbytes(length)
    member = codec.compressor("gzip")(memoryview(noise))
    assert noise[:60_000] in member
    assert len(member) < length + length // 5000 + 50
    assert gzip.decompress(member) == noise
    assert content(member) == noise


def test_noise_in_some_places_does_not_stop_the_compression_of_others() -> None:
    data = NOISE.randbytes(300_000) + bytes(300_000)
    assert len(codec.compressor("gzip")(data)) < 310_000


@BOTH
def test_each_member_stands_alone_and_tells_its_size(name: str) -> None:
    for member, part in zip(members(name), PARTS):
        assert content(member, name) == part
        if name == "gzip":
            assert struct.unpack("<I", member[16:20]) == (len(member),)
            assert gzip.decompress(member) == part
        else:
            assert struct.unpack("<I", member[8:12]) == (len(member) - 12,)
            frame = zstandard.get_frame_parameters(member[12:])
            assert (frame.content_size, frame.has_checksum) == (len(part), True)


@BOTH
def test_members_are_decompressed_by_themselves_and_come_one_by_one_in_order(name: str) -> None:
    parts = [bytes([i % 256]) * (i + 1) for i in range(1000)]
    pieces = codec.decompressed(io.BytesIO(b"".join(members(name, None, parts))), "the delta", name)
    assert list(pieces) == parts


@BOTH
def test_files_of_the_ordinary_programs_are_read(name: str) -> None:
    """One member without a size, or several of them, or mixed with ours."""
    one = program([name, "-c"], CONTENT)
    assert content(one, name) == CONTENT
    assert content(one * 3, name) == CONTENT * 3
    ours = b"".join(members(name))
    assert content(one + ours + one, name) == CONTENT * 3
    assert content(ours + one + ours, name) == CONTENT * 3


def test_gzip_files_with_names_comments_and_other_extra_fields_are_read() -> None:
    def member(flags: int, head: bytes) -> bytes:
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = deflate.compress(b"body") + deflate.flush()
        trailer = struct.pack("<II", zlib.crc32(b"body"), 4)
        return b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + head + body + trailer

    data = member(8, b"name\0") + member(16, b"comment\0") + member(4, b"\4\0XY\0\0") + member(4, b"\x08\0ZZ\4\0abcd")
    assert content(data, "gzip") == b"body" * 4


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (members("gzip")[2], "gzip"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (members("zstd")[2], "zstd"),
        (zstandard.compress(b"x"), "zstd"),
        (b"\4\0\0\0plain", "none"),
        (b"", "none"),
        (b"\x1f\x8b", "none"),
    ],
)
def test_the_compression_is_recognised_by_its_first_bytes(data: bytes, name: str) -> None:
    assert content(data, None) == content(data, name)


def test_lzop_files_are_read_through_lzop() -> None:
    data = program(["lzop", "-c"], CONTENT)
    assert content(data, "lzop") == content(data, None) == CONTENT
    with pytest.raises(DamagedError, match="the delta is damaged: lzop exited with status"):
        content(data[: len(data) // 2], "lzop")


def test_a_file_is_read_no_more_once_lzop_has_given_it_up() -> None:
    """Whoever gave it to us closes it then."""
    conftest.require_program("lzop")
    given, ended = threading.Event(), []

    def read(count: int) -> bytes:
        if given.is_set():
            time.sleep(0.2)  # as a slow disk
            ended.append(count)
        given.set()
        return bytes(9000)  # more than a buffer, less than a pipe: the next is read before lzop is seen to be gone

    with pytest.raises(ProcessError, match="lzop exited with status"):
        list(lzop.pieces(read))
    before = len(ended)
    time.sleep(0.5)
    assert len(ended) == before


@BOTH
@pytest.mark.parametrize("garbage", [b"\0", b"garbage", bytes(100), b"\x1f", b"\x28\xb5", b"\x50\x2a\x4d\x18\4\0"])
def test_what_follows_the_last_member_and_is_none_is_refused(name: str, garbage: bytes) -> None:
    for sound in (members(name)[2], program([name, "-c"], b"data")):
        with pytest.raises(DamagedError, match=r"what follows a .* is not one|is cut off"):
            content(sound + garbage, name)


def sound_files(name: str) -> list[bytes]:
    parts = [NOISE.randbytes(40), bytes(500), b"text " * 20]
    single = program([name, "-c"], b"".join(parts))
    return [b"".join(members(name, None, parts)), single, members(name, None, parts)[0] + single]


@BOTH
def test_a_file_that_is_cut_is_refused_but_between_members(name: str) -> None:
    for data in sound_files(name):
        whole = content(data, name)
        for length in range(1, len(data)):
            try:
                found = content(data[:length], name)
            except DamagedError as error:
                assert "the delta is cut off in the middle of a" in error.message
                continue
            # nothing but whole members: what a delta's own end mark is for
            assert whole.startswith(found)
            assert content(data[length:], name) == whole[len(found) :]


@BOTH
def test_a_flipped_bit_never_gives_other_content(name: str) -> None:
    """Either it is refused, or it is one of the few bits that mean nothing, such as the time in a gzip header."""
    for data in sound_files(name):
        whole, harmless = content(data, name), 0
        for i in range(len(data) * 8):
            flipped = bytearray(data)
            flipped[i // 8] ^= 1 << i % 8
            try:
                assert content(bytes(flipped), name) == whole
                harmless += 1
            except DamagedError as error:
                assert error.message.startswith("the delta is ")
        assert harmless < 300  # some 90 in the head of each gzip member


@BOTH
def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    member = bytearray(members(name)[2])
    place = 16 if name == "gzip" else 8
    for size in (0, 19, 2**32 - 1, len(member) - 13, len(member) + 1):
        member[place : place + 4] = size.to_bytes(4, "little")
        with pytest.raises(DamagedError, match="the delta is "):
            content(bytes(member) + bytes(50), name)


class Endless:
    """A file that goes on with the same bytes for `count` bytes."""

    def __init__(self, first: bytes, then: bytes, count: int) -> None:
        self._data = first
        self._then = then
        self._left = count

    def read(self, count: int) -> bytes:
        while len(self._data) < count and self._left > 0:
            self._data += self._then
            self._left -= len(self._then)
        data, self._data = self._data[:count], self._data[count:]
        return data


def test_a_gzip_bomb_comes_in_bounded_pieces() -> None:
    """Two gibibytes of zeros in one member, made here from two megabytes of deflated ones."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = gzip.compress(b"")[:10]
    part = deflate.compress(bytes(64 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    _bounded(codec.decompressed(Endless(head + part, part, 31 * len(part)), "the bomb", "gzip"), 2 << 30)


def test_a_zstd_bomb_comes_in_bounded_pieces() -> None:
    """Two gibibytes of zeros in one frame of blocks of one repeated byte."""
    block = (128 << 10 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    head = b"\x28\xb5\x2f\xfd" + bytes([0, 7 << 3])  # no content size, a window of 128 KiB
    source = Endless(head, block * 64, (2 << 30 >> 17) * len(block))
    _bounded(codec.decompressed(source, "the bomb", "zstd"), 2 << 30)


def _bounded(pieces: Iterator[bytes], total: int) -> None:
    """All of it comes, zeros in pieces of at most `MAX_MEMBER`, and then the end that is missing is noticed."""
    seen = 0
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="the bomb is cut off in the middle of a"):
            for piece in pieces:
                assert len(piece) <= codec.MAX_MEMBER
                seen += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == total
    assert peak < 96 << 20


@BOTH
def test_a_member_that_holds_more_than_a_member_may_is_refused(name: str) -> None:
    """A member that tells its size is decompressed at once, up to a limit."""
    with pytest.raises(DamagedError, match=r"does not end where it says|impossible size"):
        content(codec.compressor(name)(bytes(codec.MAX_MEMBER + 1)), name)
    assert content(codec.compressor(name)(bytes(codec.MAX_MEMBER)), name) == bytes(codec.MAX_MEMBER)


def test_an_empty_zstd_frame_of_ours_is_refused() -> None:
    """The library gives nothing for it without a look at its content: a flipped bit could empty a frame unseen."""
    with pytest.raises(DamagedError, match="a zstd frame has an impossible size"):
        content(codec.compressor("zstd")(b""), "zstd")
    assert content(zstandard.compress(b""), "zstd") == b""


def test_a_zstd_frame_that_wants_a_huge_window_is_refused() -> None:
    head = b"\x28\xb5\x2f\xfd" + bytes([0, 31 << 3])  # a window of 2 TiB
    with pytest.raises(DamagedError, match="the delta is damaged: "):
        content(head + bytes(1000), "zstd")


def test_damage_is_told_at_its_place_behind_all_that_is_sound() -> None:
    sound = members("gzip", None, [b"one", b"two"])
    pieces = codec.decompressed(io.BytesIO(b"".join(sound) + b"garbage"), "the delta", "gzip")
    assert [next(pieces), next(pieces)] == [b"one", b"two"]
    with pytest.raises(DamagedError):
        next(pieces)


@pytest.mark.parametrize(
    ("name", "level", "range_"),
    [("gzip", 0, "1 to 9"), ("gzip", 10, "1 to 9"), ("zstd", 0, "1 to 19"), ("zstd", 20, "1 to 19"), ("none", 1, "0")],
)
def test_a_level_that_is_none_is_refused(name: str, level: int, range_: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no level {level}") as caught:
        codec.compressor(name, level)
    assert range_ in (caught.value.hint or "")


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown compression bzip2") as caught:
        codec.compressor("bzip2")
    assert caught.value.hint == "choose one of gzip, zstd, none"


@pytest.mark.parametrize("name", ["gzip", "zstd", "none", "lzop"])
def test_a_file_that_cannot_be_read_is_told_with_the_reason(name: str) -> None:
    if name == "lzop":
        conftest.require_program("lzop")

    class Failing:
        def read(self, count: int) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match="cannot read the delta: Input/output error"):
        list(codec.decompressed(Failing(), "the delta", name))
