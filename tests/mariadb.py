"""A real MariaDB server in its own directory, with its own socket and a free port on loopback."""

import getpass
import shutil
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

import pymysql

ENGINES = ("innodb", "myisam", "aria")
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 240.0
_SMALL_LOG = "--innodb-log-file-size=4M"


def _daemon() -> str | None:
    return shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/local/sbin")


class Server(ABC):
    """A MariaDB server to which the tests can log in as its superuser."""

    @abstractmethod
    def connect(self, user: str | None = None, password: str = "") -> "pymysql.Connection[pymysql.cursors.DictCursor]":
        """Return a new session; by default the superuser's. The caller closes it."""

    def run(self, *statements: str) -> Sequence[dict[str, object]]:
        """Execute statements in a new session as the superuser; return the rows of the last one."""
        with closing(self.connect()) as connection:
            return execute(connection, *statements)

    def sessions(self) -> int:
        """Return the number of sessions, without the one that asks."""
        return len([row for row in self.run("SHOW PROCESSLIST") if row["Info"] != "SHOW PROCESSLIST"])

    def kill_others(self) -> None:
        """End every session except the one that does this."""
        with closing(self.connect()) as connection:
            number = own_id(connection)
            for row in execute(connection, "SHOW PROCESSLIST"):
                if row["Id"] != number:
                    try:
                        execute(connection, f"KILL {row['Id']}")
                    except pymysql.err.MySQLError as error:
                        if error.args[0] != pymysql.constants.ER.NO_SUCH_THREAD:
                            raise

    def make_tables(self) -> None:
        """Create the database `shop`, with a table of numbers for each engine; its name is that of the engine."""
        self.run("CREATE DATABASE shop", *(f"CREATE TABLE shop.{name} (n INT) ENGINE={name}" for name in ENGINES))

    def assert_free(self) -> None:
        """Check that no lock stops writers to a table of any engine, and that every session has ended or soon ends."""
        self.run("SET SESSION lock_wait_timeout=20", *(f"INSERT INTO shop.{engine} VALUES (0)" for engine in ENGINES))
        wait_for(lambda: self.sessions() == 0, "the end of every session")


class MariaDB(Server):
    """A server that runs until the end of the `with` statement. The user who runs the tests is its superuser."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.socket = directory / "db.sock"
        self.user = getpass.getuser()
        self._options = options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def available() -> bool:
        """Return whether the programs are installed."""
        return _daemon() is not None and shutil.which("mariadb-install-db") is not None

    def __enter__(self) -> "MariaDB":
        if not self.data.exists():
            self._initialise()
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()
        return self

    def _initialise(self) -> None:
        command = ["mariadb-install-db", "--no-defaults", f"--user={self.user}", f"--datadir={self.data}"]
        command += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={self.user}"]
        command += ["--skip-test-db", _SMALL_LOG]
        subprocess.run(command, capture_output=True, timeout=120, check=True)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        daemon = _daemon()
        assert daemon is not None
        with (self.directory / "log").open("ab") as log:
            command = [daemon, "--no-defaults", f"--user={self.user}", f"--datadir={self.data}"]
            command += [f"--socket={self.socket}", f"--port={self.port}", "--bind-address=127.0.0.1"]
            command += [f"--pid-file={self.directory / 'pid'}", "--innodb-flush-log-at-trx-commit=2", _SMALL_LOG]
            command += ["--innodb-buffer-pool-size=16M", "--key-buffer-size=1M", "--aria-pagecache-buffer-size=8M"]
            self._process = subprocess.Popen(
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.connect().close()
                return
            except (OSError, pymysql.err.OperationalError):
                assert self._process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop the server."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def connect(self, user: str | None = None, password: str = "") -> "pymysql.Connection[pymysql.cursors.DictCursor]":
        """Return a new session through the socket; by default the superuser's. The caller closes it."""
        sock = socket.socket(socket.AF_UNIX)
        connection = pymysql.Connection(
            user=user or self.user,
            password=password.encode(),
            autocommit=True,
            connect_timeout=10,
            read_timeout=60,
            write_timeout=60,
            cursorclass=pymysql.cursors.DictCursor,
            defer_connect=True,
        )
        try:
            sock.connect(str(self.socket))
            connection.connect(sock)
        except BaseException:
            sock.close()
            raise
        return connection


def execute(
    connection: "pymysql.Connection[pymysql.cursors.DictCursor]", *statements: str
) -> Sequence[dict[str, object]]:
    """Execute statements in an open session; return the rows of the last one."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall()


def own_id(connection: "pymysql.Connection[pymysql.cursors.DictCursor]") -> object:
    """Return the server's number of a session."""
    return execute(connection, "SELECT CONNECTION_ID() AS id")[0]["id"]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll until `condition` holds; fails after `timeout_s` seconds.

    Checking takes at most half of the time: in the lab's guest a check is slow, and slows down what it waits for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        begun = time.monotonic()
        if condition():
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(max(0.02, time.monotonic() - begun))


class Running:
    """A statement that runs in its own session and thread; `done` says whether it has ended."""

    def __init__(self, server: Server, *statements: str) -> None:
        self._connection = server.connect()
        self.id = own_id(self._connection)
        self._server = server
        self._error: pymysql.err.MySQLError | None = None
        self._thread = threading.Thread(target=self._run, args=statements, daemon=True)
        self._thread.start()

    def _run(self, *statements: str) -> None:
        try:
            execute(self._connection, *statements)
        except pymysql.err.MySQLError as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait_until_it_waits(self) -> None:
        """Wait until the server reports that the statement waits for a lock."""
        wait_for(lambda: "Waiting for" in str(self._row().get("State")), "a statement that waits")

    def wait_until_it_is(self, seconds: int) -> None:
        """Wait until the statement has run for this many seconds."""
        wait_for(lambda: self._has_run_for(seconds), "a long statement")

    def _has_run_for(self, seconds: int) -> bool:
        row = self._row()
        return row.get("Command") == "Query" and int(str(row["Time"])) >= seconds

    def _row(self) -> dict[str, object]:
        rows = [row for row in self._server.run("SHOW PROCESSLIST") if row["Id"] == self.id]
        return rows[0] if rows else {}

    def finish(self, timeout_s: float = 30) -> None:
        """Wait for the end of the statement, which must succeed."""
        self._thread.join(timeout_s)
        assert self.done and self._error is None, self._error
        self._connection.close()

    def end(self) -> None:
        """End the statement, even if it is still running."""
        self._server.run(f"KILL {self.id}")
        self._thread.join(30)
        self._connection.close()
