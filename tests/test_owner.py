"""root in another user's backup directory: what it makes there is that user's, who goes on with the chain."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff.chain.commit import LockedChain
from blockdiff.shared.errors import StorageError
from tests import chains, commands, conftest
from tests.chains import DAYS, SmallChain

#: A user and a group that need not exist.
UID, GID = 54321, 54322


@contextmanager
def being_the_owner() -> Iterator[None]:
    """Be the user who owns the backups; root's rights are gone meanwhile."""
    os.setegid(GID)
    os.seteuid(UID)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[SmallChain]:
    """A chain without generations in a directory of that user's, which he can reach."""
    conftest.require(os.getuid() == 0, "root")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        chain = chains.new_chain(place)
        os.chown(chain.directory, UID, GID)
        chain.directory.chmod(0o700)
        yield chain
    finally:
        shutil.rmtree(place)


def back_up(chain: SmallChain, image: bytes) -> None:
    chain.source.write_bytes(image)
    commands.done("blockdiff", "backup", "--block-size", str(chains.BLOCK), chain.name, chain.source)
    chain.images[len(chain.images) + 1] = image


def owners(chain: SmallChain) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_uid, path.stat().st_gid) for path in chain.directory.iterdir()}


def test_what_roots_backup_makes_belongs_to_the_owner_of_the_directory(chain: SmallChain) -> None:
    back_up(chain, DAYS[0])
    back_up(chain, DAYS[1])
    files = {f"disk.{number}{suffix}" for number in (1, 2) for suffix in (".gz", ".sha256", ".json")}
    assert owners(chain) == dict.fromkeys({*files, "disk.ver", ".disk.lock"}, (UID, GID))
    with being_the_owner():
        chain.assert_sound()
        with LockedChain(chain.name) as locked:
            locked.write_version(2)
    back_up(chain, DAYS[2])
    chain.assert_sound()


def test_what_roots_repair_makes_belongs_to_the_owner_of_the_directory(chain: SmallChain) -> None:
    for image in DAYS:
        back_up(chain, image)
    chain.file(".ver").unlink()
    chain.file(".2.json").unlink()
    assert commands.run("blockdiff", "repair", chain.name).returncode == 0
    assert set(owners(chain).values()) == {(UID, GID)}
    with being_the_owner():
        chain.assert_sound()


def test_the_originals_backup_leaves_the_chain_to_its_owner(chain: SmallChain) -> None:
    chain.source.write_bytes(DAYS[0])
    assert commands.run("blockdiff_backup", chain.name, "blockdiff_dump", chain.source).returncode == 0
    assert set(owners(chain).values()) == {(UID, GID)}


def test_reading_makes_nothing_in_the_directory(chain: SmallChain, tmp_path: Path) -> None:
    back_up(chain, DAYS[0])
    before = owners(chain)
    for words in (["list"], ["verify"], ["status"], ["repair", "--dry-run"]):
        assert commands.run("blockdiff", *words, chain.name).returncode == 0
    commands.done("blockdiff", "restore", chain.name, tmp_path / "restored")
    assert owners(chain) == before


def test_what_the_owner_has_planted_does_not_become_his(chain: SmallChain, tmp_path: Path) -> None:
    """A link to a file of root's in the place of the lock."""
    secret = chain.directory.parent / "secret"
    secret.touch(0o600)
    os.link(secret, chain.directory / ".disk.lock")
    back_up(chain, DAYS[0])
    assert secret.stat().st_uid == 0


def test_a_chain_that_root_has_taken_says_whose_it_is_and_what_to_do(chain: SmallChain) -> None:
    back_up(chain, DAYS[0])
    os.chown(chain.file(".ver"), 0, 0)
    with being_the_owner(), pytest.raises(StorageError, match=r"cannot open .*/disk\.ver: Permission denied") as caught:
        LockedChain(chain.name).close()
    assert caught.value.hint == f"it belongs to root; as root: chown -R {UID} {chain.directory}"


def test_an_owner_that_cannot_be_kept_ends_the_run(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", fail)
    with pytest.raises(StorageError, match=r"cannot open .*/\.disk\.lock: Operation not permitted") as caught:
        chain.add(DAYS[0])
    assert "run as the user that owns the backups" in str(caught.value.hint)
    assert list(chain.directory.iterdir()) == []
