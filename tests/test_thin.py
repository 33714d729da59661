"""What changed in thin volumes, by the word of thin_delta: extents that cover the image, or a reason to read it all."""

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff import lvm
from blockdiff.host import lvs, thin
from blockdiff.host.thin import HintError
from blockdiff.shared.errors import Interrupted, ProcessError
from blockdiff.shared.extents import DATA, SAME, ZEROS, Extent
from tests import processes
from tests.fake_lvm import FakeLvm

BLOCK = 64 << 10
HEAD = '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
DELTA = HEAD + '<diff left="{left}" right="{right}">%s</diff></superblock>'


def delta(*ranges: tuple[str, int, int]) -> str:
    """Return what thin_delta prints of ranges (kind, first block, number of blocks)."""
    return DELTA % "".join(f'<{kind} begin="{begin}" length="{length}"/>' for kind, begin, length in ranges)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    """A host with the thin volume vg/lv of 1 MiB, its snapshots bd_old (kept) and bd_new, and nothing changed."""
    fake = FakeLvm(tmp_path / "fake")
    fake.add_group("vg", 1 << 30)
    row = fake.add_thin("vg", "lv", lv_size=str(1 << 20))
    snapshot = {"origin": "lv", "origin_uuid": row["lv_uuid"], "lv_size": str(1 << 20), "lv_attr": "Vri-a-tz--"}
    fake.add_thin("vg", "bd_old", thin_id="2", lv_tags="blockdiff,blockdiff_kept", **snapshot)
    fake.add_thin("vg", "bd_new", thin_id="3", lv_tags="blockdiff", **snapshot)
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    say(fake, delta())
    return fake


def say(fake: FakeLvm, text: str) -> None:
    with fake.state() as state:
        state["delta"] = text


def held(fake: FakeLvm) -> str:
    with fake.state() as state:
        return state["held"]


def volume(name: str) -> lvs.Volume:
    (found,) = lvs.volumes("vg", f'lv_name="{name}"')
    return found


def read(xml: str, size: int = len(delta())) -> list[thin.Range]:
    """Return the ranges of a comparison of 2 with 3, fed in pieces."""
    reader = thin.DeltaReader("2", "3")
    data = xml.encode()
    for i in range(0, len(data), size):
        reader.feed(data[i : i + size])
    return reader.end()


# extents


def test_what_changed_is_data_what_was_unmapped_a_hole_and_all_else_the_same(fake: FakeLvm) -> None:
    say(fake, delta(("same", 0, 1), ("different", 1, 1), ("right_only", 2, 2), ("left_only", 5, 1), ("same", 6, 2)))
    assert thin.changed_extents(volume("bd_old"), volume("bd_new")) == [
        Extent(0, BLOCK, SAME),
        Extent(BLOCK, 4 * BLOCK, DATA),
        Extent(4 * BLOCK, 5 * BLOCK, SAME),
        Extent(5 * BLOCK, 6 * BLOCK, ZEROS),
        Extent(6 * BLOCK, 1 << 20, SAME),
    ]
    assert fake.calls("thin_delta") == [["-m", "--thin1", "2", "--thin2", "3", "/dev/mapper/vg-pool_tmeta"]]


def test_what_is_not_mapped_is_a_hole_of_a_first_run(fake: FakeLvm) -> None:
    say(fake, delta(("same", 1, 1), ("same", 2, 1), ("same", 15, 1)))
    assert thin.mapped_extents(volume("bd_new")) == [
        Extent(0, BLOCK, ZEROS),
        Extent(BLOCK, 3 * BLOCK, DATA),
        Extent(3 * BLOCK, 15 * BLOCK, ZEROS),
        Extent(15 * BLOCK, 16 * BLOCK, DATA),
    ]
    assert fake.calls("thin_delta") == [["-m", "--thin1", "3", "--thin2", "3", "/dev/mapper/vg-pool_tmeta"]]


def test_nothing_mapped_is_one_hole_and_nothing_changed_one_extent(fake: FakeLvm) -> None:
    assert thin.mapped_extents(volume("bd_new")) == [Extent(0, 1 << 20, ZEROS)]
    assert thin.changed_extents(volume("bd_old"), volume("bd_new")) == [Extent(0, 1 << 20, SAME)]


KINDS = ("same", "different", "left_only", "right_only", "")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 5)), max_size=30), st.integers(1, 200000))
def test_extents_cover_the_image_exactly_and_mean_what_the_blocks_were(
    stretches: list[tuple[str, int]], size: int
) -> None:
    blocks: list[str] = []
    ranges = []
    for kind, length in stretches:
        if kind:
            ranges.append((kind, len(blocks), length))
        blocks += [kind] * length
    found = read(delta(*ranges).format(left=2, right=3).replace("128", "2"))
    extents = list(thin.covering(found, thin.CHANGED, SAME, size))
    assert extents[0].start == 0 and extents[-1].end == size
    for before, after in pairwise(extents):
        assert before.end == after.start and before.state != after.state
    for start, end, state in extents:
        assert start < end
        for block in range(start // 1024, -(-end // 1024)):
            kind = blocks[block] if block < len(blocks) else ""
            assert state == {"same": SAME, "": SAME, "left_only": ZEROS}.get(kind, DATA)


@given(st.lists(st.tuples(st.sampled_from(KINDS[:4]), st.integers(0, 50), st.integers(1, 5)), max_size=10))
def test_ranges_in_any_order_are_covering_extents_or_refused(ranges: list[tuple[str, int, int]]) -> None:
    found = read(delta(*ranges).format(left=2, right=3))
    ascending = all(a[1] + a[2] <= b[1] for a, b in pairwise(ranges))
    try:
        extents = list(thin.covering(found, thin.CHANGED, SAME, 60 * BLOCK))
    except HintError:
        assert not ascending
    else:
        assert ascending
        assert [extents[0].start, extents[-1].end] == [0, 60 * BLOCK]


# what does not fit


def test_a_resized_volume_is_refused(fake: FakeLvm) -> None:
    fake.set("bd_new", lv_size=str(2 << 20))
    with pytest.raises(HintError, match=r"^the volume was resized from 1048576 to 2097152 bytes$"):
        thin.changed_extents(volume("bd_old"), volume("bd_new"))


def test_snapshots_of_different_pools_are_refused(fake: FakeLvm) -> None:
    fake.set("bd_old", pool_lv="other")
    with pytest.raises(HintError, match=r"^vg/bd_old and vg/bd_new are not in one thin pool$"):
        thin.changed_extents(volume("bd_old"), volume("bd_new"))


@pytest.mark.parametrize("thin_id", ["7", ""])
def test_a_device_that_is_not_what_lvm_says_is_refused(fake: FakeLvm, thin_id: str) -> None:
    new = volume("bd_new")._replace(thin_id=thin_id)
    with pytest.raises(HintError, match=r"^the device of vg/bd_new is not what LVM says: 0 2048 thin 253:4 3$"):
        thin.changed_extents(volume("bd_old"), new)


def test_an_external_origin_is_refused(fake: FakeLvm) -> None:
    with fake.state() as state:
        state["external"] = True
    with pytest.raises(HintError, match=r"^vg/bd_new has an external origin, which shows where nothing is mapped$"):
        thin.mapped_extents(volume("bd_new"))


def test_a_pool_without_metadata_is_refused(fake: FakeLvm) -> None:
    fake.set("pool", metadata_lv="[elsewhere]")
    with pytest.raises(HintError, match=r"^the metadata of the thin pool vg/pool cannot be found$"):
        thin.mapped_extents(volume("bd_new"))


@pytest.mark.parametrize("tool", ["thin_delta", "dmsetup"])
def test_a_tool_that_is_missing_is_named(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    new = volume("bd_new")
    (fake.commands / tool).unlink()
    real = lvs.environment()
    monkeypatch.setattr(lvs, "environment", lambda: {**real, "PATH": str(fake.commands) + ":/bin.none"})
    words = (
        "thin_delta is not installed there: it is in thin-provisioning-tools"
        if tool == "thin_delta"
        else "cannot start"
    )
    with pytest.raises(HintError, match=f"^{words}"):
        thin.mapped_extents(new)
    assert held(fake) == "-"


def test_a_thin_delta_that_fails_is_told_in_its_own_first_words(fake: FakeLvm) -> None:
    fake.order("thin_delta", "fail")
    with pytest.raises(HintError, match=r"^thin_delta failed: Something is wrong\.$"):
        thin.mapped_extents(volume("bd_new"))
    assert held(fake) == "-"


def test_a_thin_delta_that_fails_after_it_printed_everything_is_not_believed(fake: FakeLvm) -> None:
    fake.order("thin_delta", "fail_after")
    with pytest.raises(HintError, match="thin_delta failed"):
        thin.mapped_extents(volume("bd_new"))


def test_a_thin_delta_that_does_not_end_is_stopped(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "DELTA_TIMEOUT_S", 0.5)
    fake.order("thin_delta", "late")
    with pytest.raises(HintError, match=r"did not end within 0\.5 s"):
        thin.mapped_extents(volume("bd_new"))
    assert held(fake) == "-"


# the metadata snapshot


def test_the_metadata_snapshot_is_held_for_thin_delta_only(fake: FakeLvm) -> None:
    thin.mapped_extents(volume("bd_new"))
    tools = [call for call in fake.calls() if call[0] in ("dmsetup", "thin_delta")]
    assert [call[:5] for call in tools] == [
        ["dmsetup", "table", "vg-bd_new"],
        ["dmsetup", "status", "vg-pool-tpool"],
        ["dmsetup", "message", "vg-pool-tpool", "0", "reserve_metadata_snap"],
        ["thin_delta", "-m", "--thin1", "3", "--thin2"],
        ["dmsetup", "message", "vg-pool-tpool", "0", "release_metadata_snap"],
    ]
    assert held(fake) == "-"


def test_somebody_elses_metadata_snapshot_is_neither_used_nor_released(fake: FakeLvm) -> None:
    with fake.state() as state:
        state["held"] = "99"
    with pytest.raises(HintError) as caught:
        thin.mapped_extents(volume("bd_new"))
    assert caught.value.message == (
        "the metadata snapshot of vg-pool-tpool is in use; if by a run that was killed: "
        "dmsetup message vg-pool-tpool 0 release_metadata_snap"
    )
    assert held(fake) == "99"
    assert fake.calls("thin_delta") == []


def test_a_metadata_snapshot_that_somebody_takes_at_the_last_moment_is_theirs(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake.state() as state:
        state["held"] = "99"
    status = "0 2048 thin-pool 1 13/1024 10/1600 - rw discard_passdown queue_if_no_space - 1024"
    real = thin._dmsetup
    monkeypatch.setattr(thin, "_dmsetup", lambda what, path: status if what == "status" else real(what, path))
    with pytest.raises(HintError, match="Device or resource busy"):
        thin.mapped_extents(volume("bd_new"))
    assert held(fake) == "99"


def test_a_pool_that_failed_is_told(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    real = thin._dmsetup
    failed = "0 2048 thin-pool Fail"
    monkeypatch.setattr(thin, "_dmsetup", lambda what, path: failed if what == "status" else real(what, path))
    with pytest.raises(HintError, match=r"^the thin pool vg-pool-tpool is not healthy: 0 2048 thin-pool Fail$"):
        thin.mapped_extents(volume("bd_new"))


def test_a_signal_stops_thin_delta_and_releases_the_metadata_snapshot(fake: FakeLvm) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (fake.directory / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        processes.interrupt_main_thread(signal.SIGUSR1)

    fake.order("thin_delta", "late")
    new = volume("bd_new")
    helper = threading.Thread(target=interrupt)
    with processes.interrupting(signal.SIGUSR1):
        helper.start()
        with pytest.raises(Interrupted):
            thin.mapped_extents(new)
        helper.join(30)
    assert held(fake) == "-"
    assert fake.calls("dmsetup")[-1][-1] == "release_metadata_snap"


# hostile XML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be understood: no element found"),
        ("nonsense", "cannot be understood"),
        (DELTA[:-5] % "", "cannot be understood"),
        ("<superblock/>", "printed '' as the data_block_size"),
        (HEAD + "</superblock>", "printed no differences at all"),
        (HEAD.replace("128", "0") + "</superblock>", "printed '0' as the data_block_size"),
        (DELTA % '<same begin="-1" length="1"/>', "printed '-1' as the begin"),
        (DELTA % '<same begin="1" length="0"/>', "printed '0' as the length"),
        (DELTA % '<same begin="1"/>', "printed '' as the length"),
        (DELTA % ('<same begin="1" length="%s"/>' % ("9" * 19)), "as the length"),
        (DELTA % '<same begin="\u0661" length="1"/>', "as the begin"),
        (DELTA % '<both begin="1" length="1"/>', "an unknown element: both"),
        (DELTA % '<same begin="1" length="1"><same begin="1" length="1"/></same>', "an unknown element: same"),
        ('<diff left="2" right="3"/>', "an unknown element: diff"),
        (HEAD + '<diff left="2" right="3"/><diff left="2" right="3"/></superblock>', "an unknown element: diff"),
        (HEAD + '<diff left="3" right="2"/></superblock>', "compared other volumes"),
        (HEAD + '<diff left="2"/></superblock>', "compared other volumes"),
        ('<!DOCTYPE lolz [<!ENTITY lol "lol">]>' + DELTA % "&lol;", "printed a document type"),
    ],
)
def test_xml_that_is_not_thin_deltas_is_refused(text: str, message: str) -> None:
    with pytest.raises(HintError) as caught:
        read(text.replace("{left}", "2").replace("{right}", "3"), 7)
    assert message in caught.value.message


def test_too_many_ranges_are_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "RANGE_LIMIT", 3)
    ranges = [("same", 2 * i, 1) for i in range(4)]
    assert len(read(delta(*ranges[:3]).format(left=2, right=3))) == 3
    with pytest.raises(HintError, match="more than 3 ranges changed"):
        read(delta(*ranges).format(left=2, right=3))


@given(st.text(alphabet="<>/=\"' abs&;![]-DOCTYPE", max_size=60))
def test_whatever_is_printed_is_ranges_or_a_hint_error(text: str) -> None:
    with pytest.raises(HintError):
        read(text)


def test_a_range_of_a_kind_that_cannot_be_is_refused(fake: FakeLvm) -> None:
    say(fake, delta(("left_only", 1, 1)))
    with pytest.raises(HintError, match=r"^thin_delta printed an impossible range: left_only at 65536$"):
        thin.mapped_extents(volume("bd_new"))


# the kept snapshot


def test_the_kept_snapshot_is_found_by_its_uuid(fake: FakeLvm) -> None:
    origin, old = volume("lv"), volume("bd_old")
    assert thin.kept(origin, old.uuid) == old
    assert thin.kept_snapshots(origin) == [old]
    assert thin.kept(origin, volume("bd_new").uuid) is None  # no kept one
    assert thin.kept(origin, "") is None
    assert thin.kept(origin, old.uuid[:-1] + '"') is None


@pytest.mark.parametrize(
    "fields",
    [
        {"lv_uuid": "other"},
        {"lv_name": "old"},
        {"lv_tags": "blockdiff_kept"},
        {"lv_tags": "blockdiff"},
        {"origin": "other"},
        {"origin_uuid": "other"},
        {"pool_lv": "other"},
        {"segtype": "linear"},
        {"lv_attr": "Vwi-a-tz--"},
    ],
)
def test_another_volume_is_not_taken_for_the_kept_snapshot(fake: FakeLvm, fields: dict[str, str]) -> None:
    origin, uuid = volume("lv"), volume("bd_old").uuid
    fake.set("bd_old", **fields)
    assert thin.kept(origin, uuid) is None


def test_a_snapshot_that_was_kept_is_found_by_the_next_run_and_removed_by_name(fake: FakeLvm) -> None:
    origin = volume("lv")
    with lvm.Snapshot(origin, "") as snapshot:
        uuid = snapshot.look().uuid
        snapshot.keep()
    found = thin.kept(origin, uuid)
    assert found is not None
    lvm.remove(found)
    assert thin.kept(origin, uuid) is None
    assert "lv" in fake.names() and "bd_old" in fake.names()


def test_trouble_with_lvm_is_not_taken_for_a_missing_snapshot(fake: FakeLvm) -> None:
    origin, uuid = volume("lv"), volume("bd_old").uuid
    fake.order("lvs", "fail")
    with pytest.raises(ProcessError):
        thin.kept(origin, uuid)
