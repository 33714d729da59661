"""A real MariaDB server in a directory of its own, reached by its own socket and a free port of the loopback."""

import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

import pymysql

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_SMALL_LOG = "--innodb-log-file-size=4M"


def _daemon() -> str | None:
    return shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/local/sbin")


class MariaDB:
    """Starts with the `with` statement, and stops at its end. The user who runs the tests is its superuser."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.socket = directory / "db.sock"
        self.user = getpass.getuser()
        self._options = options
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def available() -> bool:
        """Whether the programs are installed."""
        return _daemon() is not None and shutil.which("mariadb-install-db") is not None

    def __enter__(self) -> "MariaDB":
        if not self.data.exists():
            self._initialise()
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
            command += [f"--pid-file={self.directory / 'pid'}", "--innodb-flush-log-at-trx-commit=0", _SMALL_LOG]
            command += ["--innodb-buffer-pool-size=16M", "--key-buffer-size=1M", "--aria-pagecache-buffer-size=8M"]
            self._process = subprocess.Popen(
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.connect().close()
                return
            except pymysql.err.OperationalError:
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
        """Return a new session, through the socket; by default the superuser's. The caller closes it."""
        return pymysql.Connection(
            unix_socket=str(self.socket),
            user=user or self.user,
            password=password.encode(),
            autocommit=True,
            connect_timeout=10,
            read_timeout=60,
            write_timeout=60,
            cursorclass=pymysql.cursors.DictCursor,
        )

    def run(self, *statements: str) -> Sequence[dict[str, object]]:
        """Execute statements in a session of their own as the superuser; return the rows of the last one."""
        with closing(self.connect()) as connection:
            return execute(connection, *statements)


def execute(
    connection: "pymysql.Connection[pymysql.cursors.DictCursor]", *statements: str
) -> Sequence[dict[str, object]]:
    """Execute statements in an open session; return the rows of the last one."""
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall()
