"""Relay a socket of the host over the connection: so the server can log in to a database that listens only locally.

Shipped to the host: standard library only, Python 3.6 or newer. The server uses the same code for its end.

The database sees the agent's user as its peer, so a login by `unix_socket` works. When the connection ends, the socket
is closed, and the database ends the session and releases its locks.
"""

import os
import socket
import threading
from typing import Sequence

from blockdiff.shared import wire
from blockdiff.shared.errors import ConnectionLost, SourceError, printable

#: Most bytes that one frame carries.
_CHUNK = 64 << 10
#: How long a socket may take to connect, or to accept bytes, in seconds.
SOCKET_TIMEOUT_S = 30.0


class Relay:
    """One end of a relay: it sends what arrives on `sock`, and writes to `sock` what the other end sends.

    It also closes `sock`. When `sock` has no more data, it sends a last, empty frame of the kind `last`. For the agent
    this is `wire.BYTES`: no more bytes follow. For the server it is `wire.CLOSE`; it gets a CLOSE in return.
    """

    def __init__(self, link: wire.Link, sock: socket.socket, last: int) -> None:
        self._link = link
        self._socket = sock
        self._last = last
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        """Start the thread that sends."""
        self._thread.start()

    def feed(self, data: bytes) -> None:
        """Write what the other end sent; if the socket does not accept it, close it."""
        try:
            if data:
                self._socket.sendall(data)
            else:
                self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self) -> None:
        """End both directions, and with them the thread. May be called more than once."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def join(self, timeout_s: float) -> None:
        """Wait until this side has sent its last frame."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            with self._socket:
                for data in iter(self._receive, b""):
                    self._link.send(wire.BYTES, data)
            self._link.send(self._last)
        except ConnectionLost:
            pass  # the receiving thread notices this, too, and reports the cause

    def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(_CHUNK)
            except socket.timeout:
                continue  # a statement may take long; the server has its own limit
            except OSError:
                return b""


def connect(paths: Sequence[str], port: int) -> socket.socket:
    """Return a connection to the first of the Unix sockets `paths` that exists; without one, to `port` of this machine.

    `port` 0 means no port. Raises `SourceError`.
    """
    for path in paths:
        if os.path.exists(path):
            return _connected(socket.socket(socket.AF_UNIX), path, path)
    if not port:
        raise SourceError(
            "there is no database socket: {}".format(printable(", ".join(paths))),
            "is the database running there? --mysql 'mysql+ssh://USER@/?socket=/path' names another",
        )
    return _connected(socket.socket(socket.AF_INET), ("127.0.0.1", port), "127.0.0.1:{}".format(port))


def _connected(sock: socket.socket, address: "str | tuple[str, int]", shown: str) -> socket.socket:
    try:
        sock.settimeout(SOCKET_TIMEOUT_S)
        sock.connect(address)
    except OSError as error:
        sock.close()
        raise SourceError(
            "cannot connect to the database at {}: {}".format(printable(shown), error.strerror or error),
            "is it running there, and may this login use its socket?",
        ) from error
    return sock
