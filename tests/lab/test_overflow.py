"""Snapshots that fill: extended while there is room, and never taken for good where they overflowed."""

import json
from pathlib import Path

import pytest

from tests.lab.backups import VolumeChain, device_digest, part, wait_until
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

MIB = 1 << 20


@pytest.fixture
def chain(guest: Guest, volume_group: VolumeGroup, tmp_path: Path) -> VolumeChain:
    """A chain of a volume of 64 MiB of random bytes, with its first generation."""
    path = volume_group.volume("data", "64M")
    guest.run(f"dd if=/dev/urandom of={path} bs=1M count=64 oflag=direct status=none")
    (tmp_path / "backup").mkdir()
    chain = VolumeChain(guest, tmp_path / "backup" / "data", path)
    chain.backup()
    return chain


def snapshot_of(group: VolumeGroup) -> str:
    (name,) = (name for name in group.volumes() if name.startswith("bd_"))
    return name


def overwrite(guest: Guest, path: str, count_mib: int) -> None:
    guest.run(f"dd if=/dev/urandom of={path} bs=1M count={count_mib} oflag=direct conv=notrunc status=none")


def size_mib(group: VolumeGroup, name: str) -> float:
    return float(group.guest.output(f"lvs --noheadings --units m --nosuffix -o lv_size {group.name}/{name}"))


def overflowed_size(group: VolumeGroup) -> str:
    """Return the size of the snapshot, which has overflowed: a slow guest gives the run time to extend it before."""
    name = snapshot_of(group)
    assert group.volumes()[name][4] == "I"
    return f"{size_mib(group, name):g} MiB"


def assert_overflowed(chain: VolumeChain, group: VolumeGroup, ended: tuple[int, str, str], size: str) -> None:
    status, out, err = ended
    name = f"{group.name}/data"
    assert (status, out) == (1, "")
    assert err.startswith(f"blockdiff: root@127.0.0.1: the snapshot of {name} overflowed: {size} was too small\n")
    assert "use at least --snapshot-size" in err and "is always enough" in err
    assert list(group.volumes()) == ["data"]
    assert sorted(chain.files()) == ["data.1.gz", "data.1.json", "data.1.sha256", "data.ver"]
    chain.verify()


def test_an_overflow_while_reading_fails_the_run(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    before = chain.files()
    # --full, so that the run stands still for certain before it has read all of it
    with chain.slowly(MIB, "--full", "--snapshot-size", "8M") as (_hold, end):
        overwrite(chain.guest, chain.path, 64)
        size = overflowed_size(volume_group)
        assert_overflowed(chain, volume_group, end(), size)
    assert chain.files() == before


def test_the_size_that_is_said_to_do_does(chain: VolumeChain, volume_group: VolumeGroup) -> None:
    digest = device_digest(chain.guest, chain.path)
    with chain.slowly(MIB, "--full", "--snapshot-size", "8M") as (_hold, end):
        overwrite(chain.guest, chain.path, 64)
        said = end()[2]
    (size,) = (word for word in said.split() if word.endswith("M") and f"{word} is always enough" in said)
    digest = device_digest(chain.guest, chain.path)
    with chain.slowly(MIB, "--full", "--snapshot-size", size) as (_hold, end):
        overwrite(chain.guest, chain.path, 64)
        status, _out, err = end()
    assert (status, err) == (0, "")
    assert chain.digest(2) == digest


def test_an_overflow_after_the_last_byte_was_read_fails_the_run(
    guest: Guest, volume_group: VolumeGroup, tmp_path: Path
) -> None:
    """All of a small volume is read at once; what is sent of it takes long. Only the check in the end can tell."""
    path = volume_group.volume("data", "8M")
    overwrite(guest, path, 8)
    (tmp_path / "backup").mkdir()
    chain = VolumeChain(guest, tmp_path / "backup" / "data", path)
    chain.backup()
    with chain.slowly(64 << 10, "--full", "--snapshot-size", "4M", "--bwlimit", "200K") as (hold, end):
        hold.go()
        snapshot = snapshot_of(volume_group)
        number = guest.output(f"basename $(readlink -f {volume_group.path(snapshot)})")
        wait_until(lambda: 512 * int(guest.output(f"cat /sys/block/{number}/stat").split()[2]) >= 8 * MIB)
        overwrite(guest, path, 8)
        size = overflowed_size(volume_group)
        assert_overflowed(chain, volume_group, end(), size)


def test_a_snapshot_that_fills_is_extended_while_the_group_has_room(
    chain: VolumeChain, volume_group: VolumeGroup
) -> None:
    digest = device_digest(chain.guest, chain.path)
    with chain.slowly(MIB, "--full", "--snapshot-size", "16M") as (_hold, end):
        snapshot = snapshot_of(volume_group)
        overwrite(chain.guest, chain.path, 13)
        wait_until(lambda: size_mib(volume_group, snapshot) > 16)
        overwrite(chain.guest, chain.path, 20)
        status, out, err = end()
    assert (status, err) == (0, "")
    assert chain.digest(2) == digest
    fill = part(json.loads(out), "snapshot")["fill_percent"]
    assert isinstance(fill, float) and 70 <= fill < 100
    assert list(volume_group.volumes()) == ["data"]


def test_all_snapshots_of_a_run_are_watched_from_their_making(
    chain: VolumeChain, volume_group: VolumeGroup, tmp_path: Path
) -> None:
    """The second is extended while the first is still read."""
    path = volume_group.volume("second", "64M")
    overwrite(chain.guest, path, 64)
    digest = device_digest(chain.guest, path)
    # nothing writes while the snapshots are made, and --before says so
    also = ("--also", f"{tmp_path}/backup/second={path}", "--before", "true")
    with chain.slowly(MIB, "--full", "--snapshot-size", "16M", *also) as (_hold, end):
        origins = f"lvs --noheadings -o lv_name -S origin=second {volume_group.name}"
        snapshot = chain.guest.output(origins).strip()
        overwrite(chain.guest, path, 13)
        wait_until(lambda: size_mib(volume_group, snapshot) > 16)
        overwrite(chain.guest, path, 20)
        status, out, err = end()
    assert (status, err) == (0, "")
    assert VolumeChain(chain.guest, tmp_path / "backup" / "second", path).digest(1) == digest
    first, second = (part(made, "snapshot")["fill_percent"] for made in json.loads(out))
    assert isinstance(first, float) and isinstance(second, float) and first < 70 <= second < 100
    assert sorted(volume_group.volumes()) == ["data", "second"]


def test_a_snapshot_that_is_full_before_its_turn_is_told_with_the_size_that_would_do(
    chain: VolumeChain, volume_group: VolumeGroup, tmp_path: Path
) -> None:
    path = volume_group.volume("second", "64M")
    free = chain.guest.output(f"vgs --noheadings --units m --nosuffix -o vg_free {volume_group.name}").split(".")[0]
    volume_group.volume("rest", f"{int(free) - 16}M")  # no room to extend them
    words = ("--full", "--snapshot-size", "8M", "--also", f"{tmp_path}/backup/second={path}")
    with chain.slowly(MIB, *words) as (_hold, end):
        overwrite(chain.guest, path, 64)
        status, _out, err = end()
    assert status == 1
    assert err == (
        f"blockdiff: root@127.0.0.1: the snapshot of {volume_group.name}/second overflowed: 8 MiB was too small\n"
        "  use at least --snapshot-size 16M; 66M is always enough\n"
    )
    assert sorted(volume_group.volumes()) == ["data", "rest", "second"]
