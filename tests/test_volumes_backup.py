"""`blockdiff backup --lvm` on a stand-in for LVM: what a run makes, and that it leaves no snapshot however it ends."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from blockdiff import backup, lvm
from blockdiff.backup import Options, Result, VolumeOptions
from blockdiff.chain.commit import LockedChain
from blockdiff.host import leftovers, lvs, sources
from blockdiff.progress import Progress
from blockdiff.shared.errors import BlockdiffError, BusyError, ChainError, ProcessError, SourceError, TransportError
from blockdiff.transport import bundle
from blockdiff.transport.address import Address
from tests import chains, commands, processes
from tests.chains import SmallChain
from tests.descriptors import all_closed
from tests.fake_lvm import FakeLvm

LIMIT_S = 30.0
MIB = 1 << 20
#: More than what fits into the pipes between agent and server: the agent waits while the server does.
IMAGE = random.Random(1).randbytes(6 * MIB)
LVM = Options(volumes=VolumeOptions())


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No process and no descriptor outlives the test; yields the mark by which processes are known."""
    with all_closed(), processes.leaving_none(monkeypatch) as mark:
        yield mark


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLvm]:
    """A host with the group vg and 200 MiB free in it."""
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("vg", 200 * MIB)
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "PATH", f"{fake.commands}:{commands.PATH}")
    yield fake
    fake.go()


@pytest.fixture
def chain(tmp_path: Path, fake: FakeLvm) -> SmallChain:
    """A chain of the volume vg/lv."""
    chain = chains.new_chain(tmp_path)
    chain.source = fake.add_file("vg", "lv", IMAGE)
    return chain


class At(Progress):
    """Does something as soon as the server has heard of the first (or a later) source, before it reads of it."""

    def __init__(self, do: Callable[[], object], source: int = 1) -> None:
        self._do = do
        self._left = source

    def begin(self, total: int | None) -> None:
        self._left -= 1
        if not self._left:
            self._do()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def failed(chain: SmallChain, options: Options = LVM, progress: Progress | None = None) -> BlockdiffError:
    """Return why a run fails; the chain is as it was."""
    before = chain.files()
    with pytest.raises(BlockdiffError) as caught:
        chain.add(None, options, progress)
    assert chain.files() == before
    return caught.value


# --- what a run makes


def test_a_volume_is_read_through_a_snapshot_of_its_moment(chain: SmallChain, fake: FakeLvm) -> None:
    written = At(lambda: chain.source.write_bytes(bytes(len(IMAGE))))
    uuid = fake.row("lv")["lv_uuid"]
    result = backup.backup(chain.name, Address(None, str(chain.source)), LVM, written)
    assert chain.restored(1) == IMAGE
    made = result.manifest
    assert (made.consistency, made.source.volume, made.source.path) == ("snapshot", uuid, str(chain.source))
    assert made.snapshot is not None and made.quiesced is None and made.database is None and made.run is None
    assert (made.snapshot.kind, made.snapshot.kept, made.snapshot.extents) == ("thick", False, None)
    assert re.fullmatch(r"\w{6}(-\w{4}){5}-\w{6}", made.snapshot.uuid) and made.snapshot.uuid != uuid
    assert 0 < made.snapshot.took_s < LIMIT_S
    assert result.warnings == []
    assert fake.names() == ["lv"] and fake.snapshots() == []


def test_the_next_run_is_incremental(chain: SmallChain) -> None:
    chain.add(None, LVM)
    chain.add(IMAGE[:-100] + bytes(100), LVM)
    assert chain.last() == 2
    assert chain.file(".2.gz").stat().st_size < MIB
    chain.assert_sound()


def test_the_snapshot_has_the_size_that_was_asked_for(chain: SmallChain, fake: FakeLvm) -> None:
    chain.add(None, Options(volumes=VolumeOptions(snapshot_size="8M")))
    (call,) = fake.calls("lvcreate")
    assert call[call.index("-L") + 1] == f"{8 * MIB}b"


def test_the_command_does_it_and_is_silent(chain: SmallChain, fake: FakeLvm) -> None:
    commands.done("blockdiff", "backup", chain.name, chain.source, "--lvm")
    (entry,) = json.loads(commands.done("blockdiff", "list", "--json", chain.name))
    assert entry["consistency"] == "snapshot" and entry["snapshot"]["kind"] == "thick"
    assert chain.restored(1) == IMAGE and fake.snapshots() == []


def test_a_volume_of_the_same_name_is_another(chain: SmallChain, fake: FakeLvm) -> None:
    old = fake.row("lv")["lv_uuid"]
    chain.add(None, LVM)
    fake.set("lv", lv_uuid="new")
    error = failed(chain)
    assert type(error) is ChainError
    assert f"the LV UUID {old}, this one has new" in error.message and "--full" in str(error.hint)
    assert fake.calls("lvcreate")[1:] == []
    made = chain.add(None, Options(volumes=VolumeOptions(), full=True)).manifest
    assert made.full and made.source.volume == "new"
    chain.assert_sound()


def test_the_same_volume_under_another_path_goes_on(chain: SmallChain, fake: FakeLvm) -> None:
    chain.add(None, LVM)
    fake.set("lv", lv_name="renamed")
    result = commands.run("blockdiff", "backup", chain.name, "/dev/mapper/vg-lv", "--lvm")
    assert (result.returncode, result.stderr.count(b"under another path: its LV UUID is the same")) == (0, 1)
    made = json.loads(commands.done("blockdiff", "list", "--json", f"{chain.name}@2"))[0]
    assert (made["full"], made["changed"]) == (False, 0)
    assert [chain.restored(number) for number in (1, 2)] == [IMAGE, IMAGE]
    chain.add(None, LVM)  # and back
    assert chain.last() == 3


def test_another_volume_at_another_path_is_refused_before_anything_is_made(chain: SmallChain, fake: FakeLvm) -> None:
    chain.add(None, LVM)
    other = fake.add_file("vg", "other", IMAGE)
    before = chain.files()
    result = commands.run("blockdiff", "backup", chain.name, other, "--lvm")
    assert result.returncode == 1
    assert f"{chain.name} holds backups of {chain.source}, not of {other}" in result.stderr.decode()
    assert chain.files() == before and len(fake.calls("lvcreate")) == 1


# --- commands around it


def test_before_and_after_run_around_the_snapshot(chain: SmallChain, fake: FakeLvm, tmp_path: Path) -> None:
    count = f"grep -c lvcreate '{fake.directory}/calls' >> '{tmp_path}/log'; true"
    made = chain.add(None, Options(volumes=VolumeOptions(), before=count, after=count)).manifest
    assert (tmp_path / "log").read_text().split() == ["0", "1"]
    assert made.consistency == "quiesced"
    assert made.quiesced is not None and made.snapshot is not None
    assert (made.quiesced.by, made.quiesced.statements, made.quiesced.waited_s) == ("freeze", [], None)
    assert made.quiesced.held_s == pytest.approx(made.snapshot.took_s, abs=0.001)


@pytest.mark.parametrize("options", [replace(LVM, before="exit 3"), replace(LVM, after="exit 3")])
def test_a_command_that_fails_fails_the_run(chain: SmallChain, fake: FakeLvm, options: Options) -> None:
    option = "--before" if options.before else "--after"
    assert failed(chain, options).message.startswith(f"localhost: the command of {option} failed: ")
    assert fake.snapshots() == [] and fake.names() == ["lv"]


def test_what_after_leaves_running_is_neither_waited_for_nor_ended(chain: SmallChain, tmp_path: Path) -> None:
    later = f"until [ -e '{tmp_path}/go' ]; do sleep 0.01; done; echo more; touch '{tmp_path}/done'"
    try:
        commands.done("blockdiff", "backup", chain.name, chain.source, "--lvm", "--after", f"({later}) & echo begun")
        assert not (tmp_path / "done").exists()
    finally:
        (tmp_path / "go").touch()
    chain.images[1] = IMAGE
    chain.assert_sound()


@pytest.mark.parametrize("behaviour", ["fail", "fail_after"])
def test_after_runs_where_the_snapshot_cannot_be_made(
    chain: SmallChain, fake: FakeLvm, tmp_path: Path, behaviour: str
) -> None:
    fake.order("lvcreate", behaviour)
    options = replace(LVM, before=f"echo before >> '{tmp_path}/log'", after=f"echo after >> '{tmp_path}/log'")
    error = failed(chain, options)
    assert error.message.startswith(
        "localhost: cannot make a snapshot of vg/lv: lvcreate exited with status 5: Somethin"
    )
    assert (tmp_path / "log").read_text().split() == ["before", "after"]
    assert fake.snapshots() == []


# --- failures


def test_a_snapshot_that_cannot_be_made_is_a_failed_run(chain: SmallChain, fake: FakeLvm) -> None:
    fake.order("lvcreate", "fail")
    result = commands.run("blockdiff", "backup", chain.name, chain.source, "--lvm")
    assert result.returncode == 1
    said = "cannot make a snapshot of vg/lv: lvcreate exited with status 5: Something is wrong."
    assert result.stderr.decode() == f"blockdiff: localhost: {said}\n"
    assert chain.files() == {} and fake.snapshots() == []


def test_no_room_is_told_before_anything_is_made(chain: SmallChain, fake: FakeLvm) -> None:
    fake.add_group("vg", 0)
    error = failed(chain, replace(LVM, before="exit 9"))
    assert error.message.startswith("localhost: no room in the volume group vg: ")
    assert fake.calls("lvcreate") == []


def test_a_source_that_is_no_volume_is_a_failed_run(tmp_path: Path, fake: FakeLvm) -> None:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(b"content")
    said = "source is not a logical volume: lvs exited with status 5" if os.geteuid() == 0 else "only root"
    assert said in failed(chain).message


def test_a_snapshot_that_cannot_be_read_to_its_end_is_a_failed_run(chain: SmallChain, fake: FakeLvm) -> None:
    def shrink() -> None:
        (name,) = fake.snapshots()
        os.truncate(fake.directory / "vg" / name, MIB)

    chain.source.write_bytes(IMAGE * 8)  # more than the agent reads ahead
    error = failed(chain, progress=At(shrink))
    assert re.search(rf"^localhost: .*bd_\w+ shrank from {48 * MIB} to {MIB} bytes", error.message)
    assert fake.snapshots() == []


def test_a_snapshot_that_overflows_is_a_failed_run_and_its_room_is_given_back(chain: SmallChain, fake: FakeLvm) -> None:
    chain.add(None, LVM)

    def overflow() -> None:
        fake.set(fake.snapshots()[0], lv_snapshot_invalid="snapshot invalid", data_percent="100.00")

    error = failed(chain, progress=At(overflow))
    assert type(error) is SourceError
    assert error.message == "localhost: the snapshot of vg/lv overflowed: 4 MiB was too small"
    assert "--snapshot-size" in str(error.hint)
    assert fake.snapshots() == []
    chain.assert_sound()


def test_a_snapshot_that_somebody_removes_is_a_failed_run(chain: SmallChain, fake: FakeLvm) -> None:
    def remove() -> None:
        with fake.state() as state:
            state["volumes"] = [row for row in state["volumes"] if row["lv_name"] == "lv"]
        for path in (fake.directory / "vg").glob("bd_*"):
            path.unlink()

    assert (
        failed(chain, progress=At(remove)).message == "localhost: the snapshot of vg/lv was removed while it was read"
    )


def test_the_highest_fill_level_is_recorded(chain: SmallChain, fake: FakeLvm) -> None:
    made = chain.add(None, LVM, At(lambda: fake.set(fake.snapshots()[0], data_percent="41.50"))).manifest
    assert made.snapshot is not None and made.snapshot.fill_percent == 41.5


def test_a_snapshot_that_cannot_be_removed_is_a_warning(
    chain: SmallChain, fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bundle._source
    short = {"lvm": ("REMOVE_TIMEOUT_S = 30.0", "REMOVE_TIMEOUT_S = 0.1")}
    monkeypatch.setattr(bundle, "_source", lambda name: real(name).replace(*short.get(name, ("", ""))))
    bundle._archive.cache_clear()
    try:
        fake.order("lvremove", "fail")
        result = chain.add(None, LVM)
    finally:
        bundle._archive.cache_clear()
    (name,) = fake.snapshots()
    (warning,) = result.warnings
    assert f"a snapshot of {chain.source} is left on the host: cannot remove the snapshot vg/{name}: " in warning
    assert f"lvremove -y vg/{name}" in warning
    assert chain.restored(1) == IMAGE
    fake.order("lvremove", "", 0)
    assert chain.add(None, LVM).manifest.notes == [f"removed the snapshot vg/{name}, which an earlier run left"]
    assert fake.snapshots() == []


# --- ends from outside


def started(chain: SmallChain, *more: str) -> "AbstractContextManager[subprocess.Popen[bytes]]":
    return commands.started("blockdiff", "backup", chain.name, chain.source, "--lvm", *more)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["late", "late_after"])
def test_a_server_that_ends_while_the_snapshot_is_made_leaves_none(
    chain: SmallChain, fake: FakeLvm, number: signal.Signals, stage: str, mark: str, tmp_path: Path
) -> None:
    """`lvcreate` is never killed; what it makes all the same is removed."""
    fake.order("lvcreate", stage)
    with started(chain, "--after", f"echo after >> '{tmp_path}/log'") as child:
        wait_until((fake.directory / "waiting").exists)
        child.send_signal(number)
        fake.go()
        child.wait(LIMIT_S)
        processes.wait_until_gone(mark)
    assert fake.snapshots() == [] and len(fake.calls("lvcreate")) == 1
    assert (tmp_path / "log").read_text() == "after\n"
    assert "disk.1.json" not in chain.files()
    chain.add(None, LVM)
    chain.assert_sound()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_while_it_reads_leaves_no_snapshot(
    chain: SmallChain, fake: FakeLvm, number: signal.Signals, mark: str
) -> None:
    with started(chain, "--bwlimit", "100K") as child:
        wait_until((chain.directory / ".disk.1.gz.tmp").exists)
        assert len(fake.snapshots()) == 1
        child.send_signal(number)
        child.wait(LIMIT_S)
        processes.wait_until_gone(mark)
    assert fake.snapshots() == []
    chain.add(None, LVM)
    chain.assert_sound()


def test_what_a_killed_agent_left_is_removed_by_the_next_run(chain: SmallChain, fake: FakeLvm, mark: str) -> None:
    def kill() -> None:
        (agent,) = [pid for pid, command in processes.marked(mark).items() if "blockdiff-agent" in command]
        os.kill(agent, signal.SIGKILL)

    fake.add("vg", "bd_foreign", origin="lv", lv_tags="somebody")
    assert type(failed(chain, progress=At(kill))) is TransportError
    (left,) = [name for name in fake.snapshots() if name != "bd_foreign"]
    made = chain.add(None, LVM).manifest
    assert made.notes == [f"removed the snapshot vg/{left}, which an earlier run left"]
    assert fake.snapshots() == ["bd_foreign"]
    chain.assert_sound()


def test_what_somebody_holds_open_of_a_dead_run_does_not_fail_the_next(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "SWEEP_TIMEOUT_S", 0.1)
    fake.add("vg", "lv")
    dead = "blockdiff,blockdiff_pid_1_1_0123456789ab"
    fake.add("vg", "bd_held", lv_tags=dead, origin="lv", lv_attr="sri-aos---")
    fake.order("lvremove", "fail")
    with sources.VolumeSource(b"/dev/vg/lv", "20%", "owner", "", "", False) as source:
        source.prepare()
        (note,) = source.notes
    assert note.startswith("an earlier run left a snapshot: cannot remove the snapshot vg/bd_held: ")
    assert note.endswith(
        "`fuser -vm /dev/mapper/vg-bd_held` on the host shows who has it open; then "
        "remove it by hand: lvremove -y vg/bd_held"
    )


def test_a_lock_that_is_in_the_way_of_the_sweep_is_told_before_writers_are_held(
    fake: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("vg", "bd_dead", lv_tags="blockdiff,blockdiff_pid_1_1_0123456789ab", origin="lv", lv_attr="sri-a-s---")
    (dead,) = lvs.volumes("vg", 'lv_name="bd_dead"')
    monkeypatch.setattr(lvm, "SWEEP_TIMEOUT_S", 0.0)
    monkeypatch.setattr(lvs, "COMMAND_TIMEOUT_S", 0.5)
    monkeypatch.setattr(lvs, "volumes", lambda *_: [dead])
    fake.order("lvremove", "late")
    with pytest.raises(ProcessError, match="another LVM command seems to hold the lock"):
        lvm.sweep([dead])


def test_kept_snapshots_that_no_run_will_look_at_are_told_with_what_removes_them(
    short_tmp_path: Path, fake: FakeLvm
) -> None:
    chain = chains.new_chain(short_tmp_path)
    chain.source = fake.add_file("vg", "lv", IMAGE)
    ours = "blockdiff,blockdiff_kept"
    nobody = leftovers.chain_tag(f"{socket.gethostname()}:{chain.name}-gone")
    fake.add_thin("vg", "bd_orphan", lv_tags=f"{ours},blockdiff_origin_gone", thin_id="7")
    fake.add_thin("vg", "bd_nobodys", lv_tags=f"{ours},{nobody}", thin_id="8", origin="lv", lv_attr="Vri-a-tz--")
    fake.add_thin("vg", "bd_theirs", lv_tags=ours, thin_id="9")
    before = fake.names()
    words = ("blockdiff", "backup", chain.name, chain.source, "--lvm")
    result = commands.run(*words)
    said, removal, opened = "is still on the host, although its", "`blockdiff snapshots --remove vg/", "it is open"
    gone = "no longer exists"
    assert result.returncode == 0
    assert result.stderr.decode().splitlines() == [
        f"blockdiff: note: the snapshot vg/bd_orphan {said} volume {gone}; {opened}: {removal}bd_orphan` removes it",
        f"blockdiff: note: the snapshot vg/bd_nobodys {said} chain {gone}: {removal}bd_nobodys` removes it",
    ]
    assert fake.names() == before
    commands.done("blockdiff", "snapshots", "--remove", "vg/bd_orphan", "--remove", "vg/bd_nobodys")
    commands.done(*words)


def test_a_snapshot_says_for_whom_and_of_what_it_is(chain: SmallChain, fake: FakeLvm) -> None:
    tags: list[str] = []
    chain.add(None, LVM, At(lambda: tags.extend(fake.row(fake.snapshots()[0])["lv_tags"].split(","))))
    assert leftovers.chain_tag(f"{socket.gethostname()}:{chain.name}") in tags
    assert f"blockdiff_origin_{fake.row('lv')['lv_uuid']}" in tags


# --- several volumes at one moment


@pytest.fixture
def second(tmp_path: Path, fake: FakeLvm, chain: SmallChain) -> SmallChain:
    """A chain of another volume of the host, beside the first."""
    return SmallChain(chain.directory, fake.add_file("vg", "log", IMAGE[::-1]), "log")


def together(*chains_: SmallChain, options: Options = LVM, progress: Progress | None = None) -> list[Result]:
    targets = [(each.name, str(each.source)) for each in chains_]
    results = backup.backup_together(targets, Address(None, str(chains_[0].source)), options, progress)
    for each, result in zip(chains_, results):
        each.images[result.manifest.generation] = each.source.read_bytes()
    return results


def snapshot_of(fake: FakeLvm, name: str) -> str:
    (found,) = (each for each in fake.snapshots() if fake.row(each)["origin"] == name)
    return found


def test_the_second_snapshot_is_extended_while_the_first_is_read(
    chain: SmallChain, second: SmallChain, fake: FakeLvm
) -> None:
    def fill() -> None:
        fake.set(snapshot_of(fake, "log"), data_percent="80.00")
        wait_until(lambda: fake.calls("lvextend"))

    made = [result.manifest.snapshot for result in together(chain, second, progress=At(fill))]
    assert [snapshot.fill_percent for snapshot in made if snapshot is not None] == [0.0, 80.0]
    (call,) = fake.calls("lvextend")
    assert call[:2] == ["-L", f"+{4 * MIB}b"]


def test_the_second_snapshot_that_overflows_while_the_first_is_read_is_told_as_an_overflow(
    chain: SmallChain, second: SmallChain, fake: FakeLvm
) -> None:
    full = At(lambda: fake.set(snapshot_of(fake, "log"), lv_attr="sri-I-s---", data_percent="100.00"))
    with pytest.raises(SourceError) as caught:
        together(chain, second, progress=full)
    assert caught.value.message == "localhost: the snapshot of vg/log overflowed: 4 MiB was too small"
    assert caught.value.hint == "use at least --snapshot-size 8M; 8M is always enough"
    assert (chain.files(), second.files(), fake.snapshots()) == ({}, {}, [])


def test_several_volumes_are_of_one_moment(chain: SmallChain, second: SmallChain, fake: FakeLvm) -> None:
    def change_both() -> None:
        for each in (chain, second):
            each.source.write_bytes(bytes(len(IMAGE)))

    made = [result.manifest for result in together(chain, second, progress=At(change_both))]
    assert (chain.restored(1), second.restored(1)) == (IMAGE, IMAGE[::-1])
    assert made[0].run == made[1].run and re.fullmatch("[0-9a-f]{16}", str(made[0].run))
    assert [each.source.path for each in made] == [str(chain.source), str(second.source)]
    snapshots = [each.snapshot for each in made if each.snapshot is not None]
    assert len({each.uuid for each in snapshots}) == 2 and snapshots[0].took_s == snapshots[1].took_s
    assert fake.snapshots() == []
    calls = [call[0] for call in fake.calls() if call[0] in ("lvcreate", "lvremove")]
    assert calls == ["lvcreate", "lvcreate", "lvremove", "lvremove"]


def test_each_of_several_is_incremental(chain: SmallChain, second: SmallChain) -> None:
    together(chain, second)
    chain.source.write_bytes(IMAGE[:-1] + b"x")
    made = [result.manifest for result in together(chain, second)]
    assert [(each.full, each.changed_blocks) for each in made] == [(False, 1), (False, 0)]
    for each in (chain, second):
        each.assert_sound()


@pytest.mark.parametrize("victim", [1, 2])
def test_of_several_all_are_committed_or_none(
    chain: SmallChain, second: SmallChain, fake: FakeLvm, victim: int
) -> None:
    together(chain, second)
    before = chain.files()

    def overflow() -> None:
        (name,) = [name for name in fake.snapshots() if fake.row(name)["origin"] == ("lv", "log")[victim - 1]]
        fake.set(name, lv_snapshot_invalid="snapshot invalid")

    for each in (chain, second):
        each.source.write_bytes(each.source.read_bytes()[::-1])
    with pytest.raises(SourceError, match="overflowed"):
        together(chain, second, progress=At(overflow, victim))
    assert chain.files() == before
    assert fake.snapshots() == []
    together(chain, second)
    for each in (chain, second):
        each.assert_sound()


def test_of_several_snapshots_all_are_made_or_none(chain: SmallChain, second: SmallChain, fake: FakeLvm) -> None:
    fake.set("log", lv_size=str(4096 * MIB))  # there is no room for both
    with pytest.raises(SourceError, match=r"log"):
        together(chain, second)
    assert chain.files() == {} and fake.snapshots() == []


def test_the_command_takes_several(chain: SmallChain, second: SmallChain, fake: FakeLvm) -> None:
    also = f"{second.name}={second.source}"
    still = ("--before", "true")
    commands.done("blockdiff", "backup", chain.name, chain.source, "--lvm", "--also", also, *still)
    assert (chain.restored(1), second.restored(1)) == (IMAGE, IMAGE[::-1])
    result = commands.done(
        "blockdiff", "backup", chain.name, chain.source, "--lvm", "--also", also, "--chain=monthly", *still
    )
    assert result == b""
    names = {path.name for path in chain.directory.glob("*-2*.1.json")}
    assert len(names) == 2 and {name.split("-")[0] for name in names} == {"disk", "log"}


def test_several_that_nothing_holds_still_are_a_warning(chain: SmallChain, second: SmallChain, fake: FakeLvm) -> None:
    """Who writes to both, first to the one and then to the other, may be found in the second alone."""
    fake.order("lvcreate", "late_after", 1)
    also = f"{second.name}={second.source}"
    with commands.started(
        "blockdiff", "backup", chain.name, chain.source, "--lvm", "--also", also, "--json"
    ) as process:
        wait_until((fake.directory / "waiting").exists)
        for source in (chain.source, second.source):
            source.write_bytes(b"t" * len(IMAGE))
        fake.go()
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3
    said = re.fullmatch(
        r"blockdiff: warning: (the snapshots of this run were made one after the other, within (\d+\.\d\d) s, while "
        r"writers continued: of two writes to different volumes, only the later one may be there; "
        r"stop them with --before and --after)\n",
        stderr.decode(),
    )
    assert said is not None, stderr
    assert (chain.restored(1), second.restored(1)) == (IMAGE, b"t" * len(IMAGE))
    for made in json.loads(stdout):
        assert (made["warnings"], made["consistency"], made["quiesced"]) == ([said[1]], "snapshot", None)
        assert 0 < made["snapshot"]["apart_s"] == pytest.approx(float(said[2]), abs=0.01)
        assert made["snapshot"]["apart_s"] <= made["snapshot"]["took_s"]
    assert said[1] in json.loads(second.file(".1.json").read_text())["notes"]


def test_several_that_are_held_still_are_of_one_moment(chain: SmallChain, second: SmallChain) -> None:
    for result in together(chain, second, options=replace(LVM, before="true")):
        assert (result.warnings, result.manifest.consistency) == ([], "quiesced")
        assert result.manifest.snapshot is not None and result.manifest.snapshot.apart_s is not None
    made = chain.add(None, LVM).manifest.snapshot
    assert made is not None and made.apart_s is None


def test_a_chain_that_is_busy_stops_all(chain: SmallChain, second: SmallChain, fake: FakeLvm) -> None:
    with LockedChain(second.name), pytest.raises(BusyError):
        together(chain, second)
    assert fake.calls() == []
