"""`blockdiff snapshots`: what runs have left on a host, and its removal, on a stand-in for LVM."""

import json
import os
import socket
from pathlib import Path

import pytest

from blockdiff import lvm
from blockdiff.cli.output import shown_time
from blockdiff.host import leftovers
from blockdiff.session import rules, snapshots
from blockdiff.session.rules import Left
from blockdiff.shared.errors import ProtocolError
from tests import chains, commands
from tests.chains import SmallChain
from tests.fake_lvm import FakeLvm, Row, new_uuid

MIB = 1 << 20
DEAD = "blockdiff_pid_1_1_0123456789ab"
KEPT = "blockdiff_kept"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    """A host with a thin volume ``vg/thin``, and snapshots that are none of ours."""
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("vg", 200 * MIB)
    fake.add_group("other", 0)
    fake.add("vg", "lv")
    fake.add_thin("vg", "thin")
    thin = fake.row("thin")
    theirs = {"origin": "thin", "origin_uuid": thin["lv_uuid"]}
    fake.add_thin("vg", "bd_theirs", lv_tags=f"theirs,{KEPT}", **theirs)
    fake.add_thin("vg", "bd_unknown", lv_tags="blockdiff", **theirs)
    fake.add_thin("vg", "theirs", lv_tags=f"blockdiff,{KEPT}", **theirs)
    fake.add("vg", "bd_volume", lv_tags=f"blockdiff,{KEPT}")
    monkeypatch.setattr(commands, "PATH", f"{fake.commands}:{commands.PATH}")
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    return fake


def ours(fake: FakeLvm, name: str, *tags: str, origin: str = "thin", **fields: str) -> Row:
    """Add a snapshot that runs have made."""
    uuid = fake.row(origin)["lv_uuid"] if origin else new_uuid()
    all_tags = ",".join(("blockdiff", f"blockdiff_origin_{uuid}", *tags))
    known = {"origin": origin, "origin_uuid": uuid if origin else "", "lv_tags": all_tags, "lv_attr": "Vri-a-tz--"}
    return fake.add_thin("vg", name, **{**known, **fields})


def listed(*words: str) -> dict[str, dict[str, object]]:
    answer = json.loads(commands.done("blockdiff", "snapshots", "--json", *words))
    return {snapshot["name"]: snapshot for snapshot in answer["snapshots"]}


def place(chain: SmallChain) -> str:
    return f"{socket.gethostname()}:{chain.name}"


def tag(chain: SmallChain) -> str:
    return leftovers.chain_tag(place(chain))


def test_a_host_without_any_has_nothing_to_say(fake: FakeLvm) -> None:
    assert commands.done("blockdiff", "snapshots") == b""
    assert listed() == {}


def test_each_is_listed_with_why_it_is_there(fake: FakeLvm, short_tmp_path: Path) -> None:
    chain = chains.new_chain(short_tmp_path)
    chain.add(b"image")
    gone = SmallChain(chain.directory, chain.source, "gone")
    ours(fake, "bd_kept", KEPT, tag(chain))
    ours(fake, "bd_gone", KEPT, tag(chain), origin="")
    ours(fake, "bd_no_chain", KEPT, tag(gone))
    ours(fake, "bd_elsewhere", KEPT, "blockdiff_chain_another:/var/backup/x")
    ours(fake, "bd_old", KEPT)
    ours(fake, "bd_dead", DEAD, lv_attr="Vri-aotz--")
    ours(fake, "bd_running", lvm.process_tag(os.getpid()), lv_attr="Vri-aotz--")
    fake.add("vg", "bd_begun", lv_tags=f"blockdiff,blockdiff_origin_{fake.row('lv')['lv_uuid']},{DEAD}")
    found = listed()
    states = {name.partition("/")[2]: (each["volume"], each["state"], each["useless"]) for name, each in found.items()}
    assert states == {
        "bd_kept": ("vg/thin", "kept", False),
        "bd_gone": (None, "kept", True),
        "bd_no_chain": ("vg/thin", "kept", True),
        "bd_elsewhere": ("vg/thin", "kept", False),
        "bd_old": ("vg/thin", "kept", False),
        "bd_dead": ("vg/thin", "dead", False),
        "bd_running": ("vg/thin", "running", False),
        "bd_begun": ("vg/lv", "dead", False),
    }
    assert (found["vg/bd_kept"]["chain"], found["vg/bd_kept"]["size"]) == (place(chain), 100 * MIB)
    assert found["vg/bd_kept"]["made"] == "2026-11-01T03:05:00+00:00"
    lines = commands.done("blockdiff", "snapshots").decode().splitlines()
    assert lines[0].split() == ["snapshot", "volume", "size", "made", "chain", "why", "it", "exists"]
    ends = {
        "vg/bd_kept": "kept for the next run",
        "vg/bd_gone": "its volume no longer exists",
        "vg/bd_no_chain": "its chain no longer exists",
        "vg/bd_dead": "its run died; the next one removes it; it is open",
        "vg/bd_running": "a run is using it",
    }
    for name, end in ends.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.endswith(f"  {end}") and shown_time("2026-11-01T03:05:00+00:00") in line


def test_those_that_are_named_are_removed_and_no_others(fake: FakeLvm) -> None:
    for name in ("bd_1", "bd_2", "bd_3"):
        ours(fake, name, KEPT)
    ours(fake, "bd_gone", KEPT, origin="")
    before = fake.names()
    said = commands.done("blockdiff", "snapshots", "--remove", "vg/bd_2", "--remove", "vg/bd_gone")
    assert said == b"removed vg/bd_2\nremoved vg/bd_gone\n"
    assert fake.names() == [name for name in before if name not in ("bd_2", "bd_gone")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vg/thin", "vg/thin is not a snapshot that blockdiff made"),
        ("vg/bd_theirs", "vg/bd_theirs is not a snapshot that blockdiff made"),
        ("vg/bd_unknown", "vg/bd_unknown is not a snapshot that blockdiff made"),
        ("vg/theirs", "vg/theirs is not a snapshot that blockdiff made"),
        ("vg/bd_volume", "vg/bd_volume is not a snapshot that blockdiff made"),
        ("vg/nothing", "vg/nothing is not a snapshot that blockdiff made"),
        ("bd_kept", "bd_kept is not a snapshot that blockdiff made"),
        ("vg/bd_running", "a run is using the snapshot vg/bd_running"),
    ],
)
def test_what_is_not_ours_or_in_use_is_refused_and_nothing_is_removed(fake: FakeLvm, name: str, words: str) -> None:
    ours(fake, "bd_kept", KEPT)
    ours(fake, "bd_running", lvm.process_tag(os.getpid()))
    before = fake.names()
    result = commands.run("blockdiff", "snapshots", "--remove", "vg/bd_kept", "--remove", name)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith(f"blockdiff: localhost: {words}\n  ")
    assert b"nothing was removed" in result.stderr
    assert fake.names() == before and fake.calls("lvremove") == []


def test_what_cannot_be_removed_is_told_beside_what_was(fake: FakeLvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "REMOVE_TIMEOUT_S", 0.0)  # it is tried once, however fast that is
    ours(fake, "bd_1", KEPT)
    ours(fake, "bd_2", KEPT)
    fake.order("lvremove", "lie", 1)
    removed, (failure,) = leftovers.remove(["vg/bd_1", "vg/bd_2"])
    assert removed == ["vg/bd_2"]
    assert failure.startswith("cannot remove the snapshot vg/bd_1: ") and failure.endswith("lvremove -y vg/bd_1")


def test_a_host_without_lvm_says_so(tmp_path: Path) -> None:
    lacking = {"SSH_BLOCKDIFF_PREFIX": f"env PATH={tmp_path}"}
    result = commands.run("blockdiff", "snapshots", env=lacking)
    if Path("/usr/sbin/lvs").exists() or Path("/sbin/lvs").exists():
        assert result.returncode in (0, 1)
        return
    assert result.returncode == 1
    assert (
        result.stderr == b"blockdiff: localhost: LVM is not installed there\n  install the package lvm2 on the host\n"
    )


def test_a_time_in_another_form_is_no_time(fake: FakeLvm) -> None:
    """LVM's settings say how it writes them."""
    ours(fake, "bd_kept", KEPT, lv_time="Sun Nov  1 03:05:00 2026")
    assert listed()["vg/bd_kept"]["made"] is None
    assert b"  -  " in commands.done("blockdiff", "snapshots")


def left(chain: str | None, volume: str | None = "vg/thin", state: str = "kept") -> Left:
    return Left("vg/bd_1", volume, chain, state, False, MIB, None)


def test_a_chain_is_gone_only_where_this_machine_can_tell(tmp_path: Path) -> None:
    here = socket.gethostname()
    (tmp_path / "web_1-202611.1.json").touch()
    assert not snapshots.chain_is_gone(left(f"{here}:{tmp_path}/web_1"))  # of each month; "_" may have been anything
    assert snapshots.chain_is_gone(left(f"{here}:{tmp_path}/web_2"))
    assert not snapshots.chain_is_gone(left(f"elsewhere:{tmp_path}/web_2"))
    assert not snapshots.chain_is_gone(left(f"{here}:{tmp_path}/not-mounted/web_2"))
    for unknown in (None, here, f"{here}:", f"{here}:relative", "-cut/off"):
        assert not snapshots.chain_is_gone(left(unknown))


def test_only_what_no_run_looks_at_is_useless(tmp_path: Path) -> None:
    gone = f"{socket.gethostname()}:{tmp_path}/gone"
    assert [snapshots.is_useless(left(gone, state=state)) for state in ("kept", "dead", "running")] == [
        *(True, True, False)
    ]
    assert snapshots.is_useless(left(None, None)) and not snapshots.is_useless(left(None))


def test_the_owner_is_the_same_for_each_month() -> None:
    first, second = (snapshots.owner(f"/var/backup/web{suffix}", suffix) for suffix in ("-202611", "-202612"))
    assert first == second and first[1] == f"{socket.gethostname()}:/var/backup/web"
    assert snapshots.owner("/var/backup/web-202611", "")[0] != first[0]


@pytest.mark.parametrize("chain", ["backup1:/var/backup/db 00,ä\udcff", "b:/" + "x" * 300, "b:/\n"])
def test_the_tag_for_people_is_what_lvm_takes(chain: str) -> None:
    made = leftovers.chain_tag(chain)
    assert len(made) <= 120 and made.startswith("blockdiff_chain_")
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-/=!:#&")


GOOD = {"name": "vg/bd_1", "origin": "", "chain": "", "state": "kept", "open": False, "size": 1, "made": ""}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"snapshots": "x"},
        {"snapshots": ["x"]},
        {"snapshots": [{**GOOD, "state": "strange"}]},
        {"snapshots": [{**GOOD, "size": -1}]},
        {"snapshots": [{**GOOD, "name": None}]},
        {"snapshots": [GOOD], "removed": 5},
        {"snapshots": [GOOD], "removed": [], "failures": [5]},
    ],
)
def test_an_answer_that_breaks_the_rules_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        rules.check_leftovers(fields)


@pytest.mark.parametrize("left", ["x", ["x"], [{**GOOD, "state": ""}], {}, None])
def test_a_run_is_not_told_nonsense_of_snapshots(left: object) -> None:
    ready: dict[str, object] = {"sources": [], "directories": [], "notes": []}
    assert rules.check_ready(ready, 0, 0).left == ()
    with pytest.raises(ProtocolError):
        rules.check_ready({**ready, "left": left}, 0, 0)


def test_what_a_host_says_of_its_snapshots_is_printable() -> None:
    answer = {"snapshots": [{**GOOD, "name": "\x1b]0;x\x07"}], "removed": ["\r"], "failures": ["\x1b"]}
    found = rules.check_leftovers(answer)
    assert (found.found[0].name, found.removed, found.failures) == ("\\x1b]0;x\\x07", ("\\r",), ("\\x1b",))
