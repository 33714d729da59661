"""Locks that are not to be had, or do not last, and databases on two volumes: no snapshot, and nobody is held up."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands
from tests.lab.mariadb import GuestMariaDB
from tests.lab.shop import PASSWORD, Shop, restored_volume
from tests.mariadb import Running, execute, wait_for

pytestmark = pytest.mark.timeout(900)  # some seconds for each on a machine that has nothing else to do

#: How long a thing may take that should take a moment, in seconds: the guest is slow, and the machine may be busy.
PATIENCE_S = 60.0
_LOCK_WAIT_S = 6
_FOR_LONG = "UPDATE shop.myisam SET padding = SLEEP(600) WHERE session = 0"


@pytest.fixture(autouse=True)
def _stock(open_shop: Shop) -> None:
    """A row that a long statement can be busy with."""
    open_shop.database.run("REPLACE INTO shop.myisam VALUES (0, 0, '')")


@contextmanager
def started(shop: Shop, name: Path, *words: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Yield a backup that runs, in which the database is locked as `words` say."""
    arguments = [shop.guest.url(shop.volume), *shop.arguments(*words)]
    with commands.started("blockdiff", "backup", name, *arguments, env={"MYSQL_PWD": PASSWORD}) as process:
        yield process


def refused(process: "subprocess.Popen[bytes]") -> str:
    """Wait for the end of a run that must fail; return what it said."""
    printed, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, printed) == (1, b""), said
    return said.decode()


def assert_nothing_made(shop: Shop, name: Path) -> None:
    # where the server is who gives up, the agent notices and puts everything away while the command ends
    wait_for(lambda: not shop.snapshots(), "the end of all snapshots", PATIENCE_S)
    assert [path.name for path in name.parent.iterdir() if not path.name.endswith(".lock")] == []


def lock_statements(shop: Shop) -> int:
    """Return how often anybody has asked for a lock for backups."""
    (row,) = shop.database.run("SHOW GLOBAL STATUS LIKE 'Com_backup'")
    return int(str(row["Value"]))


def wait_for_the_lock_to_be_wanted(shop: Shop) -> None:
    def wanted() -> bool:
        rows = shop.database.run("SHOW PROCESSLIST")
        return any("BACKUP" in str(row["Info"]) and "Waiting" in str(row["State"]) for row in rows)

    wait_for(wanted, "a run that waits for the lock", PATIENCE_S)


def has_asked_all(shop: Shop) -> bool:
    """Return whether the session of a run has done nothing for a second."""
    rows = [row for row in shop.database.run("SHOW PROCESSLIST") if row["User"] in ("root", "backup")]
    return any(row["Command"] == "Sleep" and int(str(row["Time"])) >= 1 for row in rows)


@contextmanager
def in_the_way(shop: Shop, how: str) -> Iterator[None]:
    """Let somebody hold a MyISAM table meanwhile: in a long statement, or in a session that does nothing else."""
    if how == "statement":
        running = Running(shop.database, _FOR_LONG)
        try:
            running.wait_until_it_is(1)
            yield
        finally:
            running.end()
    else:
        with closing(shop.database.connect()) as connection:
            execute(connection, "LOCK TABLES shop.myisam WRITE")
            yield


@pytest.mark.parametrize("how", ["statement", "locked table"])
@pytest.mark.parametrize("way", ["ssh", "tcp"])
def test_a_lock_that_is_not_to_be_had_is_given_up_and_writers_go_on(
    open_shop: Shop, tmp_path: Path, how: str, way: str
) -> None:
    url = "ssh" if way == "ssh" else open_shop.url()
    before, name = open_shop.changes(), tmp_path / "shop"
    words = ["--mysql", url, "--lock-wait", str(_LOCK_WAIT_S)]
    with in_the_way(open_shop, how), started(open_shop, name, *words) as process:
        wait_for_the_lock_to_be_wanted(open_shop)
        begun = time.monotonic()
        Running(open_shop.database, "INSERT INTO shop.myisam_counter VALUES (1)").finish()  # behind the run
        stalled_s = time.monotonic() - begun  # what is in the way still is
        said = refused(process)
    match = re.search(r"could not get the lock within ([0-9.]+) s", said)
    assert match is not None, said
    assert _LOCK_WAIT_S - 1 < float(match[1]) < _LOCK_WAIT_S + PATIENCE_S
    assert stalled_s < _LOCK_WAIT_S + PATIENCE_S
    assert open_shop.changes() == before
    assert_nothing_made(open_shop, name)


def test_behind_a_statement_that_is_old_already_no_lock_is_even_asked_for(open_shop: Shop, tmp_path: Path) -> None:
    before, asked, name = open_shop.changes(), lock_statements(open_shop), tmp_path / "shop"
    running = Running(open_shop.database, _FOR_LONG)
    try:
        running.wait_until_it_is(3)
        words = ["--mysql", "ssh", "--lock-wait", str(_LOCK_WAIT_S), "--long-query", "2"]
        with started(open_shop, name, *words) as process:
            said = refused(process)
    finally:
        running.end()
    assert f"a statement (UPDATE) of the user tester in session {running.id} has been running for" in said
    assert lock_statements(open_shop) == asked
    assert open_shop.changes() == before
    assert_nothing_made(open_shop, name)


@pytest.mark.parametrize("way", ["ssh", "tcp"])
def test_a_lock_that_is_lost_before_the_snapshot_is_made_is_a_failure(
    open_shop: Shop, tmp_path: Path, way: str
) -> None:
    url = "ssh" if way == "ssh" else open_shop.url()
    before, name, guest = open_shop.changes(), tmp_path / "shop", open_shop.guest
    guest.run("rm -f /run/in-the-lock /run/go-on")
    wait = "touch /run/in-the-lock; while [ ! -e /run/go-on ]; do sleep 0.05; done"
    with started(open_shop, name, "--mysql", url, "--before", wait) as process:
        wait_for(lambda: guest.run("test -e /run/in-the-lock", check=False).returncode == 0, "the lock", PATIENCE_S)
        wait_for(lambda: has_asked_all(open_shop), "the end of the questions under the lock", PATIENCE_S)
        open_shop.database.kill_others()
        open_shop.database.run("INSERT INTO shop.innodb_counter VALUES (1)")  # so it is gone
        guest.run("touch /run/go-on")
        said = refused(process)
    assert "the lock was lost before the snapshot was made: " in said
    assert open_shop.changes() > before, "the snapshot was to be made, and removed"
    assert_nothing_made(open_shop, name)


# data and redo log on two volumes


@dataclass(frozen=True)
class Split:
    """A database with its data on one volume and its redo log on another."""

    database: GuestMariaDB
    data: str
    redo: str
    freeze: "tuple[str, ...]"
    size: str = "64M"

    @property
    def url(self) -> str:
        return f"mysql+ssh://root@/?socket={self.database.socket}"


@pytest.fixture(scope="module")
def split(open_shop: Shop) -> Iterator[Split]:
    group = open_shop.group
    data, redo = group.volume("split-data", Split.size), group.volume("split-redo", Split.size)
    places = [group.mounted(data), group.mounted(redo)]
    with _server(open_shop, places[0]):
        pass
    open_shop.guest.run(f"chown mysql {places[1]} && mv {places[0]}/data/ib_logfile0 {places[1]}")
    with _server(open_shop, places[0], f"--innodb-log-group-home-dir={places[1]}") as database:
        database.run("CREATE DATABASE kept", "CREATE TABLE kept.kept (n INT PRIMARY KEY) ENGINE=InnoDB")
        stop, go_on = (f"systemctl kill -s {name} {database.unit}" for name in ("STOP", "CONT"))
        yield Split(database, data, redo, ("--before", stop, "--after", go_on))


def _server(shop: Shop, place: str, *options: str) -> GuestMariaDB:
    return GuestMariaDB(shop.guest, f"{place}/data", *options, guest_port=3308, socket="/run/mysqld/split.sock")


def _split_backup(shop: Shop, split: Split, name: Path, *words: str) -> "subprocess.CompletedProcess[bytes]":
    arguments = [shop.guest.url(split.data), *shop.arguments("--mysql", split.url, *words)]
    return commands.run("blockdiff", "backup", name, *arguments, timeout_s=4 * PATIENCE_S)


def test_a_database_of_which_a_part_is_not_in_the_run_is_refused(open_shop: Shop, split: Split, tmp_path: Path) -> None:
    before, name = open_shop.changes(), tmp_path / "data"
    result = _split_backup(open_shop, split, name, *split.freeze)
    assert result.returncode == 1
    missing = (
        f"the database needs files that are not in this run: /mnt/{open_shop.group.name}-split-redo on {split.redo}"
    )
    assert missing.encode() in result.stderr and f"--also NAME={split.redo}".encode() in result.stderr
    assert open_shop.changes() == before
    assert_nothing_made(open_shop, name)


def test_a_database_on_two_volumes_is_refused_without_a_freeze(open_shop: Shop, split: Split, tmp_path: Path) -> None:
    before, name = open_shop.changes(), tmp_path / "data"
    result = _split_backup(open_shop, split, name, "--also", f"{tmp_path / 'redo'}={split.redo}")
    assert result.returncode == 1
    assert (
        b"the database keeps its files on several volumes, whose snapshots are not made at the same time"
        in result.stderr
    )
    assert open_shop.changes() == before
    assert_nothing_made(open_shop, name)


def test_a_database_on_two_volumes_is_restored_from_one_run_with_a_freeze(
    open_shop: Shop, split: Split, tmp_path: Path, large_tmp_path: Path
) -> None:
    names = [tmp_path / "data", tmp_path / "redo"]
    words = ["--also", f"{names[1]}={split.redo}", "--long-query", "3600", *split.freeze]
    inserting = Running(
        split.database, "BEGIN NOT ATOMIC FOR i IN 1..1000000 DO INSERT INTO kept.kept VALUES (i); END FOR; END"
    )
    try:
        wait_for(lambda: _kept(split.database) > 0, "a first row", PATIENCE_S)
        result = _split_backup(open_shop, split, names[0], *words)
        assert (result.returncode, result.stderr) == (0, b""), result.stderr
    finally:
        inserting.end()
    data, redo = json.loads(result.stdout)
    assert data["run"] == redo["run"] and data["database"] == redo["database"]
    assert (data["quiesced"]["by"], data["consistency"], redo["consistency"]) == ("mysql", "quiesced", "quiesced")
    open_shop.assert_no_snapshot()
    split.database.stop()
    with ExitStack() as stack:
        copies = [restored_volume(open_shop.group, f"{name}@1", large_tmp_path, split.size) for name in names]
        places = [stack.enter_context(copy) for copy in copies]
        copy = _server(open_shop, places[0], f"--innodb-log-group-home-dir={places[1]}")
        database = stack.enter_context(copy)
        assert "[ERROR]" not in database.log()
        assert {row["Msg_text"] for row in database.run("CHECK TABLE kept.kept EXTENDED")} == {"OK"}
        (row,) = database.run("SELECT MAX(n) AS last FROM kept.kept")
        assert row["last"] == _kept(database) > 0


def _kept(database: GuestMariaDB) -> int:
    (row,) = database.run("SELECT COUNT(*) AS kept FROM kept.kept")
    return int(str(row["kept"]))
