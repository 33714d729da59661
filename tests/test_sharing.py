"""A backup directory that others may write to, or replace, is refused: they could replace backups."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from tests import chains, commands, conftest
from tests.chains import SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.some_days(tmp_path, 1)


OWN = "that directory is shared: use your own, such as /var/backup (mkdir -m 700 /var/backup)"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777, 0o2775])
def test_a_directory_that_others_may_write_to_is_refused(chain: SmallChain, mode: int) -> None:
    """The hint never breaks a directory that is shared on purpose, such as /tmp."""
    chain.directory.chmod(mode)
    before = chain.files()
    result = commands.run("blockdiff", "backup", "disk", chain.source, cwd=chain.directory)
    assert result.returncode == 1
    assert result.stderr.decode() == (
        f"blockdiff: other users can write to the backup directory . (mode {mode:04o}), and so replace backups\n"
        f"  {OWN if mode > 0o777 else f'chmod go-w {chain.directory}'}\n"
    )
    assert chain.files() == before
    assert chain.restored(1) == chain.images[1]  # to restore is never refused


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o2775])
def test_a_directory_that_others_may_replace_is_refused(chain: SmallChain, mode: int) -> None:
    """They may write to one above it, or to one in which a link leads to it."""
    place = chain.directory.parent / "shared"
    place.mkdir()
    (place / "link").symlink_to(chain.directory)
    (place / "backups").mkdir()
    if not mode & 0o002:
        conftest.require(os.getuid() == 0, "root")
        os.chown(place, -1, 65533)  # a group of nobody's own
    place.chmod(mode)
    for name in (place / "link" / "disk", place / "backups" / "disk"):
        result = commands.run("blockdiff", "backup", name, chain.source)
        assert result.returncode == 1
        assert result.stderr.decode() == (
            f"blockdiff: other users can write to {place} (mode {mode:04o}),"
            f" and so replace {name.parent} and its backups\n"
            f"  {OWN if mode > 0o777 else f'chmod go-w {place}'}\n"
        )
    assert list((place / "backups").iterdir()) == []
    place.chmod(0o755)
    commands.done("blockdiff", "backup", place / "link" / "disk", chain.source)


def test_a_group_that_nobody_else_is_in_may_write_to_what_is_above(chain: SmallChain) -> None:
    """Where each user has a group, homes and what is in them are often of mode 775; so are mount points of root's."""
    conftest.require(os.getuid() == 0, "root")
    place = chain.directory.parent / "mine"
    (place / "backups").mkdir(parents=True)
    for owner, group in ((0, 0), (pwd.getpwnam("daemon").pw_uid, grp.getgrnam("daemon").gr_gid)):
        os.chown(place, owner, group)
        place.chmod(0o775)
        commands.done("blockdiff", "backup", place / "backups" / "disk", chain.source)


def test_a_directory_of_ones_own_in_a_sticky_one_is_taken(chain: SmallChain) -> None:
    place = chain.directory.parent / "like tmp"
    (place / "own").mkdir(parents=True)
    place.chmod(0o1777)
    commands.done("blockdiff", "backup", place / "own" / "disk", chain.source)
    conftest.require(os.getuid() == 0, "root")
    os.chown(place / "own", 65534, -1)
    result = commands.run("blockdiff", "backup", place / "own" / "disk", chain.source)
    assert result.returncode == 1 and result.stdout == b""
    assert f"{place}/own belongs to another user (UID 65534), who can replace it and its backups" in str(result.stderr)
