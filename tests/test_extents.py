"""Extents: cut at block boundaries without ever claiming too much, and claims that a complete scan proves wrong."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from blockdiff.shared.extents import DATA, SAME, ZEROS, Audit, Extent, aligned

Extents = list[Extent]


@st.composite
def ascending(draw: st.DrawFn) -> Extents:
    """Draw extents that ascend and do not overlap; they may touch, leave gaps, and reach beyond any image's end."""
    found = []
    position = 0
    for gap, length, state in draw(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.sampled_from([DATA, ZEROS, SAME])), max_size=12)
    ):
        found.append(Extent(position + gap, position + gap + length, state))
        position += gap + length
    return found


def claimed(extents: Extents, offset: int) -> str:
    """Return what is claimed of one byte."""
    return next((state for start, end, state in extents if start <= offset < end), DATA)


@given(extents=ascending(), block_size=st.integers(1, 30), size=st.integers(1, 300))
def test_whole_blocks_cover_the_image_and_claim_no_more_than_was_said(
    extents: Extents, block_size: int, size: int
) -> None:
    found = list(aligned(extents, block_size, size))
    assert found[0].start == 0 and found[-1].end == size
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    assert all(extent.start < extent.end and extent.start % block_size == 0 for extent in found)
    for start, end, state in found:
        for block in range(start, end, block_size):
            said = {claimed(extents, offset) for offset in range(block, min(block + block_size, size))}
            if state != DATA:
                assert said == {state}


@given(extents=ascending(), block_size=st.integers(1, 30), size=st.integers(1, 300))
def test_a_block_inside_of_one_extent_keeps_its_state(extents: Extents, block_size: int, size: int) -> None:
    """What is known is made use of: otherwise everything might as well be data."""
    found = list(aligned(extents, block_size, size))
    for start, end, state in extents:
        for block in range(start + -start % block_size, min(end, size), block_size):
            if min(block + block_size, size) <= end:
                assert claimed(found, block) == state


def test_nothing_known_is_all_data() -> None:
    assert list(aligned([], 10, 25)) == [Extent(0, 25, DATA)]


def test_the_short_last_block_belongs_to_what_reaches_the_end() -> None:
    assert list(aligned([Extent(0, 25, SAME)], 10, 25)) == [Extent(0, 25, SAME)]
    assert list(aligned([Extent(0, 24, SAME)], 10, 25)) == [Extent(0, 20, SAME), Extent(20, 25, DATA)]
    assert list(aligned([Extent(0, 1000, ZEROS)], 10, 25)) == [Extent(0, 25, ZEROS)]


def test_an_extent_behind_the_end_is_none_of_the_image() -> None:
    assert list(aligned([Extent(30, 50, SAME)], 10, 25)) == [Extent(0, 25, DATA)]
    assert list(aligned([Extent(25, 50, SAME)], 10, 25)) == [Extent(0, 25, DATA)]


@given(extents=ascending(), runs=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=12))
def test_an_audit_finds_the_first_changed_byte_that_was_said_to_be_the_same(
    extents: Extents, runs: list[tuple[int, int]]
) -> None:
    audit = Audit(extents)
    position = 0
    for gap, length in runs:
        offset, position = position + gap, position + gap + length
        wrong = [byte for byte in range(offset, position) if claimed(extents, byte) == SAME]
        assert audit.first_wrong(offset, position) == (wrong[0] if wrong else -1)
