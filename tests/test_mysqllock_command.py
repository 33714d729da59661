"""The command `mysqllock` on a real MariaDB: exit statuses, lines, signals, secrets."""

import os
import signal
import subprocess
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from blockdiff import mysqllock
from blockdiff.database.accounts import Account
from blockdiff.shared.errors import Interrupted, ProcessError
from tests import commands
from tests.mariadb import MariaDB, Running, execute, wait_for

LOCKED = ["issuing lock statement: BACKUP STAGE START", "issuing lock statement: BACKUP STAGE BLOCK_COMMIT"]
UNLOCKED = ["issuing unlock statement: BACKUP STAGE END"]


def run(mariadb: MariaDB, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, list[str], list[str]]:
    """Run the command; return its exit status and the lines that it printed and said."""
    result = commands.run("mysqllock", f"--user={mariadb.user}", f"--socket={mariadb.socket}", *arguments, env=env)
    return result.returncode, result.stdout.decode().splitlines(), result.stderr.decode().splitlines()


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 255), ("kill $$", 255)])
def test_the_command_exits_as_what_it_ran(mariadb: MariaDB, script: str, status: int) -> None:
    assert run(mariadb, "sh", "-c", f"echo out; {script}") == (status, ["out"], LOCKED + UNLOCKED)
    mariadb.assert_free()


def test_options_behind_the_command_are_its_own(mariadb: MariaDB) -> None:
    assert run(mariadb, "--", "echo", "--user=x", "--help")[1] == ["--user=x --help"]


def test_statements_given_are_issued_and_shown_as_they_are(mariadb: MariaDB) -> None:
    options = ["--before=FLUSH  LOCAL TABLES", "--before=select 1 -- é", "--after=select 2"]
    lock = ["FLUSH  LOCAL TABLES", "select 1 -- é"]
    said = [*(f"issuing lock statement: {text}" for text in lock), "issuing unlock statement: select 2"]
    assert run(mariadb, *options, "true") == (0, [], said)


def test_a_command_that_is_not_there_is_told_before_anything_is_locked(mariadb: MariaDB) -> None:
    status, _, said = run(mariadb, "no-such-command-here")
    assert status == 1 and said[0] == "blockdiff: cannot run no-such-command-here: no such command"


def test_a_command_that_cannot_be_started_ends_the_lock(mariadb: MariaDB, tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_text("#!/no/such/interpreter\n")
    command.chmod(0o755)
    account = Account(mariadb.user, "", socket=str(mariadb.socket))
    refused = pytest.raises(ProcessError, match=r"cannot run .*command: No such file")
    with mysqllock.connect(account) as database, refused:
        mysqllock.run_locked(database, [str(command)])
    mariadb.assert_free()


@pytest.mark.parametrize("end", ["exit 0", "exit 3"])
def test_a_lock_that_is_lost_while_the_command_runs_is_a_failure(mariadb: MariaDB, tmp_path: Path, end: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with started(mariadb, "sh", "-c", f"cat {fifo}; {end}") as child:
        with fifo.open("wb"):
            mariadb.kill_others()
        _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert b"blockdiff: the lock was lost before the command had ended: " in said
    mariadb.assert_free()


def started(mariadb: MariaDB, *arguments: str) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    return commands.started("mysqllock", f"--user={mariadb.user}", f"--socket={mariadb.socket}", *arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_and_the_lock(mariadb: MariaDB, tmp_path: Path, number: signal.Signals) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with started(mariadb, "cat", str(fifo)) as child:
        with fifo.open("wb"):
            child.send_signal(number)
            _, said = child.communicate(timeout=60)
        assert child.returncode == 128 + number and f"stopped by {number.name}".encode() in said
        mariadb.assert_free()
        with pytest.raises(OSError, match="No such device or address"):  # nobody reads any more
            os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


def test_a_signal_while_the_command_is_started_ends_it_too(mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        children.append(popen(command))
        signal.raise_signal(signal.SIGTERM)
        return children[0]

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted

    popen, before = subprocess.Popen, signal.signal(signal.SIGTERM, interrupt)
    monkeypatch.setattr(subprocess, "Popen", start)
    account = Account(mariadb.user, "", socket=str(mariadb.socket))
    try:
        with mysqllock.connect(account) as database, pytest.raises(Interrupted):
            mysqllock.run_locked(database, ["sleep", "1000"])
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children[0].returncode == -signal.SIGTERM
    mariadb.assert_free()


def test_a_killed_owner_leaves_no_lock(mariadb: MariaDB, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with started(mariadb, "cat", str(fifo)) as child, fifo.open("wb"):
        writer = Running(mariadb, "INSERT INTO shop.innodb VALUES (1)")
        writer.wait_until_it_waits()
        child.kill()
        writer.finish()
    mariadb.assert_free()


def test_a_signal_while_it_waits_for_the_lock_ends_the_wait_at_the_server_too(mariadb: MariaDB) -> None:
    with closing(mariadb.connect()) as other:
        execute(other, "LOCK TABLES shop.myisam WRITE")
        with started(mariadb, "true") as child:
            wait_for(
                lambda: any("Waiting for" in str(row["State"]) for row in mariadb.run("SHOW PROCESSLIST")), "a wait"
            )
            child.terminate()
            assert child.wait(60) == 128 + signal.SIGTERM
        wait_for(lambda: mariadb.sessions() == 1, "the end of the session that waited")
    mariadb.assert_free()


@pytest.mark.parametrize("way", ["option", "environment", "file"])
def test_no_secret_is_seen(mariadb: MariaDB, backup_account: Account, tmp_path: Path, way: str) -> None:
    mariadb.run("GRANT PROCESS, RELOAD ON *.* TO backup@localhost")
    options, env = [], {}
    if way == "option":
        options = [f"--password={backup_account.password}"]
    elif way == "environment":
        env = {"MYSQL_PWD": backup_account.password}
    else:
        path = tmp_path / "my.cnf"
        path.write_text('[client]\npassword="it\'s # \\"hushed\\" é"\n')
        path.chmod(0o600)
        options = [f"--defaults-file={path}"]
    words = ["--user=backup", f"--socket={mariadb.socket}", *options]
    for wrong in ("", "x"):
        if wrong:
            mariadb.run("ALTER USER backup@localhost IDENTIFIED BY 'another hushed'")
        result = commands.run("mysqllock", *words, "sh", "-c", "tr '\\0' ' ' < /proc/$PPID/cmdline", env=env)
        assert result.returncode == (1 if wrong else 0), result
        assert b"hushed" not in result.stderr
        assert (b"hushed" in result.stdout) == (way == "option" and not wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], b"Missing argument 'COMMAND...'"),
        (["--no-such-option", "true"], b"No such option"),
        (["--lock-wait=0", "true"], b"--lock-wait"),
        (["--port=0", "true"], b"--port"),
        (["--defaults-file=/nowhere", "true"], b"cannot read the option file /nowhere: No such file"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], said: bytes) -> None:
    result = commands.run("mysqllock", *arguments)
    assert result.returncode == 2 and said in result.stderr


def test_it_tells_its_version_and_its_options() -> None:
    assert commands.done("mysqllock", "--version").strip()
    shown = commands.done("mysqllock", "--help")
    assert all(option in shown for option in (b"--user", b"--password", b"--before", b"--after", b"--max-hold"))
