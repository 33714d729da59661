"""A few tests that reach every dependency: `python3 -m tests.dependencies` runs them with the oldest and the newest."""

from pathlib import Path

import pytest

from blockdiff import mysqllock
from blockdiff.database.accounts import Account
from blockdiff.mysqllock import Limits
from tests import chains, commands, terminal
from tests.chains import DAYS, SmallChain
from tests.mariadb import MariaDB
from tests.sshd import Sshd


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.new_chain(tmp_path)


def test_every_command_starts() -> None:
    for name in ("authorize", "backup", "list", "repair", "restore", "snapshots", "status", "verify"):
        assert b"Usage: blockdiff " in commands.done("blockdiff", name, "--help")
    for name in ("blockdiff_backup", "blockdiff_dump", "blockdiff_merge", "cronlog", "ssh_lvm_dump"):
        assert b"Usage: " in commands.done(name, "--help")


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("digest", ["sha256", "xxh3"])
def test_a_chain_is_made_verified_and_restored(chain: SmallChain, compression: str, digest: str) -> None:
    options = ("--compression", compression, "--digest", digest, "--block-size", "64")
    for number, image in enumerate(DAYS, 1):
        chain.source.write_bytes(image)
        chain.images[number] = image
        commands.done("blockdiff", "backup", *options, chain.name, chain.source)
    commands.done("blockdiff", "verify", chain.name)
    chain.assert_sound()


@pytest.mark.parametrize("transport", ["ssh", "paramiko"])
def test_a_source_is_read_over_ssh(sshd: Sshd, chain: SmallChain, transport: str) -> None:
    for number, image in enumerate(DAYS, 1):
        chain.source.write_bytes(image)
        chain.images[number] = image
        words = ("--transport", transport, *sshd.arguments, chain.name, sshd.url(chain.source))
        commands.done("blockdiff", "backup", *words)
    chain.assert_sound()


def test_a_terminal_gets_a_bar(chain: SmallChain) -> None:
    chain.source.write_bytes(DAYS[0] * 1000)
    status, shown = terminal.run("blockdiff", "backup", chain.name, chain.source)
    assert status == 0 and "generation 1: full" in shown


def test_a_database_is_locked(mariadb: MariaDB) -> None:
    account = Account(mariadb.user, "", socket=str(mariadb.socket))
    with mysqllock.connect(account, Limits()) as database, database.locked() as held:
        assert held.coordinates() is not None
        held.prove()
        held.release()
