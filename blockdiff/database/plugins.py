"""The methods to log in to a database (authentication plug-ins), and which are safe if a connection can be intercepted.

The server chooses the method, and so can an attacker in between. Some methods send the password itself. A connection is
trusted if it has TLS with a checked certificate, or uses a socket: that of this machine, or of the host through SSH. On
other connections, only those methods are used that prove that the client knows the password without sending it.
"""

from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

from blockdiff.shared.errors import DatabaseError

#: Methods that reveal the password: by a hash that is easy to break, as clear text, or to any server that sends a key.
_REVEALING = ("mysql_old_password", "mysql_clear_password", "dialog", "sha256_password")
#: In caching_sha2_password: the server accepts the proof and does not need the password.
_PROVEN = 3
_HINT = (
    "?ssl-ca=FILE encrypts the connection and lets the server prove who it is, mysql+ssh://USER@/ goes through SSH to"
    " the host's own socket; with caching_sha2_password ?server-public-key-path=FILE does as well"
)


class Packet(Protocol):
    """A packet of the server during a login, as PyMySQL has it."""

    def is_auth_switch_request(self) -> bool:
        """Return whether the server asks for another method."""

    def is_extra_auth_data(self) -> bool:
        """Return whether the server sends more data for this method."""

    def check_error(self) -> None:
        """Raise the error that the server reports, if it does."""

    def read_all(self) -> bytes:
        """Return all remaining bytes."""

    def read_uint8(self) -> int:
        """Return the next byte."""

    def advance(self, length: int) -> None:
        """Skip this many bytes."""


class Connection(Protocol):
    """A connection of PyMySQL, as it gives it to a handler."""

    def write_packet(self, payload: bytes) -> None:
        """Send an answer."""

    def _read_packet(self) -> Packet: ...


class _Refuse:
    """The handler of a method that is refused."""

    def __init__(self, name: str, _connection: Connection) -> None:
        self._name = name

    def authenticate(self, _packet: Packet) -> NoReturn:
        """Raise `DatabaseError`."""
        raise _refusal(self._name)


class _CachingSha2:
    """Logs in by caching_sha2_password if a proof is enough, which it is if the server has cached the password."""

    def __init__(self, password: bytes, connection: Connection) -> None:
        self._password = password
        self._connection = connection

    def authenticate(self, packet: Packet) -> Packet:
        """Answer the server; raises `DatabaseError` if it asks for the password itself."""
        from pymysql import _auth

        if packet.is_auth_switch_request():
            salt = packet.read_all().removesuffix(b"\0")
            proof = _auth.scramble_caching_sha2(self._password, salt) if self._password else b""
            self._connection.write_packet(proof)
            packet = self._connection._read_packet()
            packet.check_error()
        if not packet.is_extra_auth_data():
            return packet
        packet.advance(1)
        if packet.read_uint8() != _PROVEN:
            raise _refusal("caching_sha2_password")
        packet = self._connection._read_packet()
        packet.check_error()
        return packet


def handlers(password: bytes, trusted: bool, key_is_known: bool) -> dict[str, Callable[[Connection], object]]:
    """Return the handlers that replace PyMySQL's own code for some methods, by the names of the methods.

    If the server's public key is known (`key_is_known`), caching_sha2_password needs no handler: PyMySQL encrypts the
    password with this key and accepts no other, so only that server can decrypt it.
    """
    names = _REVEALING[:1] if trusted else _REVEALING
    found: dict[str, Callable[[Connection], object]] = {name: partial(_Refuse, name) for name in names}
    if not (trusted or key_is_known):
        found["caching_sha2_password"] = partial(_CachingSha2, password)
    return found


def _refusal(name: str) -> DatabaseError:
    return DatabaseError(
        f"the server asks for the password itself ({name}), but nothing proves that it is the server:"
        " the connection is not encrypted",
        _HINT,
    )
