"""Block devices for tests: loop devices on files, for root only."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import conftest
from tests.mariadb import wait_for


@contextmanager
def device(backing: Path) -> Iterator[Path]:
    """Yield a loop device on a file of whole sectors; skips the test if this machine refuses to make one."""
    losetup = shutil.which("losetup", path="/usr/sbin:/sbin:/usr/bin:/bin")
    conftest.require(losetup, "the program losetup")
    assert losetup is not None
    attached = subprocess.run(
        [losetup, "--show", "-f", backing], capture_output=True, text=True, timeout=60, check=False
    )
    conftest.require(attached.returncode == 0, f"a loop device ({attached.stderr.strip()})")
    path = Path(attached.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run([losetup, "-d", path], check=True, timeout=60)


@contextmanager
def partition(disk: Path, first: int, count: int) -> Iterator[Path]:
    """Yield a partition of a loop device: `count` sectors from sector `first` on."""
    subprocess.run([conftest.require_program("addpart"), disk, "1", str(first), str(count)], check=True, timeout=60)

    def remove() -> bool:
        return subprocess.run(["delpart", disk, "1"], capture_output=True, timeout=60, check=False).returncode == 0

    try:
        yield Path(f"{disk}p1")
    finally:
        wait_for(remove, "that nobody holds the partition, such as a mount namespace that another test began", 60)


def make_file_system(path: Path, size: int = 4 << 20) -> None:
    """Make a file system on the device `path`, or in a new file. The kernel then writes nothing to it automatically."""
    if not path.is_block_device():
        path.write_bytes(b"")
        os.truncate(path, size)
    # otherwise the kernel would initialize the rest after it is mounted
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run([conftest.require_program("mkfs.ext4"), "-q", "-E", lazy, path], check=True, timeout=60)


@contextmanager
def mount(device: Path, where: Path, *options: str) -> Iterator[Path]:
    """Mount a device at `where`, a new directory."""
    where.mkdir()
    subprocess.run(["mount", *options, device, where], check=True, timeout=60)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True, timeout=60)


@contextmanager
def mounted(backing: Path, where: Path, size: int = 4 << 20) -> Iterator[Path]:
    """Yield a loop device whose file system is mounted at `where`."""
    make_file_system(backing, size)
    with device(backing) as found, mount(found, where):
        yield found
