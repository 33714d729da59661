"""The connection to a database, with or without TLS, and its limits.

The server is not trusted: the answer to one statement is limited in bytes and in seconds.
"""

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockdiff.database.accounts import Account, Tls
from blockdiff.shared.errors import DatabaseError, UsageError, printable

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 10.0
#: Most bytes of an answer: enough for a list of tens of thousands of sessions.
ANSWER_LIMIT = 4 << 20


class TimedOut(DatabaseError):  # noqa: N818
    """A statement took longer than its limit. blockdiff no longer waits for it."""


class Bounds:
    """The limits of an answer: `ANSWER_LIMIT` bytes, within `seconds` after the last `begin`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.begin()

    def begin(self) -> None:
        """Start the limits again, for the next answer."""
        self._left = ANSWER_LIMIT
        self._deadline = time.monotonic() + self._seconds

    def received(self, receive: Callable[[], int]) -> int:
        """Receive some bytes, and return how many; raises `TimedOut`, and `DatabaseError` if the answer is too long."""
        try:
            count = receive()
        except TimeoutError as error:
            raise self._late() from error
        self._left -= count
        if self._left < 0:
            raise DatabaseError(f"one answer had more than {ANSWER_LIMIT >> 20} MiB", "is that a database server?")
        if time.monotonic() > self._deadline:
            raise self._late()
        return count

    def _late(self) -> TimedOut:
        return TimedOut(f"no complete answer came within {self._seconds:g} s")


class _Socket(socket.socket):
    """A socket that enforces `bounds`."""

    bounds: Bounds

    def recv_into(self, buffer: "bytearray | memoryview", nbytes: int = 0, flags: int = 0) -> int:  # type: ignore[override]  # only our own code calls it
        return self.bounds.received(lambda: super(_Socket, self).recv_into(buffer, nbytes, flags))


def bounded(sock: socket.socket, bounds: Bounds) -> socket.socket:
    """Return a socket for the connection of `sock` that enforces `bounds`; `sock` can no longer be used."""
    timeout = sock.gettimeout()
    ours = _Socket(fileno=sock.detach())
    ours.bounds = bounds
    ours.settimeout(timeout)
    return ours


def context(tls: Tls, bounds: Bounds) -> "ssl.SSLContext":
    """Return a context for encrypted connections, which checks the server's certificate and enforces `bounds`.

    Raises `UsageError` if a file for it cannot be used.
    """
    import ssl  # not at the top of the file: most runs lock no database

    class Socket(ssl.SSLSocket):
        def recv_into(self, buffer: "bytearray | memoryview", nbytes: int | None = None, flags: int = 0) -> int:  # type: ignore[override]  # only our own code calls it
            return bounds.received(lambda: super(Socket, self).recv_into(buffer, nbytes, flags))

    file = tls.ca
    try:
        made = ssl.create_default_context(cafile=tls.ca, capath=tls.capath)
        made.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the certificates that MySQL creates for itself do not meet it
        made.check_hostname = tls.checks_name
        if tls.cert is not None:
            file = tls.cert
            made.load_cert_chain(tls.cert, tls.key)
    except OSError as error:
        raise UsageError(
            f"cannot use {printable(str(file), 200)} for TLS with the database: {error.strerror or error}",
            "ssl-ca, ssl-cert and ssl-key name files in the format PEM",
        ) from error
    made.sslsocket_class = Socket
    return made


def connected(account: Account) -> socket.socket:
    """Return a connection to the server. PyMySQL's own code leaves a socket open if it fails."""
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
    except (OSError, UnicodeError) as error:  # UnicodeError: the host name is not valid
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DatabaseError(
            f"cannot reach {account.place}: {printable(str(reason), 200)}",
            "is the server running, and does it listen to the network? The word ssh for the URL needs no network"
            if account.socket is None
            else "is the server running, and is this its socket?",
        ) from error
