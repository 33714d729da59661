"""One session with a MySQL or MariaDB server: log in, execute statements, and turn its errors into messages."""

import ipaddress
import math
import re
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from blockdiff.database import bounds, plugins
from blockdiff.database.accounts import Account
from blockdiff.database.bounds import TimedOut
from blockdiff.database.coordinates import Row
from blockdiff.shared.errors import DatabaseError, printable

if TYPE_CHECKING:
    import ssl

    import pymysql

#: How long a session may be idle without a lock, in seconds: a run prepares its snapshot in that time.
_IDLE_TIMEOUT_S = 600

_TIMED_OUT = (1205, 1969, 3024)
#: Most rows of an answer.
_ROWS_LIMIT = 100_000
#: What PyMySQL raises if a server breaks the protocol, or asks for a file of this machine.
_GARBLED = (
    *(AssertionError, AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
    struct.error,
)
_PROTOCOL_HINT = "is that a MySQL or MariaDB server?"
_TLS_HINT = (
    "the certificate must be of the authority in ssl-ca (without it: of one that this machine trusts), and of this host"
    " name (ssl-mode=VERIFY_CA does not check the name)"
)
_PRIVILEGES = re.compile(r"\bthe (.+?) privilege")

#: Hints for error numbers of the server and of the client.
_HINTS = {
    1040: "raise max_connections, or keep one for SUPER",
    1044: "omit the database name, or grant the account a privilege on it",
    1045: "check user and password, which comes from an option file of mode 0600 or MYSQL_PWD",
    1049: "omit the database name: the lock does not need one",
    1129: "run FLUSH HOSTS there: then it accepts this machine again",
    1130: "create the account for this machine: CREATE USER 'name'@'this machine'",
    1698: "the account logs in another way, such as unix_socket: as its own Unix user through the socket",
    2026: "let it have ssl_cert and ssl_key, or go through SSH: mysql+ssh://USER@/",
    3159: "?ssl-ca=FILE encrypts the connection, mysql+ssh://USER@/ goes through SSH",
    2059: "give the account a usual way to log in, such as mysql_native_password or caching_sha2_password",
}


class Lacking(DatabaseError):  # noqa: N818
    """The account lacks these privileges."""

    def __init__(self, message: str, hint: str | None = None, privileges: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.privileges = privileges


class SqlSession:
    """A session. The end of the `with` statement ends it. Only one thread may use it."""

    def __init__(self, account: Account, statement_timeout_s: float, sock: socket.socket | None = None) -> None:
        """Log in. Raises `DatabaseError`, and `UsageError` if a file that the account names cannot be used.

        No answer may take much longer than `statement_timeout_s` seconds. `sock` is an existing connection to the
        server; the session now owns it. `is_open` says whether a password was used on a network where others may read
        and change what is sent.
        """
        import pymysql  # not at the top: it takes as long as the rest of the start, and most runs lock no database
        from pymysql.cursors import Cursor

        self._errors = pymysql.err
        self.place = account.place
        self._user = account.user
        self._granted_to = "the account"
        self._bounds = bounds.Bounds(statement_timeout_s)
        tls = account.tls if account.is_of_network else None
        password = account.password.encode("utf-8", "surrogateescape")
        trusted = tls is not None or not account.is_of_network
        try:
            self._connection: pymysql.Connection[Cursor] = pymysql.Connection(
                user=account.user,
                password=password,
                host=account.host,
                database=account.database,
                autocommit=True,
                read_timeout=statement_timeout_s,
                write_timeout=statement_timeout_s,
                program_name="blockdiff",
                defer_connect=True,
                cursorclass=Cursor,
                ssl=bounds.context(tls, self._bounds) if tls is not None else None,
                ssl_disabled=tls is None,
                server_public_key=account.server_key(),
                auth_plugin_map={**plugins.handlers(password, trusted, account.public_key is not None)},
            )
            sock = bounds.bounded(sock or bounds.connected(account), self._bounds)
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        self.is_open = not trusted and bool(password) and not _is_loopback(sock)
        self._log_in(sock)
        try:
            (row,) = self.rows("SELECT CURRENT_USER() AS account")
            self._granted_to = "`{}`@`{}`".format(*str(row["account"]).rsplit("@", 1))
            self.execute(f"SET SESSION wait_timeout={_IDLE_TIMEOUT_S}")
        except BaseException:
            self.close()
            raise

    def _log_in(self, sock: socket.socket) -> None:
        import ssl  # PyMySQL has imported it by now

        refused = f"cannot log in to {self.place} as {printable(self._user, 100)}"
        try:
            self._connection.connect(sock)
        except self._errors.MySQLError as error:
            cause = getattr(error, "original_exception", None)
            if isinstance(cause, ssl.SSLError):
                raise DatabaseError(f"{refused}: TLS failed: {_reason(cause)}", _TLS_HINT) from error
            number, said = _parts(error)
            raise DatabaseError(f"{refused}: {said}", _HINTS.get(number)) from error
        except DatabaseError as error:
            raise DatabaseError(f"{refused}: {error.message}", error.hint) from error
        except RuntimeError as error:  # from a method that needs another package
            raise DatabaseError(f"{refused}: {printable(str(error), 200)}", "install it beside blockdiff") from error
        except _GARBLED as error:
            raise DatabaseError(f"{refused}: it does not follow MySQL's protocol", _PROTOCOL_HINT) from error

    def __enter__(self) -> "SqlSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session, if it has not ended; the server then releases its locks."""
        try:
            self._connection.close()
        except self._errors.Error:
            pass  # closed already

    def rows(self, statement: str) -> list[Row]:
        """Execute a statement and return its rows.

        Raises `TimedOut` if it took too long, and `DatabaseError` if the server reports another error or sends too
        much, or if the session has ended.
        """
        self._bounds.begin()
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(statement)
                found, columns = cursor.fetchall(), [column[0] for column in cursor.description or ()]
        except self._errors.MySQLError as error:
            raise self._refused(error) from error
        except DatabaseError as error:
            raise type(error)(f"{self.place}: {error.message}", error.hint) from error
        except _GARBLED as error:
            self.close()
            raise DatabaseError(f"{self.place} does not follow MySQL's protocol", _PROTOCOL_HINT) from error
        if len(found) > _ROWS_LIMIT:
            raise DatabaseError(f"{self.place}: one answer had {len(found)} rows", _PROTOCOL_HINT)
        return [dict(zip(columns, row)) for row in found]

    def execute(self, statement: str) -> None:
        """Execute a statement whose rows are not needed. Raises what `rows` raises."""
        self.rows(statement)

    def number(self, statement: str) -> int:
        """Return the one number that a statement selects. Raises what `rows` raises."""
        (row,) = self.rows(statement)
        (value,) = row.values()
        return int(str(value))

    def limit(self, hold_s: float) -> None:
        """Let the server end the session after it was idle for `hold_s` seconds. Raises what `rows` raises."""
        seconds = math.ceil(hold_s)
        self.execute(f"SET SESSION wait_timeout={seconds}, net_read_timeout={seconds}, net_write_timeout={seconds}")

    def lacking(self, privileges: Sequence[str]) -> "Lacking":
        """Return the error for privileges that the account needs and does not have."""
        word, names = "privilege" if len(privileges) == 1 else "privileges", ", ".join(privileges)
        return Lacking(
            f"{self.place}: {printable(self._user, 100)} lacks the {word} {names}",
            f"GRANT {names} ON *.* TO {self._granted_to}",
            privileges,
        )

    def _refused(self, error: "pymysql.err.MySQLError") -> DatabaseError:
        number, said = _parts(error)
        message = f"{self.place}: {said}"
        if number in _TIMED_OUT:
            return TimedOut(message)
        match = _PRIVILEGES.search(said)
        if number == 1227 and match is not None:
            missing = [name for name in re.split(r", | or ", match[1]) if name != "SUPER"] or ["SUPER"]
            return self.lacking([missing[0]])
        return DatabaseError(message, _HINTS.get(number))


def _parts(error: "pymysql.err.MySQLError") -> tuple[int, str]:
    """Return the number and the text of an error; neither contains a password."""
    if len(error.args) > 1 and isinstance(error.args[0], int):
        return error.args[0], printable(str(error.args[1]), 500) or "the connection is closed"
    return 0, printable(str(error), 500) or "the connection is closed"


def _is_loopback(sock: socket.socket) -> bool:
    """Return whether the other end is this machine."""
    return ipaddress.ip_address(str(sock.getpeername()[0]).partition("%")[0]).is_loopback


def _reason(error: "ssl.SSLError") -> str:
    import ssl

    said = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
    return printable(str(said or error), 200)
