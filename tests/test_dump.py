"""Scanning: exactly the blocks that changed, read errors with their offset, holes unread, the page cache as it was."""

import errno
import hashlib
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff import dump
from blockdiff.dump import Batch, FileSource
from blockdiff.original.descriptors import PipeSource
from blockdiff.shared import runs
from blockdiff.shared.blocks import Digest, Hasher, digest_named
from blockdiff.shared.errors import SourceError
from blockdiff.shared.pipeline import BufferPool
from tests.descriptors import all_closed

PAGE = 4096
SHA256 = digest_named("sha256")
BLOCK_SIZES = (1, 3, 100, PAGE, 5000, 3 * PAGE, 1 << 17)


def digest_table(image: bytes, block_size: int) -> bytes:
    return b"".join(
        SHA256.new(memoryview(image)[i : i + block_size]).digest() for i in range(0, len(image), block_size)
    )


class Table(dump.OldDigests):
    """A digest table in memory."""

    def __init__(self, digests: bytes) -> None:
        self._digests = digests
        self._next = 0

    def read(self, count: int) -> bytes:
        self._next += count * SHA256.size
        return self._digests[self._next - count * SHA256.size : self._next]

    def skip(self, count: int) -> None:
        self._next += count * SHA256.size


def scanned(source: FileSource | PipeSource, block_size: int, old: bytes | None) -> list[Batch]:
    """Return all batches of a scan, with their data copied: the buffers are used again."""
    pool = BufferPool(runs.batch_size(block_size))
    feed = Table(old) if old is not None else None
    batches = dump.scan(source, Hasher(SHA256, block_size), pool, feed)
    return [
        batch._replace(
            runs=[run._replace(data=None if run.data is None else memoryview(bytes(run.data))) for run in batch.runs]
        )
        for batch in batches
    ]


def apply(batches: Sequence[Batch], before: bytes, size: int) -> bytes:
    image = bytearray(before[:size].ljust(size, b"\xee"))
    for batch in batches:
        for run in batch.runs:
            image[run.offset : run.offset + run.length] = bytes(run.length) if run.data is None else run.data
    return bytes(image)


def write_sparse(path: Path, pages: Sequence[str], tail: int, noise: random.Random) -> None:
    """Make a file of pages: H is a hole, 0 zeros that are written, all else data; `tail` bytes of data end it."""
    with path.open("wb") as file:
        for page in pages:
            if page == "H":
                file.seek(PAGE, os.SEEK_CUR)
            else:
                file.write(bytes(PAGE) if page == "0" else noise.randbytes(PAGE))
        file.write(noise.randbytes(tail))
        file.truncate()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pages=st.lists(st.sampled_from("HH0D"), min_size=1, max_size=24),
    tail=st.integers(0, PAGE),
    block_size=st.sampled_from(BLOCK_SIZES),
    edits=st.lists(st.integers(0, 24 * PAGE), max_size=4),
    length_before=st.integers(0, 30 * PAGE),
    full=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_scan_finds_exactly_the_blocks_that_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pages: list[str],
    tail: int,
    block_size: int,
    edits: list[int],
    length_before: int,
    full: bool,
    seed: int,
) -> None:
    monkeypatch.setattr(runs, "BATCH_BYTES", 3 * PAGE)
    monkeypatch.setattr(dump, "ZEROS_BYTES", 5 * PAGE)
    path = tmp_path / "image"
    write_sparse(path, pages, tail, random.Random(seed))
    image = path.read_bytes()
    before = bytearray(image[:length_before].ljust(length_before, b"\x11"))
    for edit in edits:
        before[edit : edit + 1] = b"\x99" if edit < len(before) else b""
    old = None if full else digest_table(bytes(before), block_size)
    with FileSource(os.fsencode(path)) as source:
        batches = scanned(source, block_size, old)
        assert source.size == len(image)
        assert source.changed() == ""
    assert [batch.offset for batch in batches] == [sum(b.length for b in batches[:i]) for i in range(len(batches))]
    assert sum(batch.length for batch in batches) == len(image)
    assert apply(batches, b"" if full else bytes(before), len(image)) == image
    changed = [
        i for i in range(0, len(image), block_size) if full or image[i : i + block_size] != before[i : i + block_size]
    ]
    found = [run for batch in batches for run in batch.runs]
    assert [i for run in found for i in range(run.offset, run.offset + run.length, block_size)] == changed
    assert sum(batch.changed for batch in batches) == len(changed)
    for run in found:
        assert (run.data is None) == (not any(image[run.offset : run.offset + run.length]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=st.binary(max_size=5000), zeros=st.integers(0, 5000), block_size=st.sampled_from(BLOCK_SIZES))
def test_a_stream_is_scanned_to_its_end(
    monkeypatch: pytest.MonkeyPatch, image: bytes, zeros: int, block_size: int
) -> None:
    monkeypatch.setattr(runs, "BATCH_BYTES", 1000)
    image += bytes(zeros)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb", buffering=0) as file:

        def write() -> None:
            with file:
                for i in range(0, len(image), 700):  # pieces that fit neither blocks nor batches
                    file.write(image[i : i + 700])

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        source = PipeSource(read_end, BufferPool(runs.batch_size(block_size)))
        batches = scanned(source, block_size, None)
        writer.join(30)
    assert source.size == len(image)
    assert apply(batches, b"", len(image)) == image


def test_a_full_scan_hashes_nothing(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 3 * PAGE + bytes(PAGE))
    hashed = []

    def new(data: memoryview) -> "hashlib._Hash":
        hashed.append(bytes(data))
        return SHA256.new(data)

    hasher = Hasher(Digest("sha256", SHA256.size, new), PAGE)
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        (batch,) = dump.scan(source, hasher, BufferPool(runs.batch_size(PAGE)))
    assert batch.changed == 4
    assert hashed == [bytes(PAGE)], "the digest of zeros alone, when the hasher was made"


def test_holes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparse(tmp_path / "image", "HHDHHHDHH", 0, random.Random(1))
    read: list[tuple[int, int]] = []
    real = FileSource._read

    def recording(self: FileSource, view: memoryview, offset: int) -> int:
        read.append((offset, len(view)))
        return real(self, view, offset)

    monkeypatch.setattr(FileSource, "_read", recording)
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        batches = scanned(source, PAGE, None)
    assert sorted(read) == [(2 * PAGE, PAGE), (6 * PAGE, PAGE)]
    assert sum(batch.read for batch in batches) == 2 * PAGE
    assert sum(batch.length for batch in batches) == 9 * PAGE


def test_a_file_system_that_knows_no_holes_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparse(tmp_path / "image", "HDH", 5, random.Random(1))
    real = os.lseek

    def lseek(fd: int, position: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, position, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    image = (tmp_path / "image").read_bytes()
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        batches = scanned(source, PAGE, None)
    assert apply(batches, b"", len(image)) == image
    assert sum(batch.read for batch in batches) == len(image)


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_a_failure_to_look_for_holes_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whence: int) -> None:
    write_sparse(tmp_path / "image", "DHD", 0, random.Random(1))
    real = os.lseek

    def lseek(fd: int, position: int, how: int) -> int:
        if how == whence and position:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, position, how)

    monkeypatch.setattr(os, "lseek", lseek)
    with FileSource(os.fsencode(tmp_path / "image")) as source, pytest.raises(SourceError) as caught:
        scanned(source, PAGE, None)
    where = {os.SEEK_DATA: PAGE, os.SEEK_HOLE: 2 * PAGE}[whence]
    assert caught.value.message == f"cannot read {tmp_path}/image at offset {where}: Input/output error"


class Disk:
    """Stands in for reading: calls of at most `step` bytes, and an error or the end from an offset on."""

    def __init__(self, step: int = 1 << 30, bad: int | None = None, end: int | None = None) -> None:
        self.step = step
        self.bad = bad
        self.end = end
        self.real = os.preadv

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        (view,) = buffers
        count = min(len(view), self.step)
        if self.end is not None:
            count = max(0, min(count, self.end - offset))
        if self.bad is not None and offset <= self.bad < offset + count:
            count = self.bad - offset
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(fd, [view[:count]], offset)


@pytest.mark.parametrize("bad", [0, 1, PAGE, 5 * PAGE + 77, 10 * PAGE - 1])
@pytest.mark.parametrize("step", [1 << 30, 1000])
def test_a_read_error_names_the_offset_and_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, step: int
) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 10 * PAGE)
    monkeypatch.setattr(runs, "BATCH_BYTES", 2 * PAGE)
    monkeypatch.setattr(os, "preadv", Disk(step, bad=bad).preadv)
    with FileSource(os.fsencode(tmp_path / "image")) as source, pytest.raises(SourceError) as caught:
        scanned(source, PAGE, None)
    assert caught.value.message == f"cannot read {tmp_path}/image at offset {bad}: Input/output error"
    hint = "the disk may be failing, or the snapshot may have overflowed: see the host's kernel log"
    assert caught.value.hint == hint


def test_what_comes_before_a_read_error_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 10 * PAGE)
    monkeypatch.setattr(runs, "BATCH_BYTES", PAGE)
    monkeypatch.setattr(os, "preadv", Disk(bad=6 * PAGE).preadv)
    offsets = []
    with FileSource(os.fsencode(tmp_path / "image")) as source, pytest.raises(SourceError):
        for batch in dump.scan(source, Hasher(SHA256, PAGE), BufferPool(runs.batch_size(PAGE)), None):
            offsets.append(batch.offset)
    assert offsets == [i * PAGE for i in range(6)]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = random.Random(1).randbytes(10 * PAGE + 5)
    (tmp_path / "image").write_bytes(image)
    monkeypatch.setattr(os, "preadv", Disk(step=777).preadv)
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        assert apply(scanned(source, PAGE, None), b"", len(image)) == image


def test_a_file_that_was_cut_is_no_file_that_ends_in_a_hole(tmp_path: Path) -> None:
    """There is nothing but a hole behind its end, says SEEK_DATA, wherever that is now."""
    image = tmp_path / "image"
    image.write_bytes(b"x" * 10 * PAGE)
    with FileSource(os.fsencode(image)) as source:
        os.truncate(image, 0)
        with pytest.raises(SourceError, match=f"shrank from {10 * PAGE} to 0 bytes while it was read"):
            list(source.pieces(PAGE))


def test_an_early_end_is_a_source_that_shrank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 10 * PAGE)
    monkeypatch.setattr(os, "preadv", Disk(end=5 * PAGE + 3).preadv)
    with FileSource(os.fsencode(tmp_path / "image")) as source, pytest.raises(SourceError) as caught:
        scanned(source, PAGE, None)
    assert caught.value.message == f"{tmp_path}/image shrank from {10 * PAGE} to {5 * PAGE + 3} bytes while it was read"


def test_the_size_is_looked_at_again_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\x5a" * PAGE)
    with FileSource(os.fsencode(path)) as source:
        source.check_size()
        os.truncate(path, PAGE + 1)
        source.check_size()
        os.truncate(path, PAGE - 1)
        with pytest.raises(SourceError, match=f"shrank from {PAGE} to {PAGE - 1} bytes while it was read"):
            source.check_size()


def test_a_read_error_of_the_input_names_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def readv(fd: int, buffers: Sequence[memoryview]) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 100

    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(SourceError, match="cannot read the input at offset 100: Input/output error"):
        scanned(PipeSource(-1, BufferPool(runs.batch_size(PAGE))), PAGE, None)


def test_only_what_was_not_cached_before_is_dropped_from_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second batch of an image of data, and a hole in its middle, of which nothing is ever asked."""
    write_sparse(tmp_path / "image", "DDDD" + "HHHH" + "DDDD", 0, random.Random(1))
    cached = {0, 2 * PAGE * 5}
    advice: dict[int, list[tuple[int, int]]] = {}
    asked = []
    real = os.preadv

    def preadv(fd: int, buffers: Sequence[bytearray], offset: int, flags: int = 0) -> int:
        if not flags:
            return real(fd, buffers, offset)
        assert flags == os.RWF_NOWAIT
        asked.append(offset)
        if offset not in cached:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, length, kind: advice.setdefault(kind, []).append((start, length))
    )
    monkeypatch.setattr(runs, "BATCH_BYTES", 2 * PAGE)
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        scanned(source, PAGE, None)
    assert asked == [0, 2 * PAGE, 8 * PAGE, 10 * PAGE]
    uncached = [(2 * PAGE, 2 * PAGE), (8 * PAGE, 2 * PAGE)]
    assert sorted(advice[os.POSIX_FADV_DONTNEED]) == uncached
    assert sorted(advice[os.POSIX_FADV_WILLNEED]) == uncached
    assert advice[os.POSIX_FADV_RANDOM] == [(0, 0)]  # read-ahead would make the next batch look cached


def test_a_batch_is_dropped_only_after_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 2 * PAGE)
    order = []
    disk = Disk()

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        count = disk.preadv(fd, buffers, offset, flags)
        order.append("read")
        return count

    def fadvise(fd: int, start: int, length: int, kind: int) -> None:
        if kind == os.POSIX_FADV_DONTNEED:
            order.append("drop")

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    with FileSource(os.fsencode(tmp_path / "image")) as source:
        scanned(source, PAGE, None)
    assert order == ["read", "drop"]


def test_a_source_that_cannot_be_used_is_closed(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with all_closed(), pytest.raises(SourceError):
            FileSource(os.fsencode(path))
