"""`blockdiff backup --lvm --mysql` with a real MariaDB and a stand-in for LVM: held, proven, recorded, released."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from blockdiff import backup, mysqllock
from blockdiff.backup import Options, VolumeOptions
from blockdiff.database import accounts, sqlsession
from blockdiff.database.coordinates import Coordinates
from blockdiff.mysqllock import Limits
from blockdiff.progress import Progress
from blockdiff.quiesce import DatabaseQuiesce
from blockdiff.shared.errors import BlockdiffError, DatabaseError, SourceError
from blockdiff.transport.address import Address
from tests import chains, commands, processes
from tests.chains import SmallChain
from tests.descriptors import all_closed
from tests.fake_lvm import FakeLvm
from tests.mariadb import MariaDB, Running, execute

LIMIT_S = 30.0
MIB = 1 << 20
SECRET = "hu#sh 'secret'"
ROOT = Path(__file__).resolve().parent.parent

#: The command, which does not mind where the database lies.
ANYWHERE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from blockdiff.quiesce import DatabaseQuiesce
DatabaseQuiesce.check = lambda self, ready, session: None
from blockdiff.cli.modern import main
main()
"""


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No process and no descriptor outlives the test; yields the mark by which processes are known."""
    with all_closed(), processes.leaving_none(monkeypatch) as mark:
        yield mark


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database does not lie on the pretended volume, which is no reason to refuse it here."""
    monkeypatch.setattr(DatabaseQuiesce, "check", lambda self, ready, session: None)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLvm]:
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("vg", 200 * MIB)
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    yield fake
    fake.go()


@pytest.fixture
def chain(tmp_path: Path, fake: FakeLvm, mariadb: MariaDB) -> Iterator[SmallChain]:
    """A chain of the volume vg/lv; at the end the database is free, and no snapshot is left."""
    chain = chains.new_chain(tmp_path)
    chain.source = fake.add_file("vg", "lv", os.urandom(MIB))
    yield chain
    mariadb.assert_free()
    assert fake.snapshots() == []


@pytest.fixture
def network_user(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The user of an account that may do what is needed, over the network, with a password in the environment."""
    name = "'net'@'%'"
    mariadb.run(
        f"CREATE USER {name} IDENTIFIED BY 'hu#sh ''secret'''",
        f"GRANT PROCESS, RELOAD, BINLOG MONITOR, SLAVE MONITOR ON *.* TO {name}",
    )
    monkeypatch.setenv("MYSQL_PWD", SECRET)
    yield "net"
    mariadb.run(f"DROP USER {name}")


def options(url: str, limits: Limits | None = None, before: str | None = None) -> Options:
    account = accounts.from_url(url)
    return Options(volumes=VolumeOptions(database=account, limits=limits or Limits()), before=before)


def through_socket(mariadb: MariaDB) -> str:
    return f"mysql://{mariadb.user}:@localhost/?socket={mariadb.socket}"


def through_ssh(mariadb: MariaDB) -> str:
    """The form for the host's own socket; the host is this machine, and the user the agent's."""
    return f"mysql+ssh:///?socket={mariadb.socket}"


FORMS = [through_socket, through_ssh]


def failed(chain: SmallChain, chosen: Options) -> BlockdiffError:
    before = chain.files()
    with pytest.raises(BlockdiffError) as caught:
        chain.add(None, chosen)
    assert chain.files() == before
    assert SECRET not in str(caught.value.message) + str(caught.value.hint)
    return caught.value


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def position(mariadb: MariaDB) -> tuple[str, int]:
    (row,) = mariadb.run("SHOW MASTER STATUS")
    return str(row["File"]), int(str(row["Position"]))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when the run has asked for the coordinates: it then waits for the snapshot alone."""
    found, coordinates = threading.Event(), mysqllock.Held.coordinates

    def asked(held: mysqllock.Held) -> Coordinates:
        result = coordinates(held)
        found.set()
        return result

    monkeypatch.setattr(mysqllock.Held, "coordinates", asked)
    return found


def meanwhile(fake: FakeLvm, do: Callable[[], object], after: threading.Event | None = None) -> threading.Thread:
    """Do something, in a thread, while `lvcreate` is at work (`after` something else), then let that go on."""
    fake.order("lvcreate", "late", 1)

    def run() -> None:
        try:
            wait_until((fake.directory / "waiting").exists)
            assert after is None or after.wait(LIMIT_S)
            do()
        finally:
            fake.go()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


# --- what a run makes


@pytest.mark.parametrize(
    ("held", "others", "consistencies"),
    [
        ({0}, 1, ["quiesced", "snapshot"]),
        ({0}, 2, ["quiesced", "snapshot", "snapshot"]),
        (None, 1, ["quiesced", "quiesced"]),
    ],
)
def test_of_several_volumes_the_lock_holds_those_of_the_database(
    chain: SmallChain,
    mariadb: MariaDB,
    fake: FakeLvm,
    monkeypatch: pytest.MonkeyPatch,
    held: set[int] | None,
    others: int,
    consistencies: list[str],
) -> None:
    """While its one volume cannot change, another may be taken at any moment, but not two. Without a look, none."""

    def check(quiesced: DatabaseQuiesce, ready: object, session: object) -> None:
        quiesced._held = held

    monkeypatch.setattr(DatabaseQuiesce, "check", check)
    targets = [(chain.name, str(chain.source))]
    for number in range(others):
        targets.append((f"{chain.name}-{number}", str(fake.add_file("vg", f"other{number}", os.urandom(MIB)))))
    results = backup.backup_together(targets, Address(None, str(chain.source)), options(through_socket(mariadb)))
    assert [result.manifest.consistency for result in results] == consistencies
    is_one_moment = held is not None and others == 1
    for result in results:
        assert [warning.split(" were made")[0] for warning in result.warnings] == (
            [] if is_one_moment else ["the snapshots of this run"]
        )


@pytest.mark.parametrize("form", FORMS)
def test_coordinates_and_lock_are_recorded(chain: SmallChain, mariadb: MariaDB, form: Callable[[MariaDB], str]) -> None:
    mariadb.run("INSERT INTO shop.innodb VALUES (7)")
    expected = position(mariadb)
    made = chain.add(None, options(form(mariadb))).manifest
    assert made.consistency == "quiesced"
    assert made.quiesced is not None and made.snapshot is not None and made.database is not None
    assert made.quiesced.by == "mysql"
    assert made.quiesced.statements == ["BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"]
    assert made.quiesced.held_s > made.snapshot.took_s - 0.001 > 0  # that is in whole milliseconds
    assert made.quiesced.waited_s is not None and 0 <= made.quiesced.waited_s < LIMIT_S
    (entry,) = json.loads(commands.done("blockdiff", "list", "--json", chain.name))
    assert entry["database"]["server_version"] == made.database.server_version
    assert (entry["database"]["binlog_file"], entry["database"]["binlog_position"]) == expected
    assert entry["quiesced"]["held_s"] == made.quiesced.held_s
    statement = commands.done("blockdiff", "list", f"{chain.name}@1", "--replica-statement").decode()
    assert f"\nSET GLOBAL gtid_slave_pos='{made.database.gtid}';\nCHANGE MASTER TO " in statement
    assert statement.endswith(";\n") and not statement.endswith("\n\n")


def test_an_account_with_a_password_over_the_network(chain: SmallChain, mariadb: MariaDB, network_user: str) -> None:
    made = chain.add(None, options(f"mysql://{network_user}@127.0.0.1:{mariadb.port}/")).manifest
    assert made.database is not None
    for content in chain.files().values():
        assert b"secret" not in content


def test_a_generation_without_coordinates_seeds_no_replica(chain: SmallChain) -> None:
    chain.add(None, Options(volumes=VolumeOptions()))
    result = commands.run("blockdiff", "list", chain.name, "--replica-statement")
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"generation 1 was made without a database lock, and has no coordinates" in result.stderr
    assert b"--mysql" in result.stderr


@pytest.mark.parametrize("form", FORMS)
def test_writers_stand_still_while_the_snapshot_is_made_and_not_longer(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str]
) -> None:
    writers: list[Running] = []

    def write() -> None:
        writers.append(Running(mariadb, "INSERT INTO shop.myisam VALUES (8)"))
        writers[0].wait_until_it_waits()

    before = position(mariadb)
    thread = meanwhile(fake, write)
    made = chain.add(None, options(form(mariadb))).manifest
    thread.join(LIMIT_S)
    writers[0].finish()
    assert made.database is not None and position(mariadb) != before
    assert (made.database.binlog_file, made.database.binlog_position) == before


def test_the_database_is_written_to_while_the_dump_goes_on(chain: SmallChain, mariadb: MariaDB, fake: FakeLvm) -> None:
    class Writing(Progress):
        def begin(self, total: int | None) -> None:
            mariadb.run("SET SESSION lock_wait_timeout=1", "INSERT INTO shop.myisam VALUES (9)")
            assert len(fake.snapshots()) == 1
            wait_until(lambda: mariadb.sessions() == 0)
            begun.append(total)

    begun: list[int | None] = []
    chain.add(None, options(through_ssh(mariadb)), Writing())
    assert begun == [MIB]


def test_a_freeze_and_a_lock_go_together(chain: SmallChain, mariadb: MariaDB, tmp_path: Path) -> None:
    made = chain.add(None, options(through_ssh(mariadb), before=f"touch '{tmp_path}/frozen'")).manifest
    assert made.quiesced is not None and made.quiesced.by == "mysql"
    assert (tmp_path / "frozen").exists()


def test_a_login_over_a_network_without_tls_is_noted(
    chain: SmallChain, mariadb: MariaDB, network_user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's own address is none, so it is taken for another one here."""
    url = f"mysql://{network_user}@127.0.0.1:{mariadb.port}/"
    assert chain.add(None, options(url)).manifest.notes == []
    monkeypatch.setattr(sqlsession, "_is_loopback", lambda sock: False)
    result = chain.add(None, options(url))
    (note,) = result.manifest.notes
    assert note.startswith(f"the login to the database on 127.0.0.1:{mariadb.port} went over the network without encry")
    assert note.endswith("; ?ssl-ca=FILE or mysql+ssh:// encrypt")
    assert result.warnings == []


@pytest.mark.parametrize("form", FORMS)
def test_a_binary_log_that_grows_under_the_lock_means_no_coordinates_and_a_warning(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str]
) -> None:
    """A statement into an Aria table that is aborted while it waits is written to it all the same."""

    def abort() -> None:
        writer = Running(mariadb, "INSERT INTO shop.aria VALUES (8)")
        writer.wait_until_it_waits()
        before = position(mariadb)
        mariadb.run(f"KILL QUERY {writer.id}")
        wait_until(lambda: writer.done)
        assert position(mariadb) != before
        writer.end()

    thread = meanwhile(fake, abort)
    result = chain.add(None, options(form(mariadb)))
    thread.join(LIMIT_S)
    (warning,) = result.warnings
    assert warning.startswith("this generation has no coordinates: the binary log grew while the database was locked")
    assert result.manifest.database is None and result.manifest.quiesced is not None
    assert result.manifest.notes == [warning]
    assert chain.add(None, options(form(mariadb))).manifest.database is not None


@contextmanager
def applying(mariadb: MariaDB) -> Iterator[None]:
    """Let the database be a replica meanwhile, which applies what it has; its source does not answer."""
    mariadb.run("CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT=1", "START SLAVE SQL_THREAD")
    wait_until(lambda: applier(mariadb) == "Yes")
    try:
        yield
    finally:
        mariadb.run("STOP SLAVE", "RESET SLAVE ALL")


def applier(mariadb: MariaDB) -> object:
    (row,) = mariadb.run("SHOW ALL SLAVES STATUS")
    return row["Slave_SQL_Running"]


def test_a_replica_with_tables_that_do_not_undo_has_no_coordinates_and_a_warning(
    chain: SmallChain, mariadb: MariaDB
) -> None:
    with applying(mariadb):
        result = chain.add(None, options(through_ssh(mariadb)))
        assert applier(mariadb) == "Yes"
    (warning,) = result.warnings
    assert "is a replica with tables without transactions (MyISAM, Aria)" in warning and "--replica-pause" in warning
    assert result.manifest.database is None and result.manifest.notes == [warning]


def test_a_replica_whose_applier_stands_still_has_coordinates(chain: SmallChain, mariadb: MariaDB) -> None:
    with applying(mariadb):
        mariadb.run("STOP SLAVE SQL_THREAD")
        made = chain.add(None, options(through_ssh(mariadb)))
    assert made.warnings == [] and made.manifest.database is not None


def test_what_a_login_does_not_see_of_a_replica_is_not_taken_for_nothing(
    chain: SmallChain, mariadb: MariaDB, network_user: str
) -> None:
    url = f"mysql://{network_user}@127.0.0.1:{mariadb.port}/"
    with applying(mariadb):
        (warning,) = chain.add(None, options(url)).warnings
        assert "this login cannot see whether it has tables without transactions" in warning
        mariadb.run("GRANT SELECT ON *.* TO net@'%'")
        (warning,) = chain.add(None, options(url)).warnings
        assert "is a replica with tables without transactions" in warning


# --- failures


@pytest.mark.parametrize("form", FORMS)
def test_a_lock_that_is_lost_while_the_snapshot_is_made_is_a_failed_run(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, known: threading.Event, form: Callable[[MariaDB], str]
) -> None:
    thread = meanwhile(fake, mariadb.kill_others, known)
    error = failed(chain, options(form(mariadb)))
    thread.join(LIMIT_S)
    assert type(error) is DatabaseError
    assert error.message.startswith("the lock was lost before the snapshot was made")
    wait_until(lambda: fake.snapshots() == [])
    assert len(fake.calls("lvcreate")) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_lock_that_is_held_for_too_long_is_a_failed_run(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, known: threading.Event, form: Callable[[MariaDB], str]
) -> None:
    """The database ends it by itself, so that the writer is let through before `lvcreate` is done."""
    thread = meanwhile(fake, lambda: Running(mariadb, "INSERT INTO shop.myisam VALUES (1)").finish(), known)
    error = failed(chain, options(form(mariadb), Limits(max_hold_s=3)))
    thread.join(LIMIT_S)
    assert type(error) is DatabaseError
    assert (
        error.message
        == "the lock was lost before the snapshot was made: the database ended it after the 3 s of --max-hold"
    )
    assert "raise --max-hold" in str(error.hint)


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_that_cannot_be_made_is_what_is_told(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str]
) -> None:
    """Whatever becomes of the database session when the agent ends."""
    fake.order("lvcreate", "fail")
    error = failed(chain, options(form(mariadb)))
    assert type(error) is SourceError
    assert error.message.startswith("localhost: cannot make a snapshot of vg/lv: lvcreate exited with status 5: ")


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_backed_up_is_told_before_anything_is_locked(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str]
) -> None:
    fake.add_group("vg", 0)
    assert "no room in the volume group vg" in failed(chain, options(form(mariadb))).message


@pytest.mark.parametrize("form", FORMS)
def test_a_long_statement_is_not_waited_for_longer_than_allowed(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str]
) -> None:
    statement = Running(mariadb, "SELECT SLEEP(100)")
    statement.wait_until_it_is(1)
    error = failed(chain, options(form(mariadb), Limits(lock_wait_s=1, long_query_s=0.5)))
    assert type(error) is DatabaseError and "has been running for" in error.message
    assert fake.calls("lvcreate") == []
    statement.end()


def test_a_dry_run_logs_in_and_waits_for_no_lock(
    chain: SmallChain, fake: FakeLvm, mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else holds the lock, which a run would have to wait for."""
    targets, here = [(chain.name, str(chain.source))], Address(None, str(chain.source))
    with closing(mariadb.connect()) as session:
        execute(session, "BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT")
        (planned,) = backup.rehearse(targets, here, options(through_socket(mariadb)))
    assert (planned.number, planned.old) == (1, None)
    monkeypatch.setenv("MYSQL_PWD", "wrong")
    with pytest.raises(DatabaseError, match=r"refused the login|Access denied"):
        backup.rehearse(targets, here, options(f"mysql://nobody@localhost/?socket={mariadb.socket}"))
    assert fake.calls("lvcreate") == [] and list(chain.directory.iterdir()) == []


def test_a_wrong_password_names_itself_before_anything_is_made(
    chain: SmallChain, mariadb: MariaDB, fake: FakeLvm, network_user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYSQL_PWD", "wrong secret")
    error = failed(chain, options(f"mysql://{network_user}@127.0.0.1:{mariadb.port}/"))
    assert "Access denied for user 'net'" in error.message and "wrong" not in error.message
    assert fake.calls() == []


def test_a_database_that_is_not_there_names_itself(chain: SmallChain, mariadb: MariaDB, tmp_path: Path) -> None:
    missing = tmp_path / "none.sock"
    error = failed(chain, options(f"mysql+ssh:///?socket={missing}"))
    assert (type(error), error.message) == (SourceError, f"localhost: there is no database socket: {missing}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_ends_under_the_lock_leaves_neither_lock_nor_snapshot(
    chain: SmallChain,
    mariadb: MariaDB,
    fake: FakeLvm,
    mark: str,
    form: Callable[[MariaDB], str],
    number: signal.Signals,
) -> None:
    fake.order("lvcreate", "late")
    words = ["backup", chain.name, str(chain.source), "--lvm", "--mysql", form(mariadb)]
    with subprocess.Popen([sys.executable, "-I", "-c", ANYWHERE, ROOT, *words]) as child:
        wait_until((fake.directory / "waiting").exists)
        child.send_signal(number)
        mariadb.assert_free()  # while lvcreate still is at work
        fake.go()
        child.wait(LIMIT_S)
        processes.wait_until_gone(mark)
    assert "disk.1.json" not in chain.files()


def test_several_sources_are_under_one_lock(chain: SmallChain, mariadb: MariaDB, fake: FakeLvm) -> None:
    other = SmallChain(chain.directory, fake.add_file("vg", "log", os.urandom(MIB)), "log")
    targets = [(each.name, str(each.source)) for each in (chain, other)]
    results = backup.backup_together(targets, Address(None, str(chain.source)), options(through_ssh(mariadb)))
    first, second = (result.manifest for result in results)
    assert first.database == second.database and first.quiesced == second.quiesced is not None
    assert re.fullmatch("[0-9a-f]{16}", str(first.run)) and first.run == second.run
