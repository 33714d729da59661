"""Backup directories that are full, read-only, missing, or have no room for a name."""

import os
import random
import tempfile
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.shared.errors import StorageError
from tests import chains, commands, conftest, mounts
from tests.chains import SmallChain

OPTIONS = Options(block_size=4096, compression="none")


def _image(seed: int) -> bytes:
    return random.Random(seed).randbytes(10 * 4096 + 5)


def _chain_at(directory: Path, source: Path) -> SmallChain:
    chain = SmallChain(directory, source)
    chain.add(_image(1), OPTIONS)
    return chain


def test_a_disk_that_fills_up_at_any_page_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    """From room for nothing upward, until it is enough: it runs out in the delta, the table, manifest and version."""
    with mounts.tmpfs(tmp_path / "backup", "size=1m") as directory:
        chain = _chain_at(directory, tmp_path / "source")
        before = chain.files()
        for pages in range(64):
            mounts.leave_pages(directory, pages)
            try:
                chain.add(_image(2), OPTIONS)
                break
            except StorageError as error:
                assert (error.exit_status, str(directory) in error.message) == (1, True)
                assert "No space left on device" in error.message and "free some space" in str(error.hint)
            assert chain.files() == before, pages
            assert chain.restored() == _image(1)
        assert pages >= 14  # 11 of the delta, and one for each other file
        chain.assert_sound()


def test_a_disk_without_room_for_another_file_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "backup", "nr_inodes=100") as directory:
        chain = _chain_at(directory, tmp_path / "source")
        before = chain.files()
        status = os.statvfs(directory)
        used = status.f_files - status.f_ffree
        for more in range(10):
            mounts.remount(directory, f"nr_inodes={used + more}")
            try:
                chain.add(_image(2), OPTIONS)
                break
            except StorageError as error:
                assert "No space left on device" in error.message
            assert chain.files() == before, more
        assert more >= 3
        chain.assert_sound()


def test_the_command_says_what_is_full_and_exits_1(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "backup", "size=1m") as directory:
        chain = _chain_at(directory, tmp_path / "source")
        before = chain.files()
        mounts.leave_pages(directory, 2)
        chain.source.write_bytes(_image(2))
        result = commands.run("blockdiff", "backup", "--compression", "none", chain.name, chain.source)
        assert (result.returncode, result.stdout) == (1, b"")
        lines = result.stderr.decode().splitlines()
        assert lines == [
            f"blockdiff: cannot write {directory}/.disk.2.tmp: No space left on device",
            "  free some space there; the chain is as it was before this run",
        ]
        assert chain.files() == before


def test_a_missing_directory_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    for command in ("backup", "list", "verify", "repair", "restore"):
        more = [tmp_path / "source"] if command in ("backup", "restore") else []
        result = commands.run("blockdiff", command, tmp_path / "not here" / "disk", *more)
        assert result.returncode == 1
        message = result.stderr.decode()
        assert f"cannot open the backup directory {tmp_path}/not here: No such file or directory" in message
        assert "is the disk mounted?" in message
        assert (f"mkdir -p -m 700 '{tmp_path}/not here'" in message) == (command == "backup")


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = commands.run("blockdiff", "backup", tmp_path / "file" / "disk", tmp_path / "file")
    assert result.returncode == 1 and b"Not a directory" in result.stderr


def test_a_read_only_directory_takes_no_backup_but_gives_back_all(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "backup") as directory:
        chain = _chain_at(directory, tmp_path / "source")
        mounts.remount(directory, "ro")
        refused = commands.run("blockdiff", "backup", chain.name, chain.source)
        assert refused.returncode == 1
        assert b"Read-only file system" in refused.stderr and b"mount it writable" in refused.stderr
        commands.done("blockdiff", "verify", chain.name)
        commands.done("blockdiff", "list", chain.name)
        commands.done("blockdiff", "restore", chain.name, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == _image(1)


@pytest.mark.parametrize("length", [235, 241, 242, 243, 245, 248, 250, 251, 255, 256, 300])
def test_a_name_that_is_too_long_is_refused_and_leaves_nothing(tmp_path: Path, length: int) -> None:
    chain = chains.new_chain(tmp_path, "n" * length)
    if length <= 241:  # NAME and ``.1.sha256.tmp`` with its dots make 255 bytes
        chain.add(_image(1), OPTIONS)
        chain.assert_sound()
        return
    with pytest.raises(StorageError, match="File name too long") as caught:
        chain.add(_image(1), OPTIONS)
    assert caught.value.message.startswith(
        ("cannot create ", "cannot open ", "cannot look at ", "cannot make a hard link in ")
    )
    assert chain.files() == {}


def test_a_name_that_gets_too_long_with_a_number_of_two_digits_keeps_its_chain(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path, "n" * 241)
    for seed in range(9):
        chain.add(_image(seed), OPTIONS)
    before = chain.files()
    with pytest.raises(StorageError, match="File name too long") as caught:
        chain.add(_image(9), OPTIONS)
    assert caught.value.hint == "choose a shorter NAME"
    assert chain.files() == before
    chain.assert_sound()


def test_a_run_that_needs_its_disk_mounted_refuses_the_root_file_system(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with mounts.tmpfs(tmp_path / "backup") as directory:
        commands.done("blockdiff", "backup", "--mounted", directory / "disk", tmp_path / "source")
        commands.done("blockdiff", "backup", "--mounted", "disk2", tmp_path / "source", cwd=directory)
        assert (directory / "disk.1.json").exists() and (directory / "disk2.1.json").exists()
    with tempfile.TemporaryDirectory(prefix="blockdiff-", dir=_on_root_file_system()) as name:
        result = commands.run("blockdiff", "backup", "--mounted", f"{name}/disk", tmp_path / "source")
        assert result.returncode == 1 and os.listdir(name) == []
        assert result.stderr.decode() == (
            f"blockdiff: {name} is on the root file system: no disk is mounted there\n"
            "  mount the disk for the backups; if they belong on the root file system, omit --mounted\n"
        )
    result = commands.run("blockdiff", "backup", "--mounted", f"{name}/disk", tmp_path / "source")
    assert result.returncode == 1 and b"is the disk mounted? If the directory is new" in result.stderr


def _on_root_file_system() -> str:
    """Return a directory on it that may be written to; skips where there is none."""
    mount_points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    for place in ("/var/tmp", "/tmp", str(Path.home()), "/root"):
        parents = {place, *map(str, Path(place).parents)} - {"/"}
        if os.access(place, os.W_OK) and os.path.realpath(place) == place and not parents & mount_points:
            return place
    conftest.require(False, "a directory on the root file system that may be written to")
    return ""
