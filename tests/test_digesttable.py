"""The sparse form of a digest table: the same digests as in the plain form, and no file that is none."""

import errno
import hashlib
import io
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff.backup import Options
from blockdiff.format import digesttable
from blockdiff.format.digesttable import GROUP, TableReader, TableWriter, sparse_count
from blockdiff.shared.blocks import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, Hasher, digest_named
from blockdiff.shared.errors import DamagedError, StorageError
from tests import chains
from tests.protocol import GOLDEN

HASHER = Hasher(digest_named("xxh3"), 512)
SIZE = HASHER.digest.size
ZERO = HASHER.zero_digest
#: Runs of blocks: (number, whether they are zero).
RUNS = st.lists(st.tuples(st.integers(1, 3 * GROUP), st.booleans()), max_size=12)


def digests_of(runs: list[tuple[int, bool]]) -> bytes:
    parts, number = [], 0
    for count, is_zero in runs:
        parts.append(ZERO * count if is_zero else b"".join((number + i).to_bytes(SIZE, "big") for i in range(count)))
        number += count
    return b"".join(parts)


def written(digests: bytes, *cuts: int) -> bytes:
    """Return the sparse table of some digests, which are appended in pieces that end at `cuts`."""
    sink = io.BytesIO()
    writer = TableWriter(sink, HASHER, len(digests) // SIZE)
    ends = sorted(cut * SIZE for cut in cuts)
    for start, end in zip([0, *ends], [*ends, len(digests)], strict=True):
        writer.append(digests[start:end])
    writer.finish()
    assert writer.sha256() == hashlib.sha256(sink.getvalue()).hexdigest()
    return sink.getvalue()


def reader(content: bytes) -> TableReader:
    fd = os.memfd_create("table")
    os.write(fd, content)
    return TableReader(fd, "the table", SIZE)


def by_the_document(digests: bytes) -> bytes:
    """Return what docs/format.md says that the sparse table of these digests is."""
    groups = [digests[i : i + GROUP * SIZE] for i in range(0, len(digests), GROUP * SIZE)]
    is_stored = [group != ZERO * (len(group) // SIZE) for group in groups]
    bits = "".join("1" if stored else "0" for stored in is_stored)
    bitmap = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    kept = b"".join(group for group, stored in zip(groups, is_stored, strict=True) if stored)
    return b"\0\0\0\0BDt2" + struct.pack("<IQ", 512, len(digests) // SIZE) + ZERO + kept + bitmap


@given(runs=RUNS, data=st.data())
def test_it_is_what_the_document_says_and_gives_back_every_digest(
    runs: list[tuple[int, bool]], data: st.DataObject
) -> None:
    digests = digests_of(runs)
    count = len(digests) // SIZE
    places = st.integers(0, count)
    content = written(digests, *data.draw(st.lists(places, max_size=4)))
    assert content == by_the_document(digests)
    with reader(content) as table:
        assert (table.block_size, table.count) == (512, count)
        assert table.sha256() == hashlib.sha256(content).hexdigest()
        assert table.digests(0, count + 5) == digests
        first, number = data.draw(places), data.draw(st.integers(0, 2 * GROUP))
        assert table.digests(first, number) == digests[first * SIZE : (first + number) * SIZE]


EDGES = [
    [],
    [(1, True)],
    [(1, False)],
    [(GROUP, True)],
    [(GROUP, False)],
    [(8 * GROUP, True)],
    [(8 * GROUP + 1, False)],
]


@pytest.mark.parametrize("runs", EDGES, ids=str)
def test_edges(runs: list[tuple[int, bool]]) -> None:
    digests = digests_of(runs)
    content = written(digests)
    assert content == by_the_document(digests)
    with reader(content) as table:
        assert table.digests(0, len(digests)) == digests


def test_many_groups_of_which_any_may_be_left_out() -> None:
    """More than a byte of the bitmap, and no two bytes of it alike."""
    chooser = random.Random(4)
    digests = digests_of([(GROUP, chooser.random() < 0.5) for _ in range(40)])
    with reader(by_the_document(digests)) as table:
        for group in range(40):
            start = (group * GROUP + 5) * SIZE
            assert table.digests(group * GROUP + 5, 3) == digests[start : start + 3 * SIZE]


HEADER = struct.pack("<I", 512)


def test_a_plain_table() -> None:
    content = HEADER + bytes(range(2 * SIZE))
    with reader(content) as table:
        assert (table.block_size, table.count, table.digests(1, 5)) == (512, 2, content[4 + SIZE :])
        assert table.sha256() == hashlib.sha256(content).hexdigest()


def test_the_sha256_of_a_table_that_is_read_in_pieces() -> None:
    content = HEADER + random.Random(1).randbytes(200_000 * SIZE)
    with reader(content) as table:
        assert table.sha256() == hashlib.sha256(content).hexdigest()


def test_reads_that_give_less_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pread, content = os.pread, HEADER + bytes(range(9 * SIZE))
    with reader(content) as table:
        monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
        assert table.digests(0, 9) == content[4:]


def test_a_table_is_written_in_pieces_as_it_comes() -> None:
    sink = io.BytesIO()
    writer = TableWriter(sink, HASHER)
    writer.append(bytes(1 << 20))
    assert sink.tell() == 4 + (1 << 20)
    writer.append(b"\1" * SIZE)
    writer.finish()
    assert sink.getvalue() == HEADER + bytes(1 << 20) + b"\1" * SIZE


def test_a_table_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with reader(HEADER + bytes(SIZE)) as table:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(StorageError, match=r"^cannot read the table: Input/output error$"):
            table.digests(0, 1)


def test_a_plain_table_of_no_blocks() -> None:
    with reader(HEADER) as table:
        assert (table.block_size, table.count, table.digests(0, 1)) == (512, 0, b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes with a block size of 0"),
        (HEADER[:3], "3 bytes with a block size of 0"),
        (HEADER + bytes(SIZE - 1), f"{3 + SIZE} bytes with a block size of 512"),
        (HEADER + bytes(SIZE + 1), f"{5 + SIZE} bytes with a block size of 512"),
        (bytes(4) + bytes(SIZE), f"{4 + SIZE} bytes with a block size of 0"),
        (b"\1\0\x40\0" + bytes(SIZE), f"{4 + SIZE} bytes with a block size of 4194305"),
    ],
)
def test_a_file_that_can_be_no_plain_table_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(DamagedError, match=f"^the table is damaged: {said} are not a table of {SIZE}-byte digests"):
        reader(content)


@pytest.mark.parametrize("block_size", [MIN_BLOCK_SIZE, MAX_BLOCK_SIZE])
def test_the_smallest_and_the_largest_block_size(block_size: int) -> None:
    size = struct.pack("<I", block_size)
    for content in size + bytes(SIZE), SOUND[:8] + size + SOUND[12:]:
        with reader(content) as table:
            assert table.block_size == block_size


def test_a_file_that_is_refused_is_closed() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DamagedError):
        reader(b"")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_cut_while_it_is_read_is_told() -> None:
    fd = os.memfd_create("table")
    os.write(fd, HEADER + bytes(4 * SIZE))
    with TableReader(fd, "the table", SIZE) as table:
        os.ftruncate(fd, 4 + 3 * SIZE)
        with pytest.raises(DamagedError, match="the table was cut off while it was read"):
            table.digests(0, 4)


SOUND = by_the_document(digests_of([(GROUP, True), (10, False), (GROUP, True), (7, False)]))
DAMAGED = {
    "its last byte cut off": SOUND[:-1],
    "a byte more": SOUND + b"\0",
    "a digest less": SOUND[:40] + SOUND[40 + SIZE :],
    "only its header": SOUND[:20],
    "not even that": SOUND[:12],
    "a block size of 0": SOUND[:8] + bytes(4) + SOUND[12:],
    "a huge block size": SOUND[:8] + b"\1\0\x40\0" + SOUND[12:],
    "a block more": SOUND[:12] + struct.pack("<Q", 2 * GROUP + 18) + SOUND[20:],
    "more blocks than its bits": SOUND[:12] + struct.pack("<Q", 9 * GROUP) + SOUND[20:],
    "more blocks than there are bytes": SOUND[:12] + struct.pack("<Q", (1 << 64) - 1) + SOUND[20:],
    "a bitmap larger than any file": SOUND[:12] + struct.pack("<Q", 1 << 62) + SOUND[20:],
    "a bitmap larger than the file": SOUND[:12] + struct.pack("<Q", (len(SOUND) + 1) * 8 * GROUP) + SOUND[20:],
    "a bit beyond its groups": SOUND[:-1] + bytes([SOUND[-1] | 8]),
    "a group beyond its groups": SOUND[:-1] + bytes(GROUP * SIZE) + bytes([SOUND[-1] | 8]),
    "a bit less": SOUND[:-1] + bytes([SOUND[-1] & 2]),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_can_be_no_sparse_table_is_refused(what: str) -> None:
    with reader(SOUND) as table:
        assert table.count == 2 * GROUP + 17
    with pytest.raises(DamagedError, match=r"^the table is damaged: ") as caught:
        reader(DAMAGED[what])
    assert caught.value.hint == "restore it from a copy, or store everything again with --full"


def test_what_the_originals_commands_may_read_and_what_is_small_stays_plain() -> None:
    blocks = digesttable.PLAIN_LIMIT // 32
    sha256, md5 = (Hasher(digest_named(name), 512) for name in ("sha256", "md5"))
    assert sparse_count(sha256, 2, blocks * 512) is None
    assert sparse_count(sha256, 2, blocks * 512 + 1) == blocks + 1
    assert sparse_count(sha256, 1, 1 << 40) is None
    assert sparse_count(sha256, 1, None) is None
    assert sparse_count(md5, 2, 1 << 40) is None


def sparse(size: int, *places: int) -> bytes:
    image = bytearray(size)
    for place in places:
        image[place : place + 5] = b"data!"
    return bytes(image)


def test_a_chain_of_a_mostly_empty_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From plain tables to sparse ones and back; it grows, shrinks, and gets holes; verify and restore see no
    difference.
    """
    size = 5000 * 64
    chain = chains.new_chain(tmp_path)
    chain.add(sparse(size, 0, size - 5), Options(block_size=64))
    monkeypatch.setattr(digesttable, "PLAIN_LIMIT", 0)
    for image in (
        sparse(size, 0, 70_000, size - 5),
        sparse(size, 0, 70_000, size - 5),
        sparse(size + 13, 70_000, size + 3),
        sparse(3000 * 64 + 1, 70_000),
        bytes(3000 * 64 + 1),
    ):
        chain.add(image)
    monkeypatch.undo()
    chain.add(sparse(3000 * 64, 64))
    sizes = [chain.file(f".{number}.sha256").stat().st_size for number in range(1, 8)]
    header, group, byte = 20 + 32, GROUP * 32, 1
    assert sizes[0] == 4 + 5000 * 32 and sizes[6] == 4 + 3000 * 32
    last = 5000 % GROUP * 32
    assert sizes[1] == sizes[2] == header + 2 * group + last + byte
    assert sizes[3] == header + group + last + 32 + byte
    assert sizes[4] == header + group + (3001 - 2 * GROUP) * 32 + byte  # the last block is short: none like the others
    chain.assert_sound()


def test_the_golden_sparse_table(tmp_path: Path) -> None:
    """17 MiB in blocks of 512 bytes; written once, to be read for ever."""
    chain = chains.SmallChain(tmp_path / "copy", tmp_path / "none", "own-sparse")
    chain.directory.mkdir()
    for path in GOLDEN.glob("own-sparse.*"):
        (chain.directory / path.name).write_bytes(path.read_bytes())
    size = 33_000 * 512 + 100
    assert chain.file(".1.sha256").read_bytes()[:8] == b"\0\0\0\0BDt2"
    assert chain.restored(1) == sparse(size, 3000, 10 << 20, size - 7)
    assert chain.restored(2) == sparse(size, 3000, size - 7)
    assert chain.bad() == []
