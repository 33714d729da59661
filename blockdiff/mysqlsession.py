"""One session with a MySQL or MariaDB server: log in, execute, and say in words what the server refused."""

import math
import re
import socket
from types import TracebackType
from typing import TYPE_CHECKING

from blockdiff.coordinates import Row
from blockdiff.errors import DatabaseError, printable
from blockdiff.mysqlaccount import Account

if TYPE_CHECKING:
    import pymysql

CONNECT_TIMEOUT_S = 10.0
#: How long a session may be idle while no lock is held, in seconds: a run prepares its snapshot meanwhile.
_IDLE_TIMEOUT_S = 600

_TIMED_OUT = (1205, 1969, 3024)
_PRIVILEGES = re.compile(r"\bthe (.+?) privilege")

#: Hints for error numbers of the server and of the client.
_HINTS = {
    1040: "raise max_connections, or keep one for SUPER",
    1044: "leave the database name out, or grant the account the use of it",
    1045: "check user and password; they come from the URL or the options, an option file of mode 0600, or MYSQL_PWD",
    1049: "leave the database name out: the lock needs none",
    1129: "FLUSH HOSTS there lets this machine in again",
    1130: "create the account for this machine: CREATE USER 'name'@'this machine'",
    1698: "the account logs in by another way: as its own Unix user through the socket (unix_socket), for one",
    2059: "give the account a usual way to log in, such as mysql_native_password or caching_sha2_password",
}


class TimedOut(DatabaseError):  # noqa: N818
    """A statement was not done within its time; nothing waits for it any more."""


class Session:
    """A session, ended by the end of the `with` statement. Not for more than one thread."""

    def __init__(self, account: Account, statement_timeout_s: float, sock: socket.socket | None = None) -> None:
        """Log in. Raises `DatabaseError`.

        No statement takes longer than `statement_timeout_s` seconds. `sock` is a connection to the server that is
        there already, and is the session's from now on.
        """
        import pymysql  # here: it takes as long as all the rest of a start, and most runs lock no database
        from pymysql.cursors import DictCursor

        self._errors = pymysql.err
        self.place = account.place
        self._user = account.user
        self._granted_to = "the account"
        self._connection: pymysql.Connection[DictCursor] = pymysql.Connection(
            user=account.user,
            password=account.password.encode("utf-8", "surrogateescape"),
            database=account.database,
            autocommit=True,
            read_timeout=statement_timeout_s,
            write_timeout=statement_timeout_s,
            program_name="blockdiff",
            defer_connect=True,
            cursorclass=DictCursor,
        )
        try:
            self._connection.connect(sock if sock is not None else _connected(account))
        except pymysql.err.MySQLError as error:
            number, said = _parts(error)
            raise DatabaseError(
                f"cannot log in to {self.place} as {printable(self._user, 100)}: {said}", _HINTS.get(number)
            ) from error
        (row,) = self.rows("SELECT CURRENT_USER() AS account")
        self._granted_to = "`{}`@`{}`".format(*str(row["account"]).rsplit("@", 1))
        self.execute(f"SET SESSION wait_timeout={_IDLE_TIMEOUT_S}")

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session, if it is not ended yet: the server gives up its locks."""
        try:
            self._connection.close()
        except self._errors.Error:
            pass  # closed already

    def rows(self, statement: str) -> list[Row]:
        """Execute a statement and return its rows.

        Raises `TimedOut` where it was not done in time, and `DatabaseError` for whatever else the server says, or where
        the session is gone.
        """
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall())
        except self._errors.MySQLError as error:
            raise self._refused(error) from error

    def execute(self, statement: str) -> None:
        """Execute a statement that returns nothing of interest; raises as `rows`."""
        self.rows(statement)

    def number(self, statement: str) -> int:
        """Return the one number that a statement selects; raises as `rows`."""
        (row,) = self.rows(statement)
        (value,) = row.values()
        return int(str(value))

    def limit(self, hold_s: float) -> None:
        """Let the server end the session once it was idle for `hold_s` seconds; raises as `rows`."""
        seconds = math.ceil(hold_s)
        self.execute(f"SET SESSION wait_timeout={seconds}, net_read_timeout={seconds}, net_write_timeout={seconds}")

    def _refused(self, error: "pymysql.err.MySQLError") -> DatabaseError:
        number, said = _parts(error)
        message = f"{self.place}: {said}"
        if number in _TIMED_OUT or "(timed out)" in said:
            return TimedOut(message)
        match = _PRIVILEGES.search(said)
        if number == 1227 and match is not None:
            missing = [name for name in re.split(r", | or ", match[1]) if name != "SUPER"] or ["SUPER"]
            return DatabaseError(
                f"{self.place}: {printable(self._user, 100)} lacks the privilege {missing[0]}",
                f"GRANT {missing[0]} ON *.* TO {self._granted_to}",
            )
        return DatabaseError(message, _HINTS.get(number))


def _connected(account: Account) -> socket.socket:
    """Return a connection to the server. PyMySQL's own way leaves a socket open where it fails."""
    try:
        if account.socket is None:
            sock = socket.create_connection((account.host, account.port), CONNECT_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(account.socket)
        except BaseException:
            sock.close()
            raise
        return sock
    except (OSError, UnicodeError) as error:  # the latter for host names that cannot be
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DatabaseError(
            f"cannot reach {account.place}: {printable(str(reason), 200)}",
            "is the server running, and does it listen to the network? The word ssh for the URL needs no network"
            if account.socket is None
            else "is the server running, and is this its socket?",
        ) from error


def _parts(error: "pymysql.err.MySQLError") -> tuple[int, str]:
    """Return the number of an error and its words; neither ever holds a password."""
    if len(error.args) > 1 and isinstance(error.args[0], int):
        return error.args[0], printable(str(error.args[1]), 500) or "the connection is closed"
    return 0, printable(str(error), 500) or "the connection is closed"
