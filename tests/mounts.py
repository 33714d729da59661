"""File systems for one test: small, full or read-only ones in memory, as context managers."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import conftest

PAGE = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def tmpfs(path: Path, *options: str) -> Iterator[Path]:
    """Mount a file system in memory at `path`, a new directory. An option is like ``size=64k``. Or skip the test."""
    path.mkdir()
    program = conftest.require_program("mount")
    words = [word for option in ("mode=700", *options) for word in ("-o", option)]
    mounted = os.getuid() == 0 and subprocess.run([program, "-t", "tmpfs", *words, "none", path], check=False)
    conftest.require(mounted and mounted.returncode == 0, "the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True, timeout=60)


def remount(path: Path, option: str) -> None:
    """Change an option of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{option}", path], check=True, timeout=60)


def leave_pages(path: Path, count: int) -> None:
    """Leave room for only `count` more pages, or files of one page, in a file system made by `tmpfs`."""
    status = os.statvfs(path)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    remount(path, f"size={used + count * PAGE}")


def without_places(writable: Path | None = None) -> list[str]:
    """Return a prefix for a command that then finds no directory for temporary files; or skip the test.

    The command must have TMPDIR=/proc. `writable` is a directory that stays writable.
    """
    script = (
        'stays="$1"; shift; [ -z "$stays" ] || mount --bind "$stays" "$stays" || exit 99; '
        "for place in /tmp /var/tmp; do "
        'mount --rbind "$place" "$place" && mount -o remount,bind,ro "$place" || exit 99; done; cd /proc; exec "$@"'
    )
    words = [conftest.require_program("unshare"), "-m", "sh", "-c", script, "sh", str(writable or "")]
    probe = os.getuid() == 0 and subprocess.run([*words, "true"], capture_output=True, timeout=60, check=False)
    conftest.require(probe and probe.returncode == 0, "the right to mount")
    return words
