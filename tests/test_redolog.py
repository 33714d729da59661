"""A database that writes its redo log once a second: under the lock all that was committed is in its files."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from blockdiff import mysqllock
from blockdiff.database import redolog
from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Row
from blockdiff.shared.errors import DatabaseError
from tests.conftest import require
from tests.mariadb import MariaDB, execute

STATUS = (
    "---\nLOG\n---\nLog sequence number          {}\nLog buffer assigned up to  9\nLog flushed up to   {}\nPages ..."
)


def answers(*pairs: tuple[int, int]) -> "list[list[Row]]":
    return [[{"Type": "InnoDB", "Name": "", "Status": STATUS.format(*pair)}] for pair in pairs]


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_what_was_committed_before_the_lock_is_in_the_files_under_it(tmp_path: Path, setting: int) -> None:
    require(MariaDB.available(), "the programs mariadbd and mariadb-install-db")
    options = ("--log-bin=binlog", "--server-id=1", f"--innodb-flush-log-at-trx-commit={setting}")
    (tmp_path / "copy").mkdir()
    with MariaDB(tmp_path, *options) as original:
        original.make_tables()
        account = Account(original.user, "", socket=str(original.socket))
        with closing(original.connect()) as writer, mysqllock.connect(account) as database:
            execute(writer, *(f"INSERT INTO shop.innodb VALUES ({number})" for number in range(20)))
            with database.locked():
                shutil.copytree(original.data, tmp_path / "copy" / "data")
    with MariaDB(tmp_path / "copy", *options) as copy:
        (row,) = copy.run("SELECT COUNT(*) AS found FROM shop.innodb")
        assert row["found"] == 20


@pytest.mark.parametrize(("value", "late"), [("0", True), ("1", False), ("2", False), ("3", False)])
def test_only_a_log_that_is_late_is_waited_for(value: str, late: bool) -> None:
    assert redolog.is_late(lambda _statement: [{"Variable_name": "", "Value": value}]) is late


def test_without_innodb_nothing_is_waited_for() -> None:
    assert not redolog.is_late(lambda _statement: [])


def test_the_wait_is_for_what_was_there_at_first_however_much_comes_after() -> None:
    left = answers((10, 5), (20, 9), (30, 10), (40, 10))
    redolog.wait(lambda _statement: left.pop(0))
    assert len(left) == 1


def test_a_log_that_is_never_written_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redolog, "TIMEOUT_S", 0.05)
    with pytest.raises(DatabaseError, match=r"InnoDB has not written its redo log for 0\.05 s") as caught:
        redolog.wait(lambda _statement: answers((10, 5))[0])
    assert "innodb_flush_log_at_trx_commit=1" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("late", "interval_s", "hold_s", "message"),
    [
        ("0", 1, 60, None),
        ("0", 9, 60, None),
        ("1", 600, 60, None),
        ("0", 10, 60, r"only every 10 s, .* 10 s is the limit \(--max-hold is 60 s\)"),
        ("0", 3, 3, r"only every 3 s, .* 3 s is the limit \(--max-hold is 3 s\)"),
    ],
)
def test_a_log_that_is_written_too_seldom_is_seen_before_the_lock(
    late: str, interval_s: int, hold_s: float, message: str | None
) -> None:
    def rows(statement: str) -> "list[Row]":
        return [{"Variable_name": "", "Value": interval_s if "timeout" in statement else late}]

    if message is None:
        redolog.check(rows, hold_s)
        return
    with pytest.raises(DatabaseError, match=message) as caught:
        redolog.check(rows, hold_s)
    assert "innodb_flush_log_at_timeout=1" in str(caught.value.hint)


def test_a_real_server_that_writes_too_seldom_is_refused_before_the_lock(mariadb: MariaDB) -> None:
    account = Account(mariadb.user, "", socket=str(mariadb.socket))
    mariadb.run("SET GLOBAL innodb_flush_log_at_trx_commit=0", "SET GLOBAL innodb_flush_log_at_timeout=600")
    try:
        with mysqllock.connect(account) as database, pytest.raises(DatabaseError, match="only every 600 s"):
            database.check()
    finally:
        mariadb.run("SET GLOBAL innodb_flush_log_at_trx_commit=2", "SET GLOBAL innodb_flush_log_at_timeout=1")


@pytest.mark.parametrize("rows", [[], [{"Status": "nothing of a log"}]])
def test_a_server_that_does_not_say_is_given_up(rows: "list[Row]") -> None:
    with pytest.raises(DatabaseError, match="does not say how much of its redo log is written"):
        redolog.wait(lambda _statement: rows)
