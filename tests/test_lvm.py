"""LVM snapshots against a stand-in: names, tags and guards, what is refused, what is removed and what never is."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff import lvm
from blockdiff.host import lvcheck, lvs, sources
from blockdiff.host.lvcheck import find
from blockdiff.shared.errors import ConnectionLost, Interrupted, ProcessError, SourceError
from tests import processes
from tests.fake_lvm import FakeLvm, Row, new_row

LIMIT_S = 30.0
MIB = 1 << 20


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLvm]:
    """A host with the group vg, 200 MiB free, and the volume lv of 100 MiB."""
    fake = FakeLvm(tmp_path / "fake")
    fake.add_group("vg", 200 * MIB)
    fake.add("vg", "lv")
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    monkeypatch.setattr(lvm, "REMOVE_INTERVAL_S", 0.01)
    monkeypatch.setattr(lvm, "WATCH_INTERVAL_S", 0.01)
    yield fake
    fake.go()


@pytest.fixture
def ended_pid() -> int:
    """The pid of a process that has ended and was waited for."""
    with subprocess.Popen(["true"]) as child:
        child.wait(LIMIT_S)
    return child.pid


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def only_snapshot(fake: FakeLvm) -> Row:
    (name,) = [name for name in fake.names() if name.startswith("bd_")]
    return fake.row(name)


# what lvs says


def test_a_volume_is_found_by_any_of_its_paths(fake: FakeLvm) -> None:
    fake.add_group("pv.0-x", 0)
    row = fake.add("pv.0-x", "my-lv.1", lv_size=str(5 * MIB))
    for path in ("/dev/pv.0-x/my-lv.1", "/dev/mapper/pv.0--x-my--lv.1"):
        found = find(path)
        assert (found.full_name, found.size, found.uuid) == ("pv.0-x/my-lv.1", 5 * MIB, row["lv_uuid"])
    call = fake.calls("lvs")[-1]
    assert call[:7] == ["--reportformat", "json", "--units", "b", "--nosuffix", "-a", "-o"]


def test_lvm_speaks_english_and_finds_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("PATH", "/opt/bin")
    environment = lvs.environment()
    assert environment["LC_ALL"] == "C"
    assert environment["LVM_SUPPRESS_FD_WARNINGS"] == "1"
    assert environment["PATH"] == "/opt/bin:/usr/local/sbin:/usr/sbin:/sbin"


def test_what_is_no_volume_is_named_with_what_lvm_says(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        SourceError, match=r"^/dev/sda1 is not a logical volume: lvs exited with status 5: Failed"
    ) as caught:
        find("/dev/sda1")
    assert "/dev/GROUP/VOLUME" in str(caught.value.hint)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("path", ["vg", "/dev/vg", "/dev/vg/"])
def test_a_whole_group_is_not_one_volume(fake: FakeLvm, path: str, others: int) -> None:
    """Not even where there is but one in it."""
    for _ in range(others):
        fake.add("vg", "other")
    with pytest.raises(SourceError, match=f"^{path} is not one logical volume$") as caught:
        find(path)
    assert caught.value.hint == "name it /dev/GROUP/VOLUME"


def test_lvm_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lvs, "environment", lambda: {"PATH": str(tmp_path)})
    with pytest.raises(SourceError, match=r"^LVM is not installed there$") as caught:
        find("/dev/vg/lv")
    assert caught.value.hint == "install the package lvm2 on the host"
    with pytest.raises(ProcessError, match=r"^LVM is not installed there$"):
        lvs.change(["lvremove", "vg/lv"], "vg")


def test_warnings_of_lvs_are_no_failure_and_trouble_elsewhere_is_none_of_ours(fake: FakeLvm) -> None:
    fake.order("lvs", "warn")
    assert find("/dev/vg/lv").name == "lv"
    fake.order("lvs", "fail_after")
    assert find("/dev/vg/lv").name == "lv"


def test_a_failed_lvs_that_shows_nothing_is_a_failure(fake: FakeLvm) -> None:
    fake.order("lvs", "fail")
    with pytest.raises(ProcessError, match=r"lvs exited with status 5: Something is wrong\."):
        lvs.volumes("vg")


def test_a_report_that_is_none_is_refused(fake: FakeLvm) -> None:
    fake.order("lvs", "gibberish")
    with pytest.raises(ProcessError, match="lvs printed a report that cannot be understood"):
        lvs.volumes("vg")


def test_only_root_can_ask_lvm(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.order("lvs", "fail")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SourceError) as caught:
        find("/dev/vg/lv")
    assert caught.value.message == "only root can see whether /dev/vg/lv is a logical volume"
    assert "log in as root" in str(caught.value.hint)


def test_a_lock_that_is_held_is_named(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvs, "COMMAND_TIMEOUT_S", 0.5)
    fake.order("lvs", "late")
    with pytest.raises(SourceError, match=r"^lvs did not end within 0.5 s: another LVM command seems to hold the lock"):
        find("/dev/vg/lv")


COOKIE = 0x0D4D << 16 | 0xF0CD


@pytest.mark.parametrize(
    ("key", "changed", "expected"),
    [(COOKIE, 1000, True), (COOKIE, 999, False), (0x0D4C << 16, 1000, False), (-5, 1000, False)],
)
def test_a_command_that_waits_for_udev_shows_by_its_semaphore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: int, changed: int, expected: bool
) -> None:
    (tmp_path / "sem").write_text(
        "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n"
        f"{key:10}          8   600          1     0     0     0     0       1000 {changed:10}\n"
    )
    monkeypatch.setattr(lvs, "_SEMAPHORES", str(tmp_path / "sem"))
    assert lvs.is_waiting_for_udev(1000) is expected


def test_a_udev_that_stands_still_is_no_lock(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "CREATE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(lvs, "is_waiting_for_udev", lambda begun: begun > 0)
    fake.order("lvcreate", "late")
    said = r"lvcreate did not end within 0.5 s: it waits for udev, which does not answer$"
    with pytest.raises(SourceError, match=said) as caught, lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        pass
    assert "systemd-udevd" in str(caught.value.hint)


def report(rows: list[Row], what: str = "lv") -> bytes:
    return json.dumps({"report": [{what: [{**row, "vg_free": "0"} for row in rows]}]}).encode()


def test_a_volume_of_several_segments_is_one() -> None:
    rows = [new_row("vg", "a", 1), new_row("vg", "b", 1)]
    found = lvs.parse_report(report([rows[0], {**rows[0], "segtype": "striped"}, rows[1]], "seg"))
    assert [(volume.name, volume.segtype) for volume in found] == [("a", "linear"), ("b", "linear")]


@pytest.mark.parametrize(
    ("invalid", "attributes", "expected"),
    [
        ("", "sri-a-s---", False),
        ("unknown", "sri-a-s---", False),
        ("0", "sri-a-s---", False),
        ("snapshot invalid", "sri-a-s---", True),
        ("1", "sri-a-s---", True),
        ("", "sri-I-s---", True),
        ("", "sri-S-s---", True),
    ],
)
def test_an_invalid_snapshot_is_recognised(invalid: str, attributes: str, expected: bool) -> None:
    row = {**new_row("vg", "bd_1", 1), "lv_snapshot_invalid": invalid, "lv_attr": attributes}
    assert lvs.parse_report(report([row]))[0].invalid is expected


NAME = st.from_regex(r"[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]{0,20}", fullmatch=True)
PERCENT = st.none() | st.integers(0, 10000).map(lambda number: number / 100)


@given(
    st.lists(
        st.tuples(NAME, NAME, st.integers(0, 1 << 60), st.lists(NAME.filter(lambda t: "," not in t)), PERCENT, NAME)
    )
)
def test_a_report_is_read_as_it_was_written(volumes: list[tuple[str, str, int, list[str], float | None, str]]) -> None:
    rows = []
    for group, name, size, tags, percent, origin in volumes:
        row = {**new_row(group, name, size), "lv_tags": ",".join(tags), "origin": f"[{origin}]"}
        rows.append({**row, "data_percent": "" if percent is None else f"{percent:.2f}"})
    found = lvs.parse_report(report(rows))
    assert [(v.group, v.name, v.size, v.tags, v.data_percent, v.origin) for v in found] == volumes


@given(
    st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_whatever_lvs_prints_is_a_report_or_a_typed_error(output: bytes) -> None:
    with pytest.raises(ProcessError):
        lvs.parse_report(output)


def test_a_row_without_a_column_is_refused() -> None:
    row = new_row("vg", "lv", 1)
    del row["lv_uuid"]
    with pytest.raises(ProcessError, match="'lv_uuid'"):
        lvs.parse_report(report([row]))


# what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lv_attr": "swi-a-s---", "origin": "other"}, "vg/x is itself a snapshot"),
        ({"lv_attr": "twi-aotz--", "segtype": "thin-pool"}, "vg/x is a thin pool"),
        ({"lv_attr": "Owi-aos---"}, "vg/x is being merged with a snapshot"),
        ({"lv_attr": "ewi-ao----", "lv_path": ""}, "vg/x is a part of another volume"),
        ({"lv_attr": "Cwi-a-C---", "segtype": "cache-pool"}, "vg/x is a part of another volume"),
        ({"lv_attr": "-wi-------"}, "vg/x is not active"),
        ({"lv_attr": "-wi-s-----"}, "vg/x is suspended"),
        ({"lv_attr": "rwi-a-r-p-", "segtype": "raid1"}, "a disk of vg/x is missing"),
    ],
)
def test_what_can_have_no_snapshot_is_refused(fake: FakeLvm, fields: dict[str, str], message: str) -> None:
    fake.add("vg", "x", **fields)
    with pytest.raises(SourceError, match=f"^{message}$") as caught:
        lvcheck.check(find("vg/x"), "20%")
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"lv_attr": "owi-aos---"},
        {"lv_attr": "rwi-aor---", "segtype": "raid1"},
        {"lv_attr": "Cwi-aoC---", "segtype": "cache"},
        {"lv_attr": "mwi-a-m---", "segtype": "mirror"},
        {"lv_attr": "-wi-ao----", "segtype": "striped"},
    ],
)
def test_other_kinds_are_fit_for_a_snapshot(fake: FakeLvm, fields: dict[str, str]) -> None:
    fake.add("vg", "x", **fields)
    assert lvcheck.check(find("vg/x"), "20%") == []


def test_our_own_snapshots_are_no_source(fake: FakeLvm) -> None:
    fake.add("vg", "bd_1", origin="lv", lv_tags="blockdiff", lv_attr="sri-a-s---")
    with pytest.raises(SourceError, match=r"^/dev/vg/bd_1 is itself a snapshot that blockdiff made$"):
        find("/dev/vg/bd_1")


@pytest.mark.parametrize("text", ["", "1", "30M", "512M", "20%", "99%", "1g", "100%", "7T", "300%"])
def test_sound_sizes_are_understood(fake: FakeLvm, text: str) -> None:
    origin = find("/dev/vg/lv")
    full = 104 * MIB  # cannot overflow
    expected = {"1": 4 * MIB, "30M": 32 * MIB, "20%": 20 * MIB, "99%": 100 * MIB}
    assert lvcheck.size_in_bytes(text, origin) == expected.get(text, full)


@pytest.mark.parametrize("text", ["0", "0%", "-1", "1.5G", "20 %", "G", "1E", "%", "1000000000000000000", "1M\n", "٣"])
def test_other_sizes_are_refused(fake: FakeLvm, text: str) -> None:
    origin = find("/dev/vg/lv")
    with pytest.raises(SourceError, match="is not a snapshot size") as caught:
        lvcheck.check(origin, text)
    assert caught.value.hint == "use 20%, or a number with M or G"
    with pytest.raises(SourceError, match="is not a snapshot size"):
        lvm.Snapshot(origin, text)


def test_a_group_without_room_is_named_with_what_is_needed_and_free(fake: FakeLvm) -> None:
    with fake.state() as state:
        state["groups"]["vg"] = 16 * MIB
    origin = find("/dev/vg/lv")
    with pytest.raises(
        SourceError, match=r"^no room in the volume group vg: a snapshot of vg/lv needs 20 MiB, 16 MiB are free$"
    ) as caught:
        lvcheck.check(origin, "20%")
    assert "--snapshot-size" in str(caught.value.hint)
    with pytest.raises(SourceError, match="needs 20 MiB, 16 MiB are free"):
        lvcheck.check(origin, "17M")  # LVM rounds up to extents
    assert lvcheck.check(origin, "16M") == []


@pytest.mark.parametrize(
    ("free", "note"),
    [
        (200 * MIB, "the snapshot of vg/lv gets 200 MiB, all that the volume group vg has"),
        (20 << 30, "the snapshot of vg/lv gets 10 GiB"),
    ],
)
def test_without_a_size_the_default_of_the_original_is_told(fake: FakeLvm, free: int, note: str) -> None:
    fake.set("lv", lv_size=str(50 << 30))
    with fake.state() as state:
        state["groups"]["vg"] = free
    origin = find("/dev/vg/lv")
    assert lvcheck.check(origin, "") == [note]
    with lvm.Snapshot(origin, ""):
        assert ["-L", f"{min(free, 10 << 30)}b"] == fake.calls("lvcreate")[0][-3:-1]


def test_without_a_size_a_small_volume_gets_what_cannot_overflow(fake: FakeLvm) -> None:
    assert lvcheck.check(find("/dev/vg/lv"), "") == ["the snapshot of vg/lv gets 104 MiB"]


def test_without_a_size_and_without_room_there_is_no_snapshot(fake: FakeLvm) -> None:
    with fake.state() as state:
        state["groups"]["vg"] = 0
    with pytest.raises(SourceError, match="needs 4 MiB, 0 bytes are free"):
        lvcheck.check(find("/dev/vg/lv"), "")


def test_the_snapshot_of_a_thick_volume_cannot_be_kept(fake: FakeLvm) -> None:
    with pytest.raises(SourceError, match=r"^the snapshot of vg/lv cannot be kept: it is not a thin volume$"):
        lvcheck.check(find("/dev/vg/lv"), "20%", keep=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_percent": "95.00"}, "the data of the thin pool vg/pool of vg/thin is 95% full: a snapshot could"),
        ({"metadata_percent": "99.50"}, "the metadata of the thin pool vg/pool of vg/thin is 99.5% full: a snapshot"),
        ({"lv_attr": "twi-aotzF-"}, "the thin pool vg/pool of vg/thin has failed"),
        ({"lv_attr": "twi-aotzD-"}, "the thin pool vg/pool of vg/thin is out of data space"),
        ({"lv_attr": "twi-aotzM-"}, "the thin pool vg/pool of vg/thin has read-only metadata"),
        ({"lv_attr": "twi-cotz--"}, "the thin pool vg/pool of vg/thin needs a check"),
    ],
)
def test_a_thin_pool_in_trouble_is_refused(fake: FakeLvm, fields: dict[str, str], message: str) -> None:
    fake.add_thin("vg", "thin")
    thin = find("/dev/vg/thin")
    assert lvcheck.check(thin, "20%", keep=True) == []
    fake.set("pool", **fields)
    with pytest.raises(SourceError, match=f"^{message}"):
        lvcheck.check(thin, "20%")


@pytest.mark.parametrize(
    ("pool", "metadata", "threshold", "message"),
    [
        ({"metadata_percent": "75.00"}, 16 * MIB, "100", None),
        ({"metadata_percent": "75.10"}, 16 * MIB, "100", "the metadata of .* is 75.1% full: .* above 75%"),
        ({"metadata_percent": "74.00"}, 4 * MIB, "100", None),
        ({"metadata_percent": "76.00"}, 4 * MIB, "100", "the metadata of .* is 76% full: .* above 75%"),
        ({"metadata_percent": "94.00"}, 80 * MIB, "100", None),
        ({"metadata_percent": "80.00"}, 80 * MIB, "70", "the metadata of .* is 80% full: .* above 70%"),
        ({"data_percent": "80.00"}, 80 * MIB, "70", "the data of .* is 80% full: .* above 70%"),
        ({"data_percent": "70.00"}, 80 * MIB, "70", None),
        ({"data_percent": "94.00"}, 80 * MIB, "garbage", None),
    ],
)
def test_what_lvm_would_refuse_of_a_thin_pool_is_told_before(
    fake: FakeLvm, pool: dict[str, str], metadata: int, threshold: str, message: str | None
) -> None:
    """Of the metadata, 4 MiB must be free, or a quarter where that is less; and it has a limit in its settings."""
    fake.add_thin("vg", "thin")
    fake.set("[pool_tmeta]", lv_size=str(metadata))
    fake.set("pool", **pool)
    with fake.state() as state:
        state["threshold"] = threshold
    if message is None:
        assert lvcheck.check(find("/dev/vg/thin"), "") == []
        return
    with pytest.raises(SourceError, match=f"^{message}") as caught:
        lvcheck.check(find("/dev/vg/thin"), "")
    assert "lvextend" in str(caught.value.hint)


def test_without_lvms_settings_its_own_default_holds(fake: FakeLvm) -> None:
    fake.add_thin("vg", "thin")
    fake.set("pool", data_percent="94.00")
    fake.order("lvmconfig", "fail")
    assert lvcheck.check(find("/dev/vg/thin"), "") == []


# the snapshot


def test_a_thick_snapshot_is_read_only_tagged_and_removed(fake: FakeLvm) -> None:
    origin = find("/dev/vg/lv")
    snapshot = lvm.Snapshot(origin, "20%", "blockdiff_chain_x")
    before = len(fake.calls())
    with snapshot:
        assert [call[0] for call in fake.calls()[before:]] == ["lvcreate"]  # a database is standing still
        assert snapshot.created_s > 0
        found = snapshot.look()
        named = f"blockdiff_origin_{origin.uuid}"
        assert found.tags == ["blockdiff", lvm.process_tag(os.getpid()), named, "blockdiff_chain_x"]
        assert found.name.startswith("bd_") and len(found.name) == 19
        assert snapshot.path == found.dm_path  # the other is not there
        snapshot.check()
    (call,) = fake.calls("lvcreate")
    assert call[:5] == ["-y", "-s", "-p", "r", "-n"] and call[-3:] == ["-L", f"{20 * MIB}b", "vg/lv"]
    assert fake.names() == ["lv"]
    (removal,) = fake.calls("lvremove")
    assert removal == [
        "-y",
        "-S",
        f'lv_uuid="{found.uuid}" && lv_tags={{"blockdiff"}} && lv_name=~"^bd_" && origin="lv"',
        found.full_name,
    ]


def test_a_thin_snapshot_has_no_size_and_is_active(fake: FakeLvm) -> None:
    fake.add_thin("vg", "thin")
    with lvm.Snapshot(find("/dev/vg/thin"), "20%") as snapshot:
        assert snapshot.look().is_thin
        snapshot.check()
        assert snapshot.level is None
    assert fake.calls("lvcreate")[0][-5:] == ["-k", "n", "-a", "y", "vg/thin"]
    assert "thin" in fake.names() and not [name for name in fake.names() if name.startswith("bd_")]


def test_two_snapshots_of_one_volume_do_not_touch_each_other(fake: FakeLvm) -> None:
    origin = find("/dev/vg/lv")
    with lvm.Snapshot(origin, "20%") as first:
        with lvm.Snapshot(origin, "20%") as second:
            assert lvm.abandoned(origin) == []
            assert first.look().name != second.look().name
        first.check()
        assert fake.names() == ["lv", first.look().name]


def test_a_failed_lvcreate_is_told_in_its_own_words(fake: FakeLvm) -> None:
    fake.order("lvcreate", "fail")
    with (
        pytest.raises(
            SourceError,
            match=r"^cannot make a snapshot of vg/lv: lvcreate exited with status 5: Something is wrong\.$",
        ) as caught,
        lvm.Snapshot(find("/dev/vg/lv"), "20%"),
    ):
        pass
    assert isinstance(caught.value.__cause__, ProcessError)
    assert fake.calls("lvremove") == []


def test_what_a_failed_lvcreate_left_is_removed(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "QUICK_TIMEOUT_S", 60.0)
    fake.order("lvcreate", "fail_after")
    with pytest.raises(SourceError, match="went wrong in the end"), lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        pass
    assert fake.names() == ["lv"]


def test_what_a_failed_lvcreate_left_without_an_origin_is_removed(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LVM makes the volume that is to hold what changes first, and the snapshot out of it last."""
    monkeypatch.setattr(lvm, "QUICK_TIMEOUT_S", 60.0)
    fake.order("lvcreate", "half")
    with (
        pytest.raises(SourceError, match="Manual intervention") as caught,
        lvm.Snapshot(find("/dev/vg/lv"), "20%"),
    ):
        pass
    assert caught.value.hint is None
    assert fake.names() == ["lv"]
    (removal,) = fake.calls("lvremove")
    named = f"blockdiff_origin_{fake.row('lv')['lv_uuid']}"
    assert removal[2].endswith(f' && lv_name=~"^bd_" && origin="" && lv_tags={{"{named}"}}')


def test_what_a_failed_lvcreate_left_and_cannot_be_removed_is_told(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(found: lvs.Volume, _timeout_s: "float | None") -> None:
        raise ProcessError(f"cannot remove the snapshot {found.full_name}: in use", "by hand")

    monkeypatch.setattr(lvm, "remove", refuse)
    fake.order("lvcreate", "half")
    with (
        pytest.raises(SourceError, match="Manual intervention") as caught,
        lvm.Snapshot(find("/dev/vg/lv"), "20%"),
    ):
        pass
    name = only_snapshot(fake)["lv_name"]
    assert caught.value.hint == f"cannot remove the snapshot vg/{name}: in use; by hand"


def test_an_origin_that_lvcreate_left_suspended_is_told_with_the_command_that_frees_it(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "QUICK_TIMEOUT_S", 60.0)
    origin = find("/dev/vg/lv")
    fake.order("lvcreate", "fail")
    fake.set("lv", lv_attr="owi-sos---")
    with pytest.raises(SourceError, match="Something is wrong") as caught, lvm.Snapshot(origin, "20%"):
        pass
    hint = "nothing can write to vg/lv: an LVM command was killed half-way, or is still running; if none is, "
    assert caught.value.hint == hint + "`dmsetup resume vg-lv` on the host lets writers continue"
    with pytest.raises(SourceError, match=r"^vg/lv is suspended$") as caught:
        lvcheck.check(find("/dev/vg/lv"), "20%")
    assert str(caught.value.hint).startswith(hint)


def test_all_that_lvm_said_is_told(fake: FakeLvm) -> None:
    fake.order("lvcreate", "half")
    said = r"lvcreate exited with status 5: Failed to suspend logical volume vg/lv\.; Aborting\. Manual intervention"
    with pytest.raises(SourceError, match=said), lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        pass


def test_why_there_is_no_snapshot_is_told_even_if_lvm_is_dumb_afterwards(fake: FakeLvm) -> None:
    origin = find("/dev/vg/lv")
    fake.order("lvcreate", "fail")
    fake.order("lvs", "fail")
    with pytest.raises(SourceError, match=r"^cannot make a snapshot"), lvm.Snapshot(origin, "20%"):
        pass


def test_warnings_of_lvcreate_are_no_failure(fake: FakeLvm) -> None:
    fake.order("lvcreate", "warn")
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        snapshot.look()


def test_an_lvcreate_that_lies_is_caught(fake: FakeLvm) -> None:
    fake.order("lvcreate", "lie")
    with (
        lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot,
        pytest.raises(SourceError, match=r"^lvcreate reported success, but vg/bd_[0-9a-f]{16} is not there$"),
    ):
        snapshot.look()


def test_a_snapshot_that_could_be_written_to_is_refused(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        fake.set(only_snapshot(fake)["lv_name"], lv_attr="swi-a-s---")
        with pytest.raises(SourceError, match=r"has the attributes swi-a-s---$"):
            snapshot.look()


def test_the_lock_of_another_command_ends_the_making(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "CREATE_TIMEOUT_S", 0.5)
    fake.order("lvcreate", "late")
    with (
        pytest.raises(
            SourceError,
            match=r"^cannot make a snapshot of vg/lv: lvcreate did not end within 0.5 s: another LVM command seems to "
            "hold the lock of the volume group of vg$",
        ),
        lvm.Snapshot(find("/dev/vg/lv"), "20%"),
    ):
        pass


def test_a_failed_lvcreate_is_told_though_lvm_is_dumb_afterwards(fake: FakeLvm) -> None:
    """Whoever waits for it holds a lock: it is looked once, quickly, whether it has left something."""
    with sources.VolumeSource(b"/dev/vg/lv", "20%", "owner", "", "", False) as source:
        source.prepare()
        asked = len(fake.calls("lvs"))
        fake.order("lvcreate", "fail")
        fake.order("lvs", "fail")
        with pytest.raises(SourceError, match=r"^cannot make a snapshot of vg/lv: "):
            source.take()
    assert len(fake.calls("lvs")) == asked + 1


@pytest.mark.parametrize("error", [None, ConnectionLost("gone")])
def test_a_signal_just_before_a_snapshot_is_removed_leaves_none(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch, error: "Exception | None"
) -> None:
    """Its removal was to begin, and has not."""
    close, calls = lvm.Snapshot.close, []

    def interrupted(snapshot: lvm.Snapshot, error: object = None) -> None:
        calls.append(error)
        if len(calls) == 1:
            raise Interrupted("told to stop")
        close(snapshot)

    monkeypatch.setattr(lvm.Snapshot, "close", interrupted)
    with pytest.raises(Interrupted), sources.VolumeSource(b"/dev/vg/lv", "20%", "owner", "", "", False) as source:
        source.prepare()
        source.take()
        if error is not None:
            raise error
        assert isinstance(source, sources.VolumeSource)
        source._snapshot.close()
    assert len(fake.calls("lvremove")) == 1
    assert fake.names() == ["lv"]


def test_what_went_wrong_first_is_told_though_the_snapshot_cannot_be_removed(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "REMOVE_TIMEOUT_S", 0.1)
    with (
        pytest.raises(SourceError, match=r"^it overflowed$") as caught,
        sources.VolumeSource(b"/dev/vg/lv", "20%", "owner", "", "", False) as source,
    ):
        source.prepare()
        source.take()
        fake.order("lvremove", "fail")
        raise SourceError("it overflowed", "a hint")
    assert str(caught.value.hint).startswith("a hint; cannot remove the snapshot vg/bd_")


def test_a_signal_just_after_a_snapshot_was_made_leaves_none(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lvm.Snapshot.make

    def interrupted(snapshot: lvm.Snapshot) -> None:
        make(snapshot)
        assert len(fake.names()) == 2
        raise Interrupted("told to stop")

    monkeypatch.setattr(lvm.Snapshot, "make", interrupted)
    with pytest.raises(Interrupted), sources.VolumeSource(b"/dev/vg/lv", "20%", "owner", "", "", False) as source:
        source.prepare()
        source.take()
    assert fake.names() == ["lv"]


def test_a_signal_while_lvcreate_works_leaves_no_snapshot(fake: FakeLvm) -> None:
    def handler(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        fake.go()
        raise Interrupted("told to stop")

    def interrupt() -> None:
        wait_until((fake.directory / "waiting").exists)
        processes.interrupt_main_thread(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    fake.order("lvcreate", "late")
    helper = threading.Thread(target=interrupt)
    try:
        snapshot = lvm.Snapshot(find("/dev/vg/lv"), "20%")
        helper.start()
        with pytest.raises(Interrupted), snapshot:
            pass
    finally:
        helper.join(LIMIT_S)
        signal.signal(signal.SIGUSR1, before)
    assert fake.names() == ["lv"]
    assert len(fake.calls("lvremove")) == 1  # lvcreate had come to its end


def test_an_exit_in_any_state_is_fine(fake: FakeLvm) -> None:
    origin = find("/dev/vg/lv")
    with ExitStack() as stack:
        stack.push(lvm.Snapshot(origin, "20%"))
        assert fake.calls("lvcreate") == []
    snapshot = lvm.Snapshot(origin, "20%")
    with snapshot:
        pass
    snapshot.close()
    assert fake.names() == ["lv"]


def test_a_signal_before_the_watcher_runs_leaves_no_snapshot(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_thread: threading.Thread) -> None:
        raise Interrupted("told to stop")

    snapshot = lvm.Snapshot(find("/dev/vg/lv"), "20%")
    with pytest.raises(Interrupted), snapshot:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        snapshot.watch()
    assert fake.names() == ["lv"]


# overflow, and the level


def test_an_overflow_is_told_with_the_size_that_would_have_done(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        snapshot.look()
        fake.set(only_snapshot(fake)["lv_name"], lv_attr="sri-I-s---", data_percent="100.00")
        with pytest.raises(SourceError, match=r"^the snapshot of vg/lv overflowed: 20 MiB was too small$") as caught:
            snapshot.check()
        assert caught.value.hint == "use at least --snapshot-size 40M; 102M is always enough"
    assert fake.names() == ["lv"]


def test_a_snapshot_that_somebody_removed_is_told(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        snapshot.look()
        with fake.state() as state:
            state["volumes"] = state["volumes"][:1]
        with pytest.raises(SourceError, match=r"^the snapshot of vg/lv was removed while it was read$"):
            snapshot.check()


def test_a_thin_pool_that_failed_is_told(fake: FakeLvm) -> None:
    fake.add_thin("vg", "thin")
    with lvm.Snapshot(find("/dev/vg/thin"), "20%") as snapshot:
        snapshot.look()
        fake.set(only_snapshot(fake)["lv_name"], lv_attr="Vri-a-tzF-")
        with pytest.raises(SourceError, match=r"^the thin pool vg/pool failed while a snapshot in it was read$"):
            snapshot.check()


def test_a_snapshot_that_is_full_before_it_is_looked_at_is_told_as_an_overflow(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        fake.set(only_snapshot(fake)["lv_name"], lv_attr="sri-I-s---", data_percent="100.00")
        with pytest.raises(SourceError, match=r"^the snapshot of vg/lv overflowed: 20 MiB was too small$") as c:
            snapshot.look()
    assert c.value.hint == "use at least --snapshot-size 40M; 102M is always enough"


def test_a_check_that_cannot_see_is_no_approval(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        fake.order("lvs", "fail", 1)
        with pytest.raises(SourceError, match=r"^cannot see the snapshot of vg/lv: lvs exited with status 5"):
            snapshot.check()


def test_a_snapshot_that_fills_is_extended_once_it_is_at_70_percent(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        name = only_snapshot(fake)["lv_name"]
        snapshot.watch()  # it may be long until it is looked at
        fake.set(name, data_percent="69.00")
        wait_until(lambda: snapshot.level == 69.0)
        assert fake.calls("lvextend") == []
        fake.set(name, data_percent="75.00")
        wait_until(lambda: fake.row(name)["lv_size"] != str(20 * MIB))
        assert fake.calls("lvextend") == [["-L", f"+{10 * MIB}b", f"vg/{name}"]]
        wait_until(lambda: snapshot.level == 75.0)
        snapshot.look()
        snapshot.check()
        assert snapshot.level == 75.0  # the highest, not the last
        assert snapshot.notes == []


def test_a_snapshot_that_cannot_grow_is_read_on_with_a_note(fake: FakeLvm) -> None:
    origin = find("/dev/vg/lv")
    with lvm.Snapshot(origin, "100%") as snapshot:
        with fake.state() as state:
            state["groups"]["vg"] = 0
        fake.set(snapshot.look().name, data_percent="80.00")
        snapshot.watch()
        wait_until(lambda: snapshot.notes)
        snapshot.check()
    assert snapshot.notes == [
        "the snapshot of vg/lv is 80% full and cannot be extended: no room in the volume group vg"
    ]
    assert fake.calls("lvextend") == []


def test_a_failed_extension_is_not_tried_for_ever(fake: FakeLvm) -> None:
    fake.order("lvextend", "fail")
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        fake.set(snapshot.look().name, data_percent="80.00")
        snapshot.watch()
        wait_until(lambda: snapshot.notes)
        seen = len(fake.calls("lvs"))
        wait_until(lambda: len(fake.calls("lvs")) > seen + 2)
    assert len(fake.calls("lvextend")) == 1
    assert "Something is wrong." in snapshot.notes[0]


# removal


def test_a_removal_is_tried_again_while_udev_holds_the_device(fake: FakeLvm) -> None:
    with lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        fake.order("lvremove", "fail", 3)
    assert len(fake.calls("lvremove")) == 4
    assert fake.names() == ["lv"]


@pytest.mark.parametrize(("order", "why"), [("fail", "Something is wrong"), ("lie", "lvremove reported success")])
def test_what_cannot_be_removed_is_told_with_the_command_for_it(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch, order: str, why: str
) -> None:
    monkeypatch.setattr(lvm, "REMOVE_TIMEOUT_S", 0.1)
    fake.order("lvremove", order)
    message = f"^cannot remove the snapshot vg/bd_[0-9a-f]+: .*{why}"
    with pytest.raises(ProcessError, match=message) as caught, lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        pass
    assert caught.value.hint == f"remove it by hand: lvremove -y vg/{only_snapshot(fake)['lv_name']}"


def test_a_removal_that_fails_does_not_hide_what_failed_before(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "REMOVE_TIMEOUT_S", 0.1)
    fake.order("lvremove", "fail")
    with pytest.raises(SourceError, match=r"^overflow$") as caught, lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        raise SourceError("overflow", "make it larger")
    hint = str(caught.value.hint)
    assert hint.startswith("make it larger; cannot remove the snapshot") and "by hand" in hint


def test_an_lvremove_that_fails_after_it_did_its_work_is_fine(fake: FakeLvm) -> None:
    fake.order("lvremove", "fail_after")
    with lvm.Snapshot(find("/dev/vg/lv"), "20%"):
        pass
    assert len(fake.calls("lvremove")) == 1


def test_lvs_that_fails_is_no_proof_that_the_snapshot_is_gone(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "WATCH_INTERVAL_S", 600.0)  # the watcher's lvs would be the one that fails
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        found = snapshot.look()
        fake.order("lvremove", "fail", 1)
        fake.order("lvs", "fail", 1)
        lvm.remove(found)
        assert len(fake.calls("lvremove")) == 2


@pytest.mark.parametrize("change", [{"lv_uuid": "other"}, {"lv_tags": "mine"}, {"origin": ""}, {"origin": "other"}])
def test_what_is_not_our_snapshot_any_more_is_never_removed(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    """Between our look and lvremove anything may happen: LVM itself holds what we know against what is there."""
    monkeypatch.setattr(lvm, "REMOVE_TIMEOUT_S", 0.1)
    with lvm.Snapshot(find("/dev/vg/lv"), "20%") as snapshot:
        found = snapshot.look()
        before = fake.row(found.name)
        fake.set(found.name, **change)
        try:
            lvm.remove(found)
        except ProcessError as error:
            assert "lvremove reported success" in error.message
        assert fake.calls("lvremove")
        assert found.name in fake.names()
        fake.set(found.name, **before)


def test_a_kept_snapshot_stays_and_the_sweep_leaves_it(fake: FakeLvm) -> None:
    fake.add_thin("vg", "thin")
    origin = find("/dev/vg/thin")
    with lvm.Snapshot(origin, "", "blockdiff_chain_x") as snapshot:
        snapshot.look()
        snapshot.keep()
    tags = only_snapshot(fake)["lv_tags"]
    assert tags == f"blockdiff,blockdiff_origin_{origin.uuid},blockdiff_chain_x,blockdiff_kept"
    assert lvm.abandoned(origin) == []
    assert only_snapshot(fake)


def test_a_snapshot_that_could_not_be_kept_is_removed(fake: FakeLvm) -> None:
    fake.add_thin("vg", "thin")
    fake.order("lvchange", "fail")
    with (
        pytest.raises(ProcessError, match="lvchange exited"),
        lvm.Snapshot(find("/dev/vg/thin"), "") as snapshot,
    ):
        snapshot.keep()
    assert not [name for name in fake.names() if name.startswith("bd_")]


# the sweep


REMOVED, LEFT = "removed the snapshot", ", which an earlier run left"


def swept(origin: lvs.Volume) -> list[str]:
    return lvm.sweep(lvm.abandoned(origin))


def test_only_what_dead_agents_left_of_this_origin_is_swept(fake: FakeLvm, ended_pid: int) -> None:
    dead = f"blockdiff,blockdiff_pid_{ended_pid}_12345_0123456789ab"
    ours = {"origin": "lv", "lv_attr": "sri-a-s---"}
    of_lv, gone = f"blockdiff_origin_{fake.row('lv')['lv_uuid']}", ("bd_dead1", "bd_dead2", "bd_rebooted", "bd_begun")
    of_other = f"blockdiff_origin_{fake.add('vg', 'other')['lv_uuid']}"
    fake.add("vg", "bd_dead1", lv_tags=dead, **ours)
    fake.add("vg", "bd_dead2", lv_tags=f"{dead},blockdiff_chain_x", **ours)
    fake.add("vg", "bd_rebooted", lv_tags=f"blockdiff,{lvm.process_tag(os.getpid())[:-12]}000000000000", **ours)
    fake.add("vg", "bd_begun", lv_tags=f"{dead},{of_lv}")  # lvcreate came no further
    kept = [
        fake.add("vg", "bd_making", lv_tags=f"blockdiff,{lvm.process_tag(os.getpid())},{of_lv}"),
        fake.add("vg", "begun", lv_tags=f"{dead},{of_lv}"),
        fake.add("vg", "bd_of_theirs", lv_tags=f"{of_lv},{dead.partition(',')[2]}"),
        fake.add("vg", "bd_begun_other", lv_tags=f"{dead},{of_other}"),
        fake.add("vg", "bd_of_both", lv_tags=f"{dead},{of_lv},{of_other}"),
        fake.add("vg", "bd_concurrent", lv_tags=f"blockdiff,{lvm.process_tag(os.getpid())}", **ours),
        fake.add("vg", "bd_x", **ours),
        fake.add("vg", "bd_foreign", lv_tags="theirs", **ours),
        fake.add("vg", "bd_unknown", lv_tags="blockdiff", **ours),
        fake.add("vg", "bd_strange", lv_tags="blockdiff,blockdiff_pid_1x_2_3", **ours),
        fake.add("vg", "nightly", lv_tags=dead, **ours),
        fake.add("vg", "bd_volume", lv_tags=dead),
        fake.add("vg", "bd_other", lv_tags=dead, origin="other", lv_attr="sri-a-s---"),
    ]
    assert swept(find("/dev/vg/lv")) == [f"{REMOVED} vg/{name}{LEFT}" for name in gone]
    assert fake.names() == ["lv", "other", *(row["lv_name"] for row in kept)]


def test_a_sweep_that_two_runs_do_at_once_is_fine(fake: FakeLvm, ended_pid: int) -> None:
    tags = f"blockdiff,blockdiff_pid_{ended_pid}_12345_0123456789ab"
    row = fake.add("vg", "bd_dead", lv_tags=tags, origin="lv", lv_attr="sri-a-s---")
    (found,) = lvs.volumes("vg", f'lv_uuid="{row["lv_uuid"]}"')
    lvm.remove(found)
    lvm.remove(found)
    assert fake.names() == ["lv"]


def test_the_tag_of_a_process_is_that_of_no_other() -> None:
    own = lvm.process_tag(os.getpid())
    assert own == lvm.process_tag(os.getpid())
    assert own.startswith(f"blockdiff_pid_{os.getpid()}_")
    assert set(own) <= set("abcdefghijklmnopqrstuvwxyz_0123456789")  # what LVM takes in a tag
    with subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE) as child:
        alive = lvm.process_tag(child.pid)
        assert alive.split("_")[3] != "0"
        child.kill()
        wait_until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert lvm.process_tag(child.pid) != alive  # dead, though nobody has waited for it yet
