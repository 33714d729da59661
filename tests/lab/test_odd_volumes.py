"""Volumes with odd names and changing sizes, several at once, and what stands in the way of a snapshot."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import commands
from tests.lab.backups import VolumeChain, device_digest, part
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where chains are."""
    (tmp_path / "backup").mkdir()
    return tmp_path / "backup"


@pytest.fixture
def chain(guest: Guest, volume_group: VolumeGroup, directory: Path) -> VolumeChain:
    """A chain of a volume of 32 MiB, without generations, beside snapshots that are none of ours."""
    chain = VolumeChain(guest, directory / "data", volume_group.volume("data", "32M"))
    fill(chain, 1)
    return chain


@pytest.fixture
def foreign(chain: VolumeChain, volume_group: VolumeGroup) -> Iterator[None]:
    """Snapshots of the volume, and one with our tag of another, that nothing may touch."""
    group = volume_group.name
    volume_group.volume("other", "8M")
    chain.guest.run(
        f"lvcreate -q -y -s -n nightly -L 40M {group}/data; lvcreate -q -y -s -p r -n bd_x -L 40M {group}/data;"
        f"lvcreate -q -y -s -p r -n bd_0123456789abcdef --addtag blockdiff -L 4M {group}/other"
    )
    names = ("nightly", "bd_x", "bd_0123456789abcdef")
    before = {name: device_digest(chain.guest, volume_group.path(name)) for name in names}
    yield
    assert {name: device_digest(chain.guest, volume_group.path(name)) for name in names} == before


def fill(chain: VolumeChain, count_mib: int, seek_mib: int = 0) -> None:
    """Write random bytes to the volume."""
    words = f"bs=1M count={count_mib} seek={seek_mib} oflag=direct conv=notrunc status=none"
    chain.guest.run(f"dd if=/dev/urandom of={chain.path} {words}")


def test_names_with_hyphens_and_dots(guest: Guest, directory: Path) -> None:
    name = f"vg-{secrets.token_hex(2)}.odd--name_"
    with VolumeGroup(guest, guest.devices[0], name) as group:
        path = group.volume("my-lv.with+all_", "16M")
        mapper = guest.output(f"readlink -f {path} >/dev/null; lvs --noheadings -o lv_dm_path {name}/my-lv.with+all_")
        chains = [VolumeChain(guest, directory / f"chain-{i}", each) for i, each in enumerate((path, mapper.strip()))]
        for chain in chains:
            fill(chain, 2)
            chain.backup()
            assert chain.digest(1) == device_digest(guest, path)
            assert list(group.volumes()) == ["my-lv.with+all_"]


@pytest.mark.usefixtures("foreign")
def test_no_room_in_the_group(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    group = volume_group.name
    free = int(chain.guest.output(f"vgs --noheadings --units m --nosuffix -o vg_free {group}").split(".")[0])
    volume_group.volume("fills", f"{free - 4}M")
    volumes = volume_group.volumes()
    assert chain.fails() == (
        f"blockdiff: root@127.0.0.1: no room in the volume group {group}: "
        f"a snapshot of {group}/data needs 8 MiB, 4 MiB are free\n"
        "  make room there, or ask for less with --snapshot-size\n"
    )
    assert volume_group.volumes() == volumes
    chain.backup("--snapshot-size", "4M")


def test_a_volume_that_grew_and_shrank(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    lv, digests = f"{volume_group.name}/data", []
    for change in ("true", f"lvextend -q -y -L 48M {lv}", f"lvreduce -q -y -f -L 16M {lv}"):
        chain.guest.run(change)
        fill(chain, 2, seek_mib=3)
        summary = chain.backup()
        size = int(chain.guest.output(f"blockdev --getsize64 {chain.path}"))
        assert summary["image_size"] == size
        digests.append(device_digest(chain.guest, chain.path))
    assert [chain.digest(number) for number in (1, 2, 3)] == digests
    chain.verify()


def test_a_volume_that_was_made_anew_under_its_name(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    first = part(chain.backup(), "source")["volume"]
    chain.guest.run(f"lvremove -q -y {volume_group.name}/data")
    volume_group.volume("data", "32M")
    said = chain.fails()
    assert f"holds backups of the volume with the LV UUID {first}, this one has " in said
    assert "use another NAME, or --full to continue this chain" in said
    assert list(volume_group.volumes()) == ["data"]
    summary = chain.backup("--full")
    assert part(summary, "source")["volume"] != first
    chain.backup()


@pytest.mark.usefixtures("foreign")
def test_two_runs_of_one_volume_at_once(chain: VolumeChain, volume_group: VolumeGroup, directory: Path) -> None:
    fill(chain, 32)
    others = len(volume_group.volumes())
    second = VolumeChain(chain.guest, directory / "second", chain.path)
    with chain.slowly(MIB) as (_hold, end):
        second.backup()
        assert len(volume_group.volumes()) == others + 1  # the first run's is still there
        busy = commands.run(*chain.words())
        assert busy.returncode == 4
        status, _out, err = end()
    assert (status, err) == (0, "")
    assert len(volume_group.volumes()) == others
    assert chain.digest(1) == second.digest(1) == device_digest(chain.guest, chain.path)


@pytest.mark.usefixtures("foreign")
def test_the_group_is_locked_by_another_command(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    volumes = volume_group.volumes()
    with chain.guest.started(f"flock -x /run/lock/lvm/V_{volume_group.name} sh -c 'echo held; sleep 600'") as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = chain.fails()
        assert "another LVM command seems to hold the lock of the volume group" in said
    assert volume_group.volumes() == volumes
    chain.backup()


def test_what_is_no_volume_that_can_have_a_snapshot(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    group = volume_group.name
    chain.guest.run(f"lvcreate -q -y -s -n snap -L 8M {group}/data")
    volume_group.pool("pool", "32M")
    for path, words in (
        ("/dev/ubda", "/dev/ubda is not a logical volume"),
        (f"/dev/{group}/nothing", f"/dev/{group}/nothing is not a logical volume"),
        (f"/dev/{group}/snap", f"{group}/snap is itself a snapshot"),
        (f"/dev/{group}/pool", f"{group}/pool is a thin pool"),
    ):
        assert words in VolumeChain(chain.guest, chain.name, path).fails()


def test_only_root_makes_snapshots(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    chain.guest.run(
        "id nobody-much >/dev/null 2>&1 || useradd -m -p '*' nobody-much; mkdir -p ~nobody-much/.ssh;"
        "cp ~root/.ssh/authorized_keys ~nobody-much/.ssh/; chown -R nobody-much ~nobody-much/.ssh"
    )
    words = [word.replace("root@", "nobody-much@") for word in chain.words()]
    result = commands.run(*words)
    assert result.returncode == 1
    assert f"only root can see whether {chain.path} is a logical volume".encode() in result.stderr
    assert list(volume_group.volumes()) == ["data"]


def test_several_volumes_at_one_moment(chain: VolumeChain, volume_group: VolumeGroup, directory: Path) -> None:
    """A writer counts on one volume and then on the other; while it is stopped, they are at most one apart."""
    guest, group = chain.guest, volume_group.name
    mounts = [volume_group.mounted(chain.path), volume_group.mounted(volume_group.volume("second", "32M"))]
    stop, go = (f"kill -{signal} $(cat /run/lab-writer) && sync" for signal in ("STOP", "CONT"))
    loop = "; ".join(f"echo $i > {mount}/n.new && sync {mount}/n.new && mv {mount}/n.new {mount}/n" for mount in mounts)
    also = f"{directory}/second=/dev/{group}/second"
    count = f"echo $$ > /run/lab-writer; i=0; while :; do i=$((i+1)); {loop}; [ $i = 1 ] && echo going; done"
    with guest.started(count) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "going\n"
        out = commands.done(*chain.words("--also", also, "--before", stop, "--after", go))
    first, second = json.loads(out)
    assert first["run"] == second["run"] is not None
    assert (first["consistency"], second["quiesced"]["by"]) == ("quiesced", "freeze")
    counts = []
    for name in ("data", "second"):
        target = directory.parent / name
        commands.done("blockdiff", "restore", directory / name, target)
        guest.put(f"/run/{name}.img", target.read_bytes())
        counts.append(int(guest.output(f"debugfs -R 'cat n' /run/{name}.img 2>/dev/null; rm /run/{name}.img")))
    assert 0 <= counts[0] - counts[1] <= 1
    assert sorted(volume_group.volumes()) == ["data", "second"]


def test_none_or_all_of_several_volumes(chain: VolumeChain, volume_group: VolumeGroup, directory: Path) -> None:
    chain.backup()
    free = chain.guest.output(f"vgs --noheadings --units m --nosuffix -o vg_free {volume_group.name}").split(".")[0]
    volume_group.volume("second", f"{int(free) - 12}M")
    said = chain.fails("--also", f"{directory}/second=/dev/{volume_group.name}/second")
    assert "no room in the volume group" in said
    assert not list(directory.glob("second.*"))
    assert sorted(volume_group.volumes()) == ["data", "second"]


def half_made(chain: VolumeChain, volume_group: VolumeGroup, name: str, *tags: str) -> None:
    """Make what a run that died with its lvcreate leaves: the volume for what changes, and no snapshot yet."""
    words = " ".join(f"--addtag {tag}" for tag in ("blockdiff", "blockdiff_pid_1_1_0123456789ab", *tags))
    chain.guest.run(f"lvcreate -q -y -Wn -an -Zn -n {name} -L 8M {words} {volume_group.name}")


def uuid_of(chain: VolumeChain, name: str) -> str:
    return chain.guest.output(f"lvs --noheadings -o lv_uuid {name}").strip()


@pytest.mark.usefixtures("foreign")
def test_what_lvcreate_began_is_removed_by_the_next_run(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    group = volume_group.name
    others = {name: uuid_of(chain, f"{group}/{name}") for name in ("data", "other")}
    half_made(chain, volume_group, "bd_00000000000000aa", f"blockdiff_origin_{others['data']}")
    half_made(chain, volume_group, "bd_theirs")
    half_made(chain, volume_group, "bd_of_another", f"blockdiff_origin_{others['other']}")
    half_made(chain, volume_group, "theirs", f"blockdiff_origin_{others['data']}")
    before = set(volume_group.volumes())
    assert chain.backup()["notes"] == [f"removed the snapshot {group}/bd_00000000000000aa, which an earlier run left"]
    assert before - set(volume_group.volumes()) == {"bd_00000000000000aa"}
    assert chain.backup()["notes"] == []


def test_a_snapshot_that_lvm_cannot_make_of_a_cached_volume_leaves_nothing(
    chain: VolumeChain, volume_group: VolumeGroup
) -> None:
    """LVM 2.03.16 makes the volume for what changes, cannot make a snapshot out of it, and leaves it."""
    group = volume_group.name
    volume_group.volume("fast", "16M")
    chain.guest.run(f"modprobe dm-cache; lvconvert -q -y --type cache --cachevol fast {group}/data")
    before = volume_group.volumes()
    said = chain.fails()
    assert f"cannot make a snapshot of {group}/data: lvcreate exited with status 5: " in said
    assert f"Failed to suspend logical volume {group}/data.; Aborting. Manual intervention required." in said
    assert volume_group.volumes() == before


def test_a_snapshot_of_a_dead_run_that_somebody_holds_open_stays_and_the_run_goes_on(
    chain: VolumeChain, volume_group: VolumeGroup
) -> None:
    group, name = volume_group.name, "bd_00000000000000aa"
    tags = "--addtag blockdiff --addtag blockdiff_pid_1_1_0123456789ab"
    chain.guest.run(f"lvcreate -q -y -s -p r -n {name} {tags} -L 40M {group}/data")
    with chain.guest.started(f"exec 3</dev/{group}/{name}; echo open; sleep 600") as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        notes = chain.backup()["notes"]
        assert isinstance(notes, list)
        (note,) = notes
        assert note.startswith(f"an earlier run left a snapshot: cannot remove the snapshot {group}/{name}")
        assert f"`fuser -vm /dev/mapper/{group}-{name}`" in note
        assert set(volume_group.volumes()) == {"data", name}
    assert chain.backup()["notes"] == [f"removed the snapshot {group}/{name}, which an earlier run left"]
    assert set(volume_group.volumes()) == {"data"}


def goes_on(chain: VolumeChain) -> tuple[object, object]:
    """Add a generation under another path; return whether it is full, and how many blocks changed."""
    result = commands.run(*chain.words())
    assert result.returncode == 0, result
    assert b"note: the source is the chain's volume under another path" in result.stderr
    summary = json.loads(result.stdout)
    return summary["full"], summary["changed_blocks"]


def test_one_volume_by_all_its_paths(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    """The chain is of the LV UUID, whatever the path is."""
    guest, group = chain.guest, volume_group.name
    links = guest.output(f"udevadm info -q symlink -n {chain.path}").split()
    by_id = next(f"/dev/{link}" for link in links if link.startswith("disk/by-id/dm-uuid-LVM-"))
    guest.run(f"ln -sf {chain.path} /run/lab-link")
    chain.backup()
    for path in (f"/dev/mapper/{group}-data", guest.output(f"readlink -f {chain.path}"), by_id, "/run/lab-link"):
        assert goes_on(VolumeChain(guest, chain.name, path)) == (False, 0)
    guest.run(f"lvrename -q {group} data renamed")
    renamed = VolumeChain(guest, chain.name, f"/dev/{group}/renamed")
    assert goes_on(renamed) == (False, 0)
    assert renamed.digest(6) == device_digest(guest, renamed.path)
    volume_group.volume("data", "32M")
    assert f"holds backups of 127.0.0.1:{guest.port}:/dev/{group}/renamed, not of " in chain.fails()


def test_a_group_with_one_volume_is_not_that_volume(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    for path in (f"/dev/{volume_group.name}", f"/dev/{volume_group.name}/"):
        assert f"{path} is not one logical volume" in VolumeChain(chain.guest, chain.name, path).fails()
