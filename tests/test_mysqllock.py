"""The lock on a real MariaDB: it holds writers, it is bounded, it is proven, and it goes whatever happens.

MySQL itself is on no test machine: what is done differently there is in test_coordinates.py, and the choice of
statements here.
"""

import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from types import SimpleNamespace

import pytest

from blockdiff import mysqllock
from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Row, Version
from blockdiff.mysqllock import Database, Limits, Statements
from blockdiff.shared.errors import BlockdiffError, DatabaseError
from tests.mariadb import ENGINES, MariaDB, Running, execute, own_id, wait_for

READ_LOCK = Statements(before=["FLUSH TABLES WITH READ LOCK"])
LOCKED = ["issuing lock statement: BACKUP STAGE START", "issuing lock statement: BACKUP STAGE BLOCK_COMMIT"]
LIMITS = Limits()
CHOSEN = Statements()
STATEMENTS = [CHOSEN, READ_LOCK]
LOST = "the lock was lost before the snapshot was made"


def root(mariadb: MariaDB) -> Account:
    return Account(mariadb.user, "", socket=str(mariadb.socket))


def connect(mariadb: MariaDB, limits: Limits = LIMITS, statements: Statements = CHOSEN) -> Database:
    return mysqllock.connect(root(mariadb), limits, statements)


# --- held and released


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("statements", STATEMENTS, ids=["backup stage", "read lock"])
def test_writers_stand_still_until_the_lock_is_released(mariadb: MariaDB, engine: str, statements: Statements) -> None:
    with connect(mariadb, statements=statements) as database, database.locked() as held:
        writer = Running(mariadb, f"INSERT INTO shop.{engine} VALUES (1)")
        writer.wait_until_it_waits()
        held.prove()
        assert not writer.done
        held.release()
        writer.finish()
    mariadb.assert_free()


def test_the_lock_is_released_at_the_end_of_the_block(mariadb: MariaDB) -> None:
    said: list[str] = []
    with mysqllock.connect(root(mariadb), say=said.append) as database:
        with database.locked() as held:
            assert held.statements == ("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT")
            assert said == LOCKED
            writer = Running(mariadb, "INSERT INTO shop.innodb VALUES (1)")
            writer.wait_until_it_waits()
        writer.finish()
        assert said == [*LOCKED, "issuing unlock statement: BACKUP STAGE END"]
        assert 0 < held.held_s == held.held_s
        assert 0 < held.waited_s < 30
        with database.locked():  # and can be had again
            pass
    mariadb.assert_free()


def test_readers_go_on_under_the_lock(mariadb: MariaDB) -> None:
    with connect(mariadb) as database, database.locked():
        mariadb.run(*(f"SELECT COUNT(*) FROM shop.{engine}" for engine in ENGINES))


def test_coordinates_do_not_move_under_the_lock(mariadb: MariaDB) -> None:
    with connect(mariadb) as database, database.locked() as held:
        before = held.coordinates()
        writer = Running(mariadb, "INSERT INTO shop.innodb VALUES (1)")
        writer.wait_until_it_waits()
        assert held.coordinates() == before
        held.release()
        writer.finish()
        assert held.coordinates() != before


@pytest.mark.parametrize("statements", STATEMENTS, ids=["backup stage", "read lock"])
def test_an_error_under_the_lock_ends_it_at_once(mariadb: MariaDB, statements: Statements) -> None:
    with connect(mariadb, statements=statements) as database:
        with pytest.raises(ZeroDivisionError), database.locked():
            1 / 0  # noqa: B018
        mariadb.assert_free()


def test_an_unlock_statement_of_the_user_is_issued_after_an_error_too(mariadb: MariaDB) -> None:
    statements = Statements(["SET GLOBAL read_only=1"], ["SET GLOBAL read_only=0"])
    with connect(mariadb, statements=statements) as database, pytest.raises(ZeroDivisionError), database.locked():
        assert mariadb.run("SELECT @@GLOBAL.read_only AS it")[0]["it"] == 1
        1 / 0  # noqa: B018
    assert mariadb.run("SELECT @@GLOBAL.read_only AS it")[0]["it"] == 0


def test_what_was_locked_is_unlocked_where_a_later_statement_fails(mariadb: MariaDB) -> None:
    statements = Statements(["SET GLOBAL read_only=1", "NONSENSE"], ["SET GLOBAL read_only=0"])
    with (
        connect(mariadb, statements=statements) as database,
        pytest.raises(DatabaseError, match="NONSENSE"),
        database.locked(),
    ):
        pass
    assert mariadb.run("SELECT @@GLOBAL.read_only AS it")[0]["it"] == 0


def test_a_failing_unlock_statement_ends_the_session(mariadb: MariaDB) -> None:
    statements = Statements(["FLUSH TABLES WITH READ LOCK"], ["NONSENSE"])
    with connect(mariadb, statements=statements) as database:
        with pytest.raises(DatabaseError, match="NONSENSE"), database.locked():
            pass
        mariadb.assert_free()


@pytest.mark.parametrize(
    ("version", "statements", "chosen"),
    [
        ("10.4.1-MariaDB", Statements(), (("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"), ("BACKUP STAGE END",))),
        ("10.4.0-MariaDB", Statements(), (("FLUSH TABLES WITH READ LOCK",), ("UNLOCK TABLES",))),
        ("8.4.3", Statements(), (("FLUSH TABLES WITH READ LOCK",), ("UNLOCK TABLES",))),
        ("11.4.2-MariaDB", Statements(before=["A"]), (["A"], ("UNLOCK TABLES",))),
        ("11.4.2-MariaDB", Statements(after=["B"]), (("FLUSH TABLES WITH READ LOCK",), ["B"])),
        ("8.4.3", Statements(["A"], ["B"]), (["A"], ["B"])),
    ],
)
def test_the_statements_follow_the_server_unless_they_are_given(
    version: str, statements: Statements, chosen: tuple[Sequence[str], Sequence[str]]
) -> None:
    assert statements.chosen(Version.parse(version)) == chosen


# --- waits


def test_a_long_statement_is_told_without_its_text_and_left_alone(mariadb: MariaDB) -> None:
    statement = Running(mariadb, "SELECT SLEEP(100), 'secret'")
    statement.wait_until_it_is(1)
    with connect(mariadb, Limits(lock_wait_s=1, long_query_s=0.5)) as database:
        with pytest.raises(DatabaseError) as caught, database.locked():
            pytest.fail("there was a lock")
        told = f"a statement (SELECT) of the user {mariadb.user} in session {statement.id} has been running for"
        assert told in caught.value.message and "secret" not in repr(caught.value)
        assert "--long-query (now 0.5 s)" in str(caught.value.hint) and "--lock-wait (now 1 s)" in str(
            caught.value.hint
        )
        assert not statement.done
    statement.end()
    mariadb.assert_free()


def test_a_long_statement_that_ends_in_time_is_waited_for(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    with closing(mariadb.connect()) as other:
        execute(other, "SELECT GET_LOCK('other', 0)")
        statement = Running(mariadb, "SELECT GET_LOCK('other', 600)")
        statement.wait_until_it_is(1)

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 1:  # the list of sessions may show it for a moment longer
                execute(other, "SELECT RELEASE_LOCK('other')")
                statement.finish()

        with connect(mariadb, Limits(lock_wait_s=60, long_query_s=0.5)) as database:
            monkeypatch.setattr(mysqllock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
            with database.locked() as held:
                assert statement.done and held.waited_s > 0
    assert pauses


def test_sessions_that_sleep_are_no_long_statements(mariadb: MariaDB) -> None:
    with closing(mariadb.connect()) as sleeping:
        number = own_id(sleeping)
        wait_for(
            lambda: any(row["Id"] == number and int(str(row["Time"])) >= 1 for row in mariadb.run("SHOW PROCESSLIST")),
            "a session that sleeps",
        )
        with connect(mariadb, Limits(lock_wait_s=30, long_query_s=0.5)) as database, database.locked():
            pass


def session(number: int, user: str, command: str, statement: str | None) -> Row:
    return {"Id": number, "User": user, "Command": command, "Time": 500, "State": "", "Info": statement}


NO_STATEMENTS = [
    session(1, "app", "Query", "SHOW PROCESSLIST"),  # our own
    session(2, "app", "Sleep", None),
    session(3, "event_scheduler", "Daemon", None),
    session(4, "system user", "Query", "INSERT INTO t VALUES (1)"),  # an applier of MySQL 8
    session(5, "system user", "Slave_worker", "INSERT INTO t VALUES (1)"),  # one of MariaDB
    session(6, "replica", "Binlog Dump GTID", None),
    session(7, "unauthenticated user", "Connect", None),
    session(7, "app", "Reset connection", None),
    {**session(8, "app", "Query", "SELECT 1"), "Time": 60},
    {**session(9, "app", "Query", "SELECT 1"), "Time": None},
]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            session(10, "app", "Query", "select secret"),
            "(SELECT) of the user app in session 10 has been running for 500 s",
        ),
        (session(10, "app", "Execute", "/* x */ UPDATE t"), "(Execute) of the user app"),
        (session(10, "owner", "Connect", "DELETE FROM t"), "(DELETE) of the user owner"),  # an event of the schedule
    ],
)
def test_only_statements_of_users_are_waited_for(
    mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch, row: Row, told: str
) -> None:
    with connect(mariadb, Limits(lock_wait_s=0.1)) as database:
        monkeypatch.setattr(database._session, "number", lambda _: 1)
        monkeypatch.setattr(database._session, "rows", lambda _: NO_STATEMENTS)
        database._wait_for_long_statements(0)
        monkeypatch.setattr(database._session, "rows", lambda _: [*NO_STATEMENTS, row])
        with pytest.raises(DatabaseError) as caught:
            database._wait_for_long_statements(0)
    assert told in caught.value.message and "secret" not in caught.value.message


@pytest.mark.parametrize("statements", STATEMENTS, ids=["backup stage", "read lock"])
def test_a_lock_that_is_not_to_be_had_is_given_up_and_writers_go_on(mariadb: MariaDB, statements: Statements) -> None:
    with closing(mariadb.connect()) as other, connect(mariadb, Limits(lock_wait_s=1), statements) as database:
        execute(other, "LOCK TABLES shop.myisam WRITE")
        with (
            pytest.raises(DatabaseError, match=r"could not get the lock within [1-4]\.\d s") as caught,
            database.locked(),
        ):
            pytest.fail("there was a lock")
        assert "--lock-wait (now 1 s)" in str(caught.value.hint)
        assert "lock statement" not in str(caught.value)
        execute(other, "INSERT INTO shop.myisam VALUES (1)")
        mariadb.run("SET SESSION lock_wait_timeout=1", "INSERT INTO shop.innodb VALUES (1)")
    mariadb.assert_free()


def test_the_whole_wait_is_bounded_where_several_locks_are_behind_one_statement(mariadb: MariaDB) -> None:
    """MariaDB applies lock_wait_timeout to each: another limit holds for all of them."""
    statements = Statements(["SELECT SLEEP(50)"], [])
    refused = pytest.raises(DatabaseError, match=r"could not get the lock within [1-4]\.\d s")
    with connect(mariadb, Limits(lock_wait_s=1), statements) as database, refused, database.locked():
        pytest.fail("there was a lock")


def test_the_bound_of_the_wait_is_none_of_what_is_done_under_the_lock(mariadb: MariaDB) -> None:
    unbound = "SELECT IF(@@max_statement_time=0, 1, (SELECT 1 UNION SELECT 2))"  # fails otherwise
    statements = Statements(["FLUSH TABLES WITH READ LOCK"], [unbound, "UNLOCK TABLES"])
    with connect(mariadb, Limits(lock_wait_s=30), statements) as database, database.locked():
        pass


# --- lost


def test_a_session_that_was_killed_is_no_lock(mariadb: MariaDB) -> None:
    with connect(mariadb) as database:
        with pytest.raises(DatabaseError, match=LOST) as caught, database.locked() as held:
            mariadb.kill_others()
            held.prove()
        assert caught.value.hint == "what was made is not consistent; run it again"
    mariadb.assert_free()


def test_the_server_itself_ends_a_lock_whose_owner_is_silent(mariadb: MariaDB) -> None:
    lost = pytest.raises(DatabaseError, match=f"{LOST}: the database ended it after the 3 s of --max-hold")
    with connect(mariadb, Limits(max_hold_s=3)) as database:
        with lost as caught, database.locked() as held:
            writer = Running(mariadb, "INSERT INTO shop.innodb VALUES (1)")
            writer.finish()  # nothing here has released it
            held.prove()
        assert "raise --max-hold" in str(caught.value.hint)
    mariadb.assert_free()


def test_a_lock_that_was_held_for_too_long_proves_nothing(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(mariadb) as database:
        with (
            pytest.raises(DatabaseError, match=r"longer than the 0\.1 s of --max-hold") as caught,
            database.locked() as held,
        ):
            monkeypatch.setattr(
                held, "_max_hold_s", 0.1
            )  # the server itself counts whole seconds, and ends the session
            wait_for(lambda: held.held_s > 0.1, "some time")
            held.prove()
        assert "--max-hold" in str(caught.value.hint)
    mariadb.assert_free()


def test_a_proxy_that_answers_from_another_session_is_found(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = pytest.raises(DatabaseError, match=f"{LOST}: .* answers from another session")
    with connect(mariadb) as database, lost, database.locked() as held:
        monkeypatch.setattr(held, "_id", -1)
        held.prove()


# --- logging in, and what the account may do


def test_a_connection_that_is_there_already_is_used(mariadb: MariaDB) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(mariadb.socket))
    with (
        mysqllock.connect(Account(mariadb.user, "", through_ssh=True), sock=sock) as database,
        database.locked() as held,
    ):
        held.prove()
    assert sock.fileno() == -1


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(mysqllock, "_GRACE_S", 0.1)
    with (
        closing(theirs),
        pytest.raises(DatabaseError, match="cannot log in to the host's own database as u: no complete answer"),
    ):
        mysqllock.connect(Account("u", "", through_ssh=True), Limits(lock_wait_s=0.1), sock=ours)


@pytest.mark.parametrize(
    ("account", "message", "hint"),
    [
        (Account("backup", "secret"), "as backup: Access denied for user 'backup'", "check user and password"),
        (Account("nobody", "secret"), "as nobody: Access denied for user 'nobody'", "check user and password"),
        (Account("root", "secret", database="none"), "as root: Unknown database 'none'", "the lock does not need one"),
    ],
)
def test_a_login_that_is_refused_names_itself(
    mariadb: MariaDB, backup_account: Account, account: Account, message: str, hint: str
) -> None:
    user = mariadb.user if account.user == "root" else account.user
    fitting = Account(user, account.password, socket=backup_account.socket, database=account.database)
    with pytest.raises(DatabaseError) as caught:
        mysqllock.connect(fitting)
    assert message.replace("root", mariadb.user) in caught.value.message and hint in str(caught.value.hint)
    assert "secret" not in everything(caught.value)


def everything(error: BlockdiffError) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__) + str(error.hint)


@pytest.mark.parametrize(
    ("account", "message", "hint"),
    [
        (
            Account("u", "", "127.0.0.1", 1),
            "cannot reach the database on 127.0.0.1:1: Connection refused",
            "listen to the network",
        ),
        (
            Account("u", "", socket="/nowhere.sock"),
            "cannot reach the database at /nowhere.sock: No such file or directory",
            "is this its socket",
        ),
        (
            Account("u", "", "nowhere.invalid"),
            "cannot reach the database on nowhere.invalid:3306: ",
            "listen to the network",
        ),
    ],
)
def test_a_server_that_is_not_there_names_itself(account: Account, message: str, hint: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        mysqllock.connect(account)
    assert message in caught.value.message and hint in str(caught.value.hint)


def test_all_missing_privileges_are_named_at_once_with_what_grants_them(
    mariadb: MariaDB, backup_account: Account
) -> None:
    names = "PROCESS, RELOAD, BINLOG MONITOR, SLAVE MONITOR"
    with mysqllock.connect(backup_account) as database, pytest.raises(DatabaseError) as caught:
        database.check()
    assert caught.value.message.endswith(f": backup lacks the privileges {names}")
    assert caught.value.hint == f"GRANT {names} ON *.* TO `backup`@`localhost`"
    mariadb.run(caught.value.hint)
    with mysqllock.connect(backup_account) as database:
        server = database.check()
        with database.locked() as held:
            held.coordinates()
            held.prove()
    assert server.files.needed == (str(mariadb.data),)
    assert server.hostname == socket.gethostname()


@pytest.mark.parametrize("name", ["PROCESS", "RELOAD", "BINLOG MONITOR", "SLAVE MONITOR"])
def test_each_missing_privilege_names_itself(mariadb: MariaDB, backup_account: Account, name: str) -> None:
    mariadb.run(
        "GRANT PROCESS, RELOAD, BINLOG MONITOR, SLAVE MONITOR ON *.* TO backup@localhost",
        f"REVOKE {name} ON *.* FROM backup@localhost",
    )
    with mysqllock.connect(backup_account) as database, pytest.raises(DatabaseError) as caught:
        database.check()
    assert caught.value.message.endswith(f": backup lacks the privilege {name}")
    assert caught.value.hint == f"GRANT {name} ON *.* TO `backup`@`localhost`"


def test_without_coordinates_and_with_other_statements_less_is_needed(
    mariadb: MariaDB, backup_account: Account
) -> None:
    mariadb.run("GRANT PROCESS ON *.* TO backup@localhost")
    with mysqllock.connect(backup_account, statements=Statements(["SELECT 1"], ["SELECT 2"])) as database:
        database.check(with_coordinates=False)
        with pytest.raises(DatabaseError, match="lacks the privileges BINLOG MONITOR, SLAVE MONITOR"):
            database.check()
