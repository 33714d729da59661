"""A guest's disk as a logical volume, with a file system that the host knows nothing of: frozen or not.

The file system lies on a loop device over the volume: of one right on it, LVM itself would freeze the writes.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import commands
from tests.lab.volumes import VolumeGroup

DISK_SIZE = "64M"
TIMEOUT_S = 240
FROZEN, HOLD = "/run/machine-frozen", "/run/machine-hold"
_FSCK = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}
# what is renamed and removed all the time leaves a journal that is never empty for long
_WRITER = """
number=0
while :; do
    number=$((number + 1))
    mkdir -p {directory}/$((number % 7)) && seq $number $((number + 500)) >{directory}/new
    mv {directory}/new {directory}/$((number % 7))/$((number % 31)) && sync {directory}
    [ $number != 20 ] || echo writing
done
"""


class Disk:
    """A volume that is some virtual machine's disk, mounted at `directory`."""

    def __init__(self, group: VolumeGroup) -> None:
        self.group = group
        self.guest = group.guest
        self.volume = group.volume("disk", DISK_SIZE)
        self.directory = f"/mnt/{group.name}-machine"
        self.freeze = ("--before", f"fsfreeze -f {self.directory}", "--after", f"fsfreeze -u {self.directory}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the file system mounted."""
        loop = self.guest.output(f"losetup --find --show --direct-io=on {self.volume}")
        try:
            self.guest.run(f"mkfs.ext4 -q {loop} && mkdir -p {self.directory} && mount {loop} {self.directory}")
            yield
        finally:
            self.guest.run(f"fsfreeze -u {self.directory}", check=False)
            self.guest.run(f"umount {self.directory}; losetup -d {loop}")

    @contextmanager
    def written_to(self) -> Iterator[None]:
        """Write to it meanwhile."""
        with self.guest.started(_WRITER.format(directory=self.directory)) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            yield

    def words(self, chain: Path, *more: str) -> list[str | Path]:
        """Return the words of a run."""
        source = self.guest.url(self.volume)
        return ["blockdiff", "backup", chain, source, "--lvm", *more, *self.guest.arguments]

    def backup(self, chain: Path, *more: str) -> "subprocess.CompletedProcess[bytes]":
        """Run a backup to its end."""
        return commands.run(*self.words(chain, *more), timeout_s=TIMEOUT_S)

    def restored(self, chain: Path, *freeze: str, image: Path) -> Path:
        """Back it up while it is written to, after a file was synced; return the image that the backup restores."""
        self.guest.run(f"echo kept >{self.directory}/synced && sync {self.directory}/synced")
        with self.written_to():
            result = self.backup(chain, *freeze)
        assert (result.returncode, result.stderr) == (0, b""), result
        commands.done("blockdiff", "restore", chain, image)
        return image

    def assert_thawed(self) -> None:
        """It can be written to, now or in a moment."""
        self.guest.run(f"timeout {TIMEOUT_S} touch {self.directory}/thawed", timeout_s=TIMEOUT_S + 30)

    def is_frozen(self) -> bool:
        """Return whether it is frozen: to freeze it once more is an error."""
        both = f"fsfreeze -f {self.directory} && fsfreeze -u {self.directory}"
        return self.guest.run(both, check=False).returncode != 0


@pytest.fixture
def disk(volume_group: VolumeGroup) -> Iterator[Disk]:
    """A virtual machine's disk, in use."""
    made = Disk(volume_group)
    with made.running():
        yield made


def checked(image: Path, option: str) -> tuple[int, str]:
    """Check a file system as e2fsck does with the option; return its exit status and what it said."""
    command = ["e2fsck", "-f", option, str(image)]
    result = subprocess.run(command, env=_FSCK, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode, result.stdout + result.stderr


def needs_recovery(image: Path) -> bool:
    """Return whether the journal of a file system holds what is not yet in its place."""
    command = ["dumpe2fs", "-h", str(image)]
    shown = subprocess.run(command, env=_FSCK, capture_output=True, text=True, timeout=60, check=True).stdout
    (features,) = [line for line in shown.splitlines() if line.startswith("Filesystem features:")]
    return "needs_recovery" in features.split()


def content(image: Path, name: str) -> str:
    """Return what a file in a file system holds."""
    command = ["debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(command, env=_FSCK, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_frozen_file_system_is_restored_clean(disk: Disk, tmp_path: Path, large_tmp_path: Path) -> None:
    image = disk.restored(tmp_path / "frozen", *disk.freeze, image=large_tmp_path / "image")
    disk.assert_thawed()
    assert not needs_recovery(image)
    status, said = checked(image, "-n")
    assert status == 0, said
    assert content(image, "synced") == "kept\n"


def test_one_that_was_not_frozen_recovers_as_after_a_power_cut(
    disk: Disk, tmp_path: Path, large_tmp_path: Path
) -> None:
    image = disk.restored(tmp_path / "running", image=large_tmp_path / "image")
    assert needs_recovery(image)
    status, said = checked(image, "-p")
    assert status in (0, 1) and "recovering journal" in said, said
    status, said = checked(image, "-n")
    assert status == 0, said
    assert content(image, "synced") == "kept\n"


def test_it_is_thawed_when_the_snapshot_cannot_be_made(disk: Disk, tmp_path: Path) -> None:
    group = disk.group.name
    takes_all = f"fsfreeze -f {disk.directory} && lvcreate -q -y -Wn -n all -l 100%FREE {group}"
    result = disk.backup(tmp_path / "disk", "--before", takes_all, *disk.freeze[2:])
    assert result.returncode == 1, result
    assert b"lvcreate" in result.stderr and b"insufficient free space" in result.stderr, result
    assert not disk.is_frozen()
    assert set(disk.group.volumes()) == {"disk", "all"}
    assert not (tmp_path / "disk.ver").exists()


def test_it_is_thawed_when_freezing_itself_fails(disk: Disk, tmp_path: Path) -> None:
    before = f"fsfreeze -f {disk.directory}; echo half done >&2; exit 3"
    result = disk.backup(tmp_path / "disk", "--before", before, *disk.freeze[2:])
    assert result.returncode == 1, result
    assert b"the command of --before failed" in result.stderr and b"half done" in result.stderr, result
    assert not disk.is_frozen()
    assert set(disk.group.volumes()) == {"disk"}


def test_it_is_thawed_when_the_agent_is_killed_while_the_snapshot_is_made(disk: Disk, tmp_path: Path) -> None:
    guest, chain = disk.guest, tmp_path / "disk"
    guest.run(f"rm -f {FROZEN}; touch {HOLD}")
    before = f"fsfreeze -f {disk.directory} && touch {FROZEN}; while [ -e {HOLD} ]; do sleep 0.05; done"
    with commands.started(*disk.words(chain, "--before", before, *disk.freeze[2:])) as run:
        guest.run(f"until [ -e {FROZEN} ]; do sleep 0.1; done", timeout_s=TIMEOUT_S)
        with disk.group.locked():
            guest.run(f"rm {HOLD}; until pgrep -x lvcreate; do sleep 0.1; done", timeout_s=TIMEOUT_S)
            assert disk.is_frozen()
            guest.run("pkill -KILL -f '[b]lockdiff-agent'")
            disk.assert_thawed()  # although lvcreate still waits
        assert run.wait(TIMEOUT_S) == 1
    guest.run("while pgrep -x lvcreate; do sleep 0.1; done", timeout_s=TIMEOUT_S)
    assert not chain.with_suffix(".ver").exists()
    result = disk.backup(chain, *disk.freeze)
    assert result.returncode == 0, result
    assert set(disk.group.volumes()) == {"disk"}
