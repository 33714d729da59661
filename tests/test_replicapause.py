"""--replica-pause: what applies changes on a replica stands still for the moment of a backup, and never after it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdiff import mysqllock, replicapause
from blockdiff.backup import Options, VolumeOptions
from blockdiff.database import accounts, coordinates
from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Version
from blockdiff.mysqllock import Limits
from blockdiff.quiesce import DatabaseQuiesce
from blockdiff.replicapause import Way
from blockdiff.shared.errors import DatabaseError, SourceError
from blockdiff.transport.address import Address
from tests import chains, processes
from tests.chains import SmallChain
from tests.fake_lvm import FakeLvm
from tests.mariadb import MariaDB, wait_for
from tests.test_database_backup import ANYWHERE, FORMS, MIB, ROOT, through_socket, through_ssh

PATIENCE_S = 60.0


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No process outlives the test; yields the mark by which they are known."""
    with processes.leaving_none(monkeypatch) as mark:
        yield mark


@pytest.fixture
def replica(mariadb: MariaDB, mark: str) -> Iterator[MariaDB]:
    """A database that applies what it has of a source that does not answer; it does so after the test as well."""
    mariadb.run("CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT=1, MASTER_USER='u'", "START SLAVE SQL_THREAD")
    wait_for(lambda: applier(mariadb) == "Yes", "an applier")
    yield mariadb
    try:
        wait_for(lambda: applier(mariadb) == "Yes", "an applier that goes on")
    finally:
        mariadb.run("STOP SLAVE", "RESET SLAVE ALL")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLvm]:
    monkeypatch.setattr(DatabaseQuiesce, "check", lambda self, ready, session: None)  # it is on no volume
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("vg", 200 * MIB)
    monkeypatch.setenv("PATH", f"{fake.commands}:{os.environ['PATH']}")
    yield fake
    fake.go()


@pytest.fixture
def chain(tmp_path: Path, fake: FakeLvm) -> SmallChain:
    chain = chains.new_chain(tmp_path)
    chain.source = fake.add_file("vg", "lv", os.urandom(MIB))
    return chain


def applier(mariadb: MariaDB) -> object:
    (row,) = mariadb.run("SHOW ALL SLAVES STATUS")
    return row["Slave_SQL_Running"]


def options(url: str) -> Options:
    return Options(volumes=VolumeOptions(database=accounts.from_url(url), pauses=True))


@pytest.mark.parametrize("form", FORMS)
def test_the_applier_stands_still_under_the_lock_and_goes_on_after_it(
    chain: SmallChain, replica: MariaDB, monkeypatch: pytest.MonkeyPatch, form: Callable[[MariaDB], str]
) -> None:
    seen, prove = [], mysqllock.Held.prove

    def look(held: mysqllock.Held) -> None:
        seen.append(applier(replica))
        prove(held)

    monkeypatch.setattr(mysqllock.Held, "prove", look)
    result = chain.add(None, options(form(replica)))
    assert (seen, applier(replica)) == (["No"], "Yes")
    assert result.warnings == [] and result.manifest.database is not None


def test_a_run_that_fails_lets_it_go_on(chain: SmallChain, replica: MariaDB, fake: FakeLvm) -> None:
    fake.order("lvcreate", "fail")
    with pytest.raises(SourceError, match="cannot make a snapshot"):
        chain.add(None, options(through_socket(replica)))
    assert applier(replica) == "Yes"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_ended_lets_it_go_on(
    chain: SmallChain, replica: MariaDB, fake: FakeLvm, form: Callable[[MariaDB], str], number: signal.Signals
) -> None:
    fake.order("lvcreate", "late")
    words = ["backup", chain.name, str(chain.source), "--lvm", "--mysql", form(replica), "--replica-pause"]
    with subprocess.Popen([sys.executable, "-I", "-c", ANYWHERE, ROOT, *words]) as child:
        wait_for((fake.directory / "waiting").exists, "the snapshot", PATIENCE_S)
        assert applier(replica) == "No"
        child.send_signal(number)
        wait_for(lambda: applier(replica) == "Yes", "an applier that goes on", PATIENCE_S)
        fake.go()
        child.wait(PATIENCE_S)


def test_a_guard_that_is_gone_is_replaced(replica: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(replica.user, "", socket=str(replica.socket))
    begun: list[subprocess.Popen[bytes]] = []
    answer = replicapause._answer

    def watched(child: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
        begun.append(child)
        return answer(child, timeout_s)

    monkeypatch.setattr(replicapause, "_answer", watched)
    with (
        mysqllock.connect(account) as database,
        replicapause.paused(account, Way(Address(None, "/")), database, [""]),
    ):
        assert applier(replica) == "No"
        begun[0].kill()
    assert applier(replica) == "Yes"


def test_without_a_guard_nothing_is_stopped(replica: MariaDB) -> None:
    account = Account(replica.user, "", socket=str(replica.socket))
    nobody = Account("nobody", "", socket=str(replica.socket))
    refused = pytest.raises(DatabaseError, match=r"nothing was stopped: .* cannot log in: .*Access denied")
    with (
        mysqllock.connect(account) as database,
        refused,
        replicapause.paused(nobody, Way(Address(None, "/")), database, [""]),
    ):
        pytest.fail("it was stopped")
    assert applier(replica) == "Yes"


def test_an_applier_that_cannot_be_started_again_is_said_so(replica: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(replica.user, "", socket=str(replica.socket))
    monkeypatch.setattr(replicapause, "_answer", lambda child, timeout_s: b"ready\n")
    told = pytest.raises(DatabaseError, match="SQL thread is stopped and could not be started again: ")
    with mysqllock.connect(account) as database:
        with told as caught, replicapause.paused(account, Way(Address(None, "/")), database, [""]):
            database.__exit__(None, None, None)
        assert caught.value.hint == "execute START SLAVE (or START REPLICA) there now"


def test_an_applier_that_stood_still_already_is_left_so_and_told(chain: SmallChain, replica: MariaDB) -> None:
    """A run whose machine died may have left it; whoever stopped it may have had a reason."""
    replica.run("STOP SLAVE SQL_THREAD", "START SLAVE IO_THREAD")
    result = chain.add(None, options(through_ssh(replica)))
    (warning,) = result.warnings
    assert warning.startswith("the SQL thread of the replica is stopped (channel '')")
    assert result.manifest.database is not None and applier(replica) == "No"
    replica.run("START SLAVE SQL_THREAD")


def test_the_privilege_is_asked_for_before_anything_is_stopped(replica: MariaDB, backup_account: Account) -> None:
    replica.run("GRANT PROCESS, RELOAD, BINLOG MONITOR, SLAVE MONITOR ON *.* TO backup@localhost")
    with mysqllock.connect(backup_account, Limits()) as database:
        database.check()
        with pytest.raises(DatabaseError, match="backup lacks the privilege REPLICATION SLAVE ADMIN") as caught:
            database.check(with_pause=True)
        assert applier(replica) == "Yes"
        replica.run(str(caught.value.hint))
    with mysqllock.connect(backup_account, Limits()) as database:
        database.check(with_pause=True)


@pytest.mark.parametrize(
    ("version", "statement"),
    [
        ("10.11.2-MariaDB", "STOP SLAVE 'a''b' SQL_THREAD"),
        ("8.0.22", "STOP REPLICA SQL_THREAD FOR CHANNEL 'a''b'"),
        ("5.7.40", "STOP SLAVE SQL_THREAD FOR CHANNEL 'a''b'"),
    ],
)
def test_the_words_are_those_of_the_server(version: str, statement: str) -> None:
    assert coordinates.applier_statement("STOP", Version.parse(version), "a'b") == statement
