"""Block devices for tests: loop devices on files, for root only."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import conftest


@contextmanager
def device(backing: Path) -> Iterator[Path]:
    """Yield a loop device on a file of whole sectors; skips the test where this machine gives us none."""
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
