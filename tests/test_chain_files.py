"""What may bear the name of a chain's file: a regular file, or the operator's own symbolic link to one."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import chains, commands
from tests.chains import DAYS, SmallChain

#: Long enough for any command that waits for nothing.
TIMEOUT_S = 60


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[bytes]":
    return commands.run("blockdiff", *arguments, timeout_s=TIMEOUT_S)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    with ExitStack() as stack:
        there = os.open(path.parent, os.O_RDONLY)
        stack.callback(os.close, there)
        stack.enter_context(socket.socket(socket.AF_UNIX)).bind(f"/proc/self/fd/{there}/{path.name}")  # paths are short


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("suffix", [".3.gz", ".3.sha256", ".3.json"])
@pytest.mark.parametrize(
    ("make", "what"),
    [(fifo, "a FIFO"), (directory, "a directory"), (a_socket, "a socket"), (link_to_device, "a device")],
)
def test_what_is_not_a_file_is_named_and_never_waited_for(
    chain: SmallChain, tmp_path: Path, suffix: str, make: Callable[[Path], None], what: str
) -> None:
    chain.file(suffix).unlink()
    make(chain.file(suffix))
    said = f"{chain.file(suffix)} is {what}, not a regular file"
    listed = run("list", chain.name)
    assert listed.returncode == 5 and f"damaged: {said}" in listed.stdout.decode()
    assert listed.stdout.count(b" ok") == 2
    status = run("status", chain.name)
    assert status.returncode == 2 and said in status.stdout.decode()
    verified = run("verify", chain.name)
    assert verified.returncode == 5 and said in verified.stderr.decode()
    restored = run("restore", chain.name, tmp_path / "out")
    if suffix != ".3.json":  # delta and table prove each other, and a warning says it
        assert restored.returncode == 5
    assert said in restored.stderr.decode()
    backed_up = run("backup", chain.name, chain.source)
    assert backed_up.returncode == 5 and said in backed_up.stderr.decode()


def test_a_version_file_that_is_a_fifo_says_nothing(chain: SmallChain) -> None:
    chain.file(".ver").unlink()
    fifo(chain.file(".ver"))
    assert run("status", chain.name).returncode == 0
    assert run("list", chain.name).returncode == 0
    assert run("verify", chain.name).returncode == 0


def test_a_lock_that_is_a_fifo_is_refused(chain: SmallChain) -> None:
    lock = chain.directory / ".disk.lock"
    lock.unlink()
    fifo(lock)
    done = run("backup", chain.name, chain.source)
    assert done.returncode == 1 and f"{lock} is a FIFO, not a regular file" in done.stderr.decode()


def moved_away(chain: SmallChain, place: Path) -> None:
    """Move the files of generation 1 to another directory, with links in their place."""
    place.mkdir()
    for path in sorted(chain.directory.glob("disk.1.*")):
        shutil.move(path, place / path.name)
        path.symlink_to(place / path.name)


def test_the_operators_own_links_are_followed_by_every_command(chain: SmallChain, tmp_path: Path) -> None:
    moved_away(chain, tmp_path / "other disk")
    assert commands.done("blockdiff", "list", chain.name).count(b" ok\n") == 3
    commands.done("blockdiff", "status", chain.name)
    commands.done("blockdiff", "verify", chain.name)
    commands.done("blockdiff", "verify", "--deep", "--subset", "1/1", chain.name)
    commands.done("blockdiff", "restore", chain.name, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DAYS[2]
    commands.done("blockdiff", "repair", chain.name)
    commands.done("blockdiff", "backup", chain.name, chain.source)
    assert (chain.directory / "disk.1.gz").is_symlink() and chain.verdict(4) is None


def test_links_to_a_disk_that_is_not_mounted_are_told_and_nothing_is_set_aside(
    chain: SmallChain, tmp_path: Path
) -> None:
    moved_away(chain, tmp_path / "other disk")
    os.rename(tmp_path / "other disk", tmp_path / "gone")
    before = sorted(path.name for path in chain.directory.iterdir())
    said = f"{chain.file('.1.json')} is a symbolic link, and what it leads to cannot be reached"
    listed = run("list", chain.name)
    assert listed.returncode == 5 and said in listed.stdout.decode()
    status = run("status", chain.name)
    assert status.returncode == 2 and said in status.stdout.decode()
    for arguments in (("verify", chain.name), ("backup", chain.name, chain.source), ("repair", chain.name)):
        done = run(*arguments)
        assert done.returncode in (1, 5), done
        assert "what it leads to cannot be reached" in done.stderr.decode()
    restored = run("restore", chain.name, tmp_path / "out")
    assert restored.returncode == 1 and b"is the disk mounted that it leads to?" in restored.stderr
    assert sorted(path.name for path in chain.directory.iterdir()) == before


def test_a_link_in_a_directory_that_others_may_write_to_is_not_followed(chain: SmallChain, tmp_path: Path) -> None:
    moved_away(chain, tmp_path / "other disk")
    chain.directory.chmod(0o777)
    said = "is a symbolic link, and is not followed: other users can write to the backup directory"
    for arguments in (("list", chain.name), ("status", chain.name), ("verify", chain.name)):
        done = run(*arguments)
        assert done.returncode in (2, 5) and said in (done.stdout + done.stderr).decode()
    restored = run("restore", chain.name, tmp_path / "out")
    assert restored.returncode == 1 and said in restored.stderr.decode()
