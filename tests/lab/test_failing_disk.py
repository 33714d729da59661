"""Backup directories on disks that fail, fill up, or lose their power: the guest is server and host at once."""

import hashlib
import json
import random
from collections.abc import Iterator

import pytest

from tests.lab import server
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

IMAGE_BYTES = 1 << 20
PLACE = "/mnt/store"
NAME = f"{PLACE}/disk"
SOURCE = "/run/source"
RUN_TIMEOUT_S = 120
#: Seconds that the disk still works for, from just before a run: it takes about three.
WORKS_FOR_S = range(6)


def image(day: int) -> bytes:
    """Return the image of a day; generation N is that of day N."""
    return random.Random(day).randbytes(IMAGE_BYTES)


def backup(day: int) -> str:
    """Return the line for the guest's shell that makes the image of a day and backs it up."""
    write = f"open('{SOURCE}', 'wb').write(__import__('random').Random({day}).randbytes({IMAGE_BYTES}))"
    return f'python3 -c "{write}" && {server.command("blockdiff", "backup", "--json", NAME, SOURCE)}'


class Store:
    """A file system at `PLACE`, on a device that can be told to fail. A context manager."""

    def __init__(self, guest: Guest, group: VolumeGroup, size: str) -> None:
        self.guest = guest
        self._group = group
        self._volume = group.volume("store", size)
        self._sectors = int(guest.output(f"blockdev --getsz {self._volume}"))
        self._name = f"flaky-{group.name}"
        self._device = f"/dev/mapper/{self._name}"

    def __enter__(self) -> "Store":
        self._create()
        self.guest.run(f"mkfs.ext4 -q {self._device} && mkdir -p {PLACE} && mount {self._device} {PLACE}")
        self.guest.run(f"chmod 700 {PLACE}")
        return self

    def __exit__(self, *exception: object) -> None:
        self.guest.run(f"umount {PLACE}; dmsetup remove --retry {self._name}", check=False)

    def _create(self) -> None:
        self.guest.run(f"dmsetup create {self._name} --table '{self._sound()}'")

    def _sound(self) -> str:
        return f"0 {self._sectors} linear {self._volume} 0"

    def _load(self, table: str) -> None:
        self.guest.run(
            f"dmsetup load {self._name} --table '{table}' && dmsetup suspend --nolockfs --noflush {self._name}"
            f" && dmsetup resume {self._name}"
        )

    def fail_writes(self, after_s: int) -> None:
        """Let all writes fail from so many seconds after now on."""
        self._load(f"0 {self._sectors} flakey {self._volume} 0 {after_s} 3600 1 error_writes")

    def mend(self) -> None:
        """Replace the cable: all writes work again, and the file system is checked and mounted anew."""
        self.guest.run(f"umount {PLACE}")
        self._load(self._sound())
        checked = self.guest.run(f"e2fsck -fy {self._device}", check=False)
        assert checked.returncode in (0, 1), checked  # sound, or put right
        self.guest.run(f"mount {self._device} {PLACE}")

    def cut_power(self) -> None:
        """Cut the power of the machine; what the disk has accepted is there when it is back."""
        self.guest.reboot()
        self._group.activate()
        self._create()
        self.guest.run(f"mount {self._device} {PLACE}")

    def run(self, day: int) -> tuple[int, str]:
        """Back up the image of a day; return the exit status and what was said on standard error."""
        done = self.guest.run(backup(day), timeout_s=RUN_TIMEOUT_S, check=False)
        return done.returncode, done.stderr

    def add(self, day: int) -> None:
        """Back up the image of a day, without a word of complaint."""
        assert self.run(day) == (0, "")

    def generations(self) -> list[int]:
        """Return the numbers of those that were completed: the next run moves others aside."""
        listed = json.loads(self.guest.output(server.command("blockdiff", "list", "--json", NAME)))
        return [entry["generation"] for entry in listed if entry["state"] != "incomplete"]

    def assert_sound(self, days: int) -> None:
        """Exactly so many generations are there, and each restores to the image of its day."""
        assert self.generations() == list(range(1, days + 1))
        self.guest.run(server.command("blockdiff", "verify", NAME), timeout_s=RUN_TIMEOUT_S)
        for day in range(1, days + 1):
            self.guest.run(server.command("blockdiff", "restore", "--force", f"{NAME}@{day}", "/run/restored"))
            restored = self.guest.output("sha256sum < /run/restored").split()[0]
            assert restored == hashlib.sha256(image(day)).hexdigest(), day


@pytest.fixture
def store(guest: Guest, volume_group: VolumeGroup) -> Iterator[Store]:
    with server.installed(guest), Store(guest, volume_group, "64M") as store:
        guest.run("sync")  # blockdiff itself must survive a power cut, too
        yield store


def test_a_disk_that_fails_at_any_moment_of_a_run_costs_no_generation(store: Store) -> None:
    days = 1
    store.add(1)
    failed = 0
    for works_for_s in WORKS_FOR_S:
        store.fail_writes(works_for_s)
        status, said = store.run(days + 1)
        assert "Traceback" not in said
        if status == 0:
            days += 1
        else:
            failed += 1
            assert status == 1
            assert "Input/output error" in said or "Read-only file system" in said
        store.mend()
        if f"cannot sync {PLACE}:" in said:  # after the manifest had its name, it may be durable or not
            found = len(store.generations())
            assert found in (days, days + 1)
            days = found
        store.assert_sound(days)
    assert failed, "the disk never failed in time"
    status, said = store.run(days + 1)
    # the last failure may have left something to put in order
    assert status == 0 and all(line.startswith("blockdiff: note: ") for line in said.splitlines()), said
    store.assert_sound(days + 1)


@pytest.mark.parametrize("sign", [".disk.3.gz.tmp", "disk.3.gz", "disk.3.json"])
def test_a_power_cut_costs_no_generation_that_was_reported(store: Store, sign: str) -> None:
    """It comes as soon as the third run is seen to have got so far: page cache, journal and disk are real ones."""
    store.add(1)
    store.add(2)
    with store.guest.started(backup(3)):
        seen = f"test -e {PLACE}/{sign} -o -e {PLACE}/disk.3.json"  # the first one is there for a moment only
        store.guest.run(f"until {seen}; do :; done", timeout_s=RUN_TIMEOUT_S)
        store.cut_power()
    days = len(store.generations())
    assert days in (2, 3)
    store.assert_sound(days)
    status, said = store.run(days + 1)
    assert (status, "Traceback" in said) == (0, False), said
    store.assert_sound(days + 1)


def test_a_disk_that_fills_up_costs_no_generation(guest: Guest, volume_group: VolumeGroup) -> None:
    with server.installed(guest), Store(guest, volume_group, "12M") as store:
        guest.run(f"dd if=/dev/zero of={PLACE}/other bs=1M count=2 status=none")
        days, status = 0, 0
        while status == 0:
            status, said = store.run(days + 1)
            days += status == 0
        assert days >= 3
        assert status == 1 and f"cannot write {PLACE}/.disk.{days + 1}." in said and "free some space there" in said
        store.assert_sound(days)
        guest.run(f"rm {PLACE}/other")
        store.add(days + 1)
        store.assert_sound(days + 1)
