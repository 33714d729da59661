"""The file format: `docs/format.md` says what our reader and writer do, and whatever breaks its rules is refused."""

import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from blockdiff.chain.inventory import DELTA_SUFFIXES, TABLE_SUFFIXES
from blockdiff.database.coordinates import Channel, Coordinates
from blockdiff.format import codec, manifest
from blockdiff.format.deltafile import MAX_RECORD, DeltaReader
from blockdiff.format.deltawriter import DeltaWriter
from blockdiff.format.digesttable import TableReader
from blockdiff.format.manifest import Manifest, Parent, Quiesced, SnapshotRecord, Source, StoredFile
from blockdiff.original.apply import apply
from blockdiff.shared.blocks import DIGEST_SIZES, MAX_BLOCK_SIZE, MAX_IMAGE_SIZE, Hasher, digest_named
from blockdiff.shared.errors import DamagedError, ProtocolError, StorageError
from blockdiff.shared.runs import Run
from tests import recipe
from tests.protocol import FORMAT as TEXT
from tests.protocol import example

IMAGE = b"abcdefgh" + bytes(8) + b"xyz"
SECOND = b"abcdEF"


def table_reader(content: bytes, digest: str = "md5") -> TableReader:
    fd = os.memfd_create("table")
    os.write(fd, content)
    return TableReader(fd, "the table", DIGEST_SIZES[digest])


def read(delta: bytes) -> tuple[DeltaReader, list[tuple[int, int, bytes | None]]]:
    """Return the reader at its end, and offset, length and data of each run."""
    reader = DeltaReader([delta], "the delta")
    return reader, [(run.offset, run.length, None if run.data is None else bytes(run.data)) for run in reader.runs()]


def write(
    delta_format: int, runs: list[tuple[int, int, bytes | None]], image_size: int, old: TableReader | None = None
) -> tuple[bytes, bytes]:
    """Return the delta and the table that our writer makes of these runs, in blocks of 4 bytes with MD5."""
    delta, table = io.BytesIO(), io.BytesIO()
    hasher = Hasher(digest_named("md5"), 4)
    with DeltaWriter(delta, table, delta_format, hasher, image_size, bytes, old) as writer:
        for offset, length, data in runs:
            room = None
            if data is not None:
                room = writer.allocate(length)
                room[:] = data
            writer.add(Run(offset, length, room))
        writer.finish()
    return delta.getvalue(), table.getvalue()


# --- the document's example


def test_the_example_is_what_our_reader_reads() -> None:
    reader, runs = read(example("delta-2"))
    assert runs == [(0, 8, b"abcdefgh"), (8, 8, None), (16, 3, b"xyz")]
    assert (reader.format, reader.block_size, reader.image_size, reader.blocks_carried) == (2, 4, 19, 5)
    assert reader.table_sha256 == hashlib.sha256(example("table")).hexdigest()
    reader, runs = read(example("delta-1"))
    assert b"".join(data or b"" for _, _, data in runs) == IMAGE
    assert (reader.format, reader.block_size, reader.image_size, reader.blocks_carried) == (1, 4, None, 5)
    assert reader.table_sha256 is None
    assert read(example("delta-1-of-2"))[1] == [(4, 2, b"EF")]
    with table_reader(example("table")) as table:
        assert (table.block_size, table.count) == (4, 5)
        assert table.digests(0, 9) == b"".join(hashlib.md5(IMAGE[i : i + 4]).digest() for i in range(0, 19, 4))
        assert table.digests(4, 1) == hashlib.md5(b"xyz").digest()
        assert table.sha256() == hashlib.sha256(example("table")).hexdigest()


def test_the_example_is_what_our_writer_writes() -> None:
    runs = [(0, 8, b"abcdefgh"), (8, 8, None), (16, 3, b"xyz")]
    assert write(2, runs, len(IMAGE)) == (example("delta-2"), example("table"))
    assert write(1, runs, len(IMAGE)) == (example("delta-1"), example("table"))
    with table_reader(example("table")) as old:
        assert write(1, [(4, 2, b"EF")], len(SECOND), old) == (example("delta-1-of-2"), example("table-of-2"))


def test_the_example_is_what_merge_and_the_recipe_apply(tmp_path: Path) -> None:
    for version in ("delta-1", "delta-2"):
        apply([example(version)], str(tmp_path / version))
        assert (tmp_path / version).read_bytes() == IMAGE
    image = tmp_path / "by recipe"
    image.touch()
    for delta, table, expected in (("delta-1", "table", IMAGE), ("delta-1-of-2", "table-of-2", SECOND)):
        (tmp_path / "table.md5").write_bytes(example(table))
        assert recipe.apply(example(delta), image, tmp_path / "table.md5").returncode == 0
        assert image.read_bytes() == expected


# --- what else the document says


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the tables in the section below a heading."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| ---")]


def test_the_document_has_every_suffix_and_digest() -> None:
    words = [row[0].strip("`") for row in rows("Names")]
    assert set(DELTA_SUFFIXES) - {""} <= set(words)
    assert set(TABLE_SUFFIXES) <= set(words)
    sizes = {row[0].strip("`."): int(row[2]) for row in rows("Names") if row[-1].isdigit()}
    assert sizes == DIGEST_SIZES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sha256", hashlib.sha256(b"block").digest()),
        ("blake2b", hashlib.blake2b(b"block", digest_size=32).digest()),
        ("md5", hashlib.md5(b"block").digest()),
        ("xxh3", xxhash.xxh3_128_intdigest(b"block", 0).to_bytes(16, "big")),
    ],
)
def test_digests_are_those_that_the_document_names(name: str, expected: bytes) -> None:
    assert digest_named(name).new(memoryview(b"block")).digest() == expected


MANIFEST = Manifest(
    chain="0123456789abcdef" * 2,
    generation=2,
    parent=Parent(1, "ab" * 32),
    full=False,
    delta_format=2,
    delta=StoredFile(".gz", 100, "xxh3:" + "cd" * 16),
    table=StoredFile(".sha256", 36, "sha256:" + "ef" * 32),
    digest="sha256",
    block_size=4,
    image_size=3,
    blocks=1,
    changed_blocks=1,
    source=Source("web1:2222", "/dev/vg/lv", "device", "uuid"),
    consistency="quiesced",
    started="2026-11-20T00:00:00+00:00",
    finished="2026-11-20T00:00:01+00:00",
    bytes_read=3,
    bytes_received=40,
    run="0123456789abcdef",
    snapshot=SnapshotRecord("uuid", "thick", 0.25, 12.5, False, "changed"),
    quiesced=Quiesced("mysql", 0.5, ["BACKUP STAGE START"], 1.0),
    database=Coordinates(
        "10.11.6-MariaDB", "mariadb", "binlog.1", 4, "0-1-2", (Channel("", "db1", 3306, "b", 5, None),)
    ),
    notes=["a note"],
    versions={"blockdiff": "1"},
)


def flat(fields: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield prefix + name
        if isinstance(value, dict) and name != "versions":
            yield from flat(value, f"{prefix}{name}.")


def test_the_document_has_every_field_of_the_manifest() -> None:
    found = rows("Manifest")
    begin = found.index(["word", ""]) + 1  # what `consistency` may be, of which two words are those of fields
    words = [row[0].strip("`") for row in found[begin : begin + 6]]
    assert words == ["quiesced", "snapshot", "still", "live", "changing", "unknown"]
    of_fields = found[1:begin] + found[begin + 6 :]
    documented = {name for row in of_fields for name in re.findall(r"`([\w.]+)`", row[0])}
    assert documented == set(flat(json.loads(MANIFEST.to_bytes())))


def test_a_manifest_is_read_as_it_was_written() -> None:
    content = MANIFEST.to_bytes()
    assert manifest.from_bytes(content, "m") == MANIFEST
    assert content.isascii()
    first = replace(MANIFEST, parent=None, image_size=None, bytes_read=None, source=Source(None, "dump", "command"))
    assert manifest.from_bytes(first.to_bytes(), "m") == first


def test_a_manifests_checksum_is_that_of_the_file_with_zeros_in_its_place() -> None:
    content = MANIFEST.to_bytes()
    claimed = json.loads(content)["sha256"]
    assert hashlib.sha256(content.replace(claimed.encode(), b"0" * 64)).hexdigest() == claimed


def test_a_manifest_that_is_cut_or_flipped_anywhere_is_refused() -> None:
    content = MANIFEST.to_bytes()
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1
        for damaged in (content[:i], bytes(flipped)):
            with pytest.raises(DamagedError, match=r"^m (is not a manifest|is damaged|has manifest version)"):
                manifest.from_bytes(damaged, "m")


def test_a_manifest_of_another_version_or_with_unfit_fields_is_refused() -> None:
    def sealed(fields: dict[str, object]) -> bytes:
        blank = json.dumps({**fields, "sha256": "0" * 64}).encode()
        return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)

    fields = json.loads(MANIFEST.to_bytes())
    assert manifest.from_bytes(sealed({**fields, "a newer field": [1]}), "m") == MANIFEST
    for version in (0, 3):
        with pytest.raises(DamagedError, match=f"has manifest version {version}, this blockdiff knows 1 to 2"):
            manifest.from_bytes(sealed({**fields, "blockdiff_manifest": version}), "m")
    optional = {"image_size", "bytes_read", "bytes_received", "run", "snapshot", "quiesced", "database", "notes"}
    for name in set(fields) - {"blockdiff_manifest", "sha256", "parent"} - optional:
        with pytest.raises(DamagedError, match="is missing or not valid"):
            manifest.from_bytes(sealed({**fields, name: None}), "m")
    for name, value in (("generation", -1), ("blocks", True), ("full", 1), ("image_size", "3"), ("parent", {"x": 1})):
        with pytest.raises(DamagedError, match="is missing or not valid"):
            manifest.from_bytes(sealed({**fields, name: value}), "m")


def test_members_begin_as_the_document_says_and_tell_their_sizes() -> None:
    (gzip_head,) = re.findall(r"`(1f 8b[^`]*)`", TEXT)
    (zstd_head,) = re.findall(r"`(50 2a[^`]*)`", TEXT)
    member, frame = codec.compressor("gzip")(b"data"), codec.compressor("zstd")(b"data")
    head = bytes.fromhex(gzip_head)
    assert member.startswith(head + struct.pack("<I", len(member)))
    head = bytes.fromhex(zstd_head)
    assert frame.startswith(head + struct.pack("<I", len(frame) - len(head) - 4))


# --- version 2: rules that a reader checks


def delta_2(*records: bytes, image_size: int = 19, block_size: int = 4, end: bytes | None = None) -> bytes:
    """Return a delta of version 2; `end` is its end record, by default a sound one for one block."""
    head = bytes(4) + b"BDv2" + struct.pack("<IQ", block_size, image_size)
    blocks = -(-image_size // block_size) if block_size else 0
    return head + b"".join(records) + (record(3, blocks, 1, bytes(32)) if end is None else end)


def record(kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<BQQ", kind, offset, length) + data


ONE = record(1, 4, 4, b"1234")
BROKEN = {
    "unknown kind": (delta_2(record(4, 0, 4)), "has the kind 4 and the length 4"),
    "kind 0": (delta_2(record(0, 0, 4)), "has the kind 0"),
    "no length": (delta_2(record(1, 0, 0)), "covers 0 bytes at offset 0"),
    "no length of zeros": (delta_2(record(2, 0, 0)), "covers 0 bytes at offset 0"),
    "unaligned offset": (delta_2(record(1, 2, 4, b"1234")), "covers 4 bytes at offset 2"),
    "part of a block": (delta_2(record(1, 0, 3, b"123")), "covers 3 bytes, not whole blocks, at offset 0"),
    "part of a block of zeros": (delta_2(record(2, 4, 5)), "covers 5 bytes, not whole blocks, at offset 4"),
    "beyond the end": (delta_2(record(1, 16, 4, b"1234")), "covers 4 bytes at offset 16"),
    "behind the end": (delta_2(record(2, 20, 4)), "covers 4 bytes at offset 20"),
    "huge offset": (delta_2(record(2, (1 << 64) - 4, 4)), "covers 4 bytes at offset 18446744073709551612"),
    "twice": (delta_2(ONE, ONE), "covers 4 bytes at offset 4"),
    "descending": (delta_2(ONE, record(2, 0, 4)), "covers 4 bytes at offset 0"),
    "overlap": (delta_2(record(2, 0, 8), ONE), "covers 4 bytes at offset 4"),
    "too much data": (
        delta_2(record(1, 0, MAX_RECORD + 4), image_size=1 << 40),
        f"has the kind 1 and the length {MAX_RECORD + 4}",
    ),
    "wrong count of blocks": (delta_2(ONE, end=record(3, 4, 1, bytes(32))), "other counts than its records"),
    "wrong count of carried": (delta_2(ONE, end=record(3, 5, 2, bytes(32))), "other counts than its records"),
    "something behind the end": (delta_2(ONE) + b"\0", "something follows its end mark"),
    "two ends": (delta_2(ONE) + record(3, 5, 1, bytes(32)), "something follows its end mark"),
    "no end": (delta_2(ONE, end=b""), "it ends in the middle of a record"),
    "block size 0": (delta_2(block_size=0), "its block size is 0"),
    "block size too large": (delta_2(block_size=MAX_BLOCK_SIZE + 1), "its block size is 4194305"),
    "image too large": (delta_2(image_size=MAX_IMAGE_SIZE + 1), "its image size is 9223372036854775808"),
    "another magic": (b"\0\0\0\0BDv3" + bytes(12), "it is not a delta"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_delta_of_version_2_that_breaks_a_rule_is_refused(rule: str) -> None:
    delta, words = BROKEN[rule]
    with pytest.raises(DamagedError, match=re.escape(words)) as caught:
        read(delta)
    assert caught.value.message.startswith("the delta is damaged: ")
    assert "(at byte " in caught.value.message


def test_a_delta_of_version_2_that_keeps_the_rules_is_read() -> None:
    zeros = record(2, 8, 11)  # to the end of the image, which is no multiple of the block size
    end = record(3, 5, 4, bytes(32))
    assert read(delta_2(ONE, zeros, end=end))[1] == [(4, 4, b"1234"), (8, 11, None)]
    huge = MAX_IMAGE_SIZE - 3
    runs = read(delta_2(record(2, 0, huge), image_size=huge, end=record(3, -(-huge // 4), -(-huge // 4), bytes(32))))
    assert runs[1] == [(0, huge, None)]


def test_a_delta_of_version_2_that_is_cut_anywhere_is_refused() -> None:
    delta = example("delta-2")
    for length in range(len(delta)):
        with pytest.raises(DamagedError, match="ends in the middle of"):
            read(delta[:length])


def test_a_reader_closes_what_makes_its_pieces_in_any_case() -> None:
    """Half read, and where not even the header can be read."""
    ends: list[str] = []

    def pieces(content: bytes) -> Iterator[bytes]:
        try:
            for i in range(len(content)):
                yield content[i : i + 1]
        finally:
            ends.append("closed")

    sound = pieces(example("delta-2"))
    with DeltaReader(sound, "the delta") as reader:
        next(reader.runs())
        assert ends == []
    assert ends == ["closed"]
    broken = pieces(b"\0\0\0\0junk" * 5)
    with pytest.raises(DamagedError, match="it is not a delta"):
        DeltaReader(broken, "the delta")
    assert ends == ["closed", "closed"]


@given(st.lists(st.integers(0, 92), max_size=8).map(sorted), st.sampled_from(["delta-1", "delta-2"]))
def test_it_does_not_matter_in_what_pieces_a_delta_arrives(cuts: list[int], name: str) -> None:
    delta = example(name)
    pieces = [delta[i:j] for i, j in zip([0, *cuts], [*cuts, len(delta)])]
    runs = [(run.offset, bytes(run.data or b"")) for run in DeltaReader(pieces, "it").runs()]
    assert runs == [(offset, data or b"") for offset, _, data in read(delta)[1]]


# --- version 1


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (b"", "ends in the middle of its header"),
        (b"\4\0\0", "ends in the middle of its header"),
        (b"\4\0\0\0" + bytes(7), "ends in the middle of a record"),
        (b"\4\0\0\0" + bytes(8), "ends in the middle of a record"),
        (b"\4\0\0\0\2" + bytes(7) + b"1234", "a record has the offset 2"),
        (b"\4\0\0\0" + (bytes(8) + b"1234") * 2, "a record has the offset 0"),
        (b"\4\0\0\0\4" + bytes(7) + b"1234" + bytes(8) + b"1234", "a record has the offset 0"),
        (b"\4\0\0\0\xfc" + b"\xff" * 6 + b"\x7f" + b"1234", "a record has the offset 9223372036854775804"),
        (b"\4\0\0\0" + b"\xfc" + b"\xff" * 7 + b"1234", "a record has the offset 18446744073709551612"),
        (b"\1\0\x40\0", "its block size is 4194305"),
    ],
)
def test_a_delta_of_version_1_that_breaks_a_rule_is_refused(delta: bytes, words: str) -> None:
    with pytest.raises(DamagedError, match=words):
        read(delta)


def test_a_short_block_of_version_1_is_the_last_one() -> None:
    """The end of the delta is what makes it short. A delta without records is sound as well."""
    assert read(b"\4\0\0\0" + bytes(8) + b"12")[1] == [(0, 2, b"12")]
    assert read(b"\4\0\0\0")[1] == []


@pytest.mark.parametrize("block_size", [1, 512, 1 << 20])
def test_neighbouring_records_of_version_1_become_runs_of_bounded_length(block_size: int) -> None:
    blocks = max(3, 20_000 // block_size)
    delta = struct.pack("<I", block_size) + b"".join(
        struct.pack("<Q", i * block_size) + bytes([i % 251]) * block_size for i in range(blocks)
    )
    reader, runs = read(delta)
    assert reader.blocks_carried == blocks
    assert all(length <= (1 << 20) + block_size and length // block_size <= 8192 for _, length, _ in runs)
    assert b"".join(data or b"" for _, _, data in runs) == b"".join(
        bytes([i % 251]) * block_size for i in range(blocks)
    )
    assert [offset for offset, _, _ in runs] == [sum(run[1] for run in runs[:i]) for i in range(len(runs))]


# --- digest tables


@pytest.mark.parametrize(
    "content",
    [b"", b"\4\0\0", b"\4\0\0\0" + bytes(15), bytes(4), b"\1\0\x40\0", b"\4\0\0\0" + bytes(17)],
)
def test_a_file_that_can_be_no_digest_table_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedError, match=r"the table is damaged: .* are not a table of 16-byte digests"):
        table_reader(content)


def test_a_table_without_digests_is_that_of_an_empty_image() -> None:
    with table_reader(b"\4\0\0\0") as table:
        assert (table.count, table.digests(0, 5)) == (0, b"")


def test_a_table_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(example("table"))
    with TableReader(os.open(path, os.O_RDONLY), "the table", 16) as table:
        os.truncate(path, 40)
        with pytest.raises(DamagedError, match="the table was cut off while it was read"):
            table.digests(0, 5)


def test_a_table_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(example("table"))
    writable_only = os.open(path, os.O_WRONLY)
    with pytest.raises(StorageError, match="cannot read the table: Bad file descriptor"):
        TableReader(writable_only, "the table", 16)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writable_only)  # it was closed


# --- the writer


def test_the_writer_keeps_the_digests_of_blocks_that_did_not_change() -> None:
    with table_reader(example("table")) as old:
        delta, table = write(2, [(4, 4, b"1234")], len(IMAGE), old)
    assert read(delta)[1] == [(4, 4, b"1234")]
    assert table == example("table")[:20] + hashlib.md5(b"1234").digest() + example("table")[36:]


@pytest.mark.parametrize("runs", [[], [(0, 4, b"abcd")], [(8, 8, None), (16, 3, b"xyz")]])
def test_the_writer_refuses_to_leave_out_what_no_generation_has(runs: list[tuple[int, int, bytes | None]]) -> None:
    with pytest.raises(ProtocolError, match="were not sent, and no earlier generation has them"):
        write(2, runs, len(IMAGE))


def test_long_runs_of_zeros_stay_one_small_record_or_a_few() -> None:
    """A tebibyte of zeros: version 2 does not write them down, and holds no more digests at once than must be."""
    delta, table = io.BytesIO(), io.BytesIO()
    size = 1 << 40
    with DeltaWriter(delta, table, 2, Hasher(digest_named("md5"), 4 << 20), size, bytes, None) as writer:
        writer.add(Run(0, size, None))
        written = writer.finish()
    assert (written.blocks, written.changed_blocks, written.changed_bytes) == (size >> 22, size >> 22, size)
    assert len(delta.getvalue()) < 1000
    assert sum(length for _, length, data in read(delta.getvalue())[1] if data is None) == size
