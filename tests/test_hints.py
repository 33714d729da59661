"""Scans of a source whose extents somebody knows: what is said to be zero or the same is not read, nor is it sent."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff import dump
from blockdiff.dump import FileSource
from blockdiff.shared import runs
from blockdiff.shared.blocks import Hasher, digest_named
from blockdiff.shared.extents import DATA, SAME, ZEROS, Extent
from blockdiff.shared.pipeline import BufferPool

BLOCK = 4096
SHA256 = digest_named("sha256")


class Table(dump.OldDigests):
    """The digest table of an image; `taken` are the blocks whose digests were asked for."""

    def __init__(self, image: bytes) -> None:
        self._digests = [SHA256.new(memoryview(image)[i : i + BLOCK]).digest() for i in range(0, len(image), BLOCK)]
        self._next = 0
        self.taken: list[int] = []

    def read(self, count: int) -> bytes:
        self.taken += range(self._next, self._next + count)
        self._next += count
        return b"".join(self._digests[self._next - count : self._next])

    def skip(self, count: int) -> None:
        self._next += count


class Reads:
    """The blocks that were read, in place of `os.preadv`; looks into the page cache are none."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._real = os.preadv

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        if not flags:
            length = sum(len(buffer) for buffer in buffers)
            self.blocks += range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return self._real(fd, buffers, offset, flags)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    states=st.lists(st.sampled_from([DATA, ZEROS, SAME]), min_size=1, max_size=30),
    tail=st.integers(1, BLOCK),
    full=st.booleans(),
    older=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_only_data_is_read_and_the_image_is_right(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: list[str],
    tail: int,
    full: bool,
    older: int,
    seed: int,
) -> None:
    """Of an image that has become longer or shorter since, in any mixture of data, holes, and what stayed the same."""
    noise = random.Random(seed)
    states = [DATA if state == SAME and (full or i >= older) else state for i, state in enumerate(states)]
    before = noise.randbytes(older * BLOCK)
    sizes = [BLOCK] * (len(states) - 1) + [tail]
    if states[-1] == SAME and older > len(states) - 1:
        sizes[-1] = BLOCK  # the same as before, so as long as before
    image = b"".join(
        before[i * BLOCK : i * BLOCK + size]
        if state == SAME
        else noise.randbytes(size)
        if state == DATA
        else bytes(size)
        for i, (state, size) in enumerate(zip(states, sizes))
    )
    (tmp_path / "image").write_bytes(image)
    known = [Extent(i * BLOCK, i * BLOCK + size, state) for i, (state, size) in enumerate(zip(states, sizes))]
    reads = Reads()
    monkeypatch.setattr(os, "preadv", reads.preadv)
    monkeypatch.setattr(runs, "BATCH_BYTES", 3 * BLOCK)
    monkeypatch.setattr(dump, "ZEROS_BYTES", 2 * BLOCK)
    old = None if full else Table(before)
    found = bytearray((b"" if full else before)[: len(image)].ljust(len(image), b"\xee"))
    read = examined = 0
    sent: list[int] = []
    with FileSource(os.fsencode(tmp_path / "image"), known) as source:
        for batch in dump.scan(source, Hasher(SHA256, BLOCK), BufferPool(runs.batch_size(BLOCK)), old):
            assert batch.offset == examined
            examined += batch.length
            read += batch.read
            for run in batch.runs:
                found[run.offset : run.offset + run.length] = bytes(run.length) if run.data is None else run.data
                sent += range(run.offset // BLOCK, -(-(run.offset + run.length) // BLOCK))
    monkeypatch.undo()
    data = [i for i, state in enumerate(states) if state == DATA]
    assert bytes(found) == image
    assert examined == len(image)
    assert sorted(reads.blocks) == data
    assert read == sum(sizes[i] for i in data)
    assert not [i for i in sent if states[i] == SAME]
    if old is not None:
        assert not [i for i in old.taken if i < len(states) and states[i] == SAME]


def test_a_claim_counts_for_whole_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 10 * BLOCK)
    reads = Reads()
    monkeypatch.setattr(os, "preadv", reads.preadv)
    known = [
        Extent(1, 4 * BLOCK - 1, ZEROS),
        Extent(5 * BLOCK, 6 * BLOCK, ZEROS),
        Extent(8 * BLOCK + 1, 99 * BLOCK, ZEROS),
    ]
    with FileSource(os.fsencode(tmp_path / "image"), known) as source:
        pieces = [(piece.offset // BLOCK, piece.length // BLOCK, piece.state) for piece in source.pieces(BLOCK)]
    assert pieces == [(0, 1, DATA), (1, 2, ZEROS), (3, 2, DATA), (5, 1, ZEROS), (6, 3, DATA), (9, 1, ZEROS)]


def test_what_is_the_same_is_one_piece_however_large(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(1 << 40)
    with FileSource(os.fsencode(tmp_path / "image"), [Extent(0, 1 << 40, SAME)]) as source:
        assert [(piece.offset, piece.length) for piece in source.pieces(BLOCK)] == [(0, 1 << 40)]
