"""The ways to log in to a database: which of them are safe on a connection that may be intercepted.

A server says which way it wants, and so does an attacker in between. Some ways give it the password itself. What is
trusted is TLS with a server that has proven who it is, and a socket: that of this machine, or of the host through SSH.
Elsewhere only those ways are followed that prove that we know the password, and do not send it.
"""

from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

from blockdiff.shared.errors import DatabaseError

#: Ways that give the password away: by a hash that is easily undone, in clear, or to any server that offers a key.
_REVEALING = ("mysql_old_password", "mysql_clear_password", "dialog", "sha256_password")
#: In caching_sha2_password: the server has seen the proof, and needs nothing more.
_PROVEN = 3
_HINT = (
    "?ssl-ca=FILE encrypts the connection and lets the server prove who it is, mysql+ssh://USER@/ goes through SSH to"
    " the host's own socket; with caching_sha2_password ?server-public-key-path=FILE does as well"
)


class Packet(Protocol):
    """What PyMySQL makes of what the server sends in a login."""

    def is_auth_switch_request(self) -> bool:
        """Whether the server names another way to log in."""

    def is_extra_auth_data(self) -> bool:
        """Whether the server has more to say on this way."""

    def check_error(self) -> None:
        """Raise what the server says went wrong."""

    def read_all(self) -> bytes:
        """Return what is left."""

    def read_uint8(self) -> int:
        """Return the next byte."""

    def advance(self, length: int) -> None:
        """Pass over some bytes."""


class Connection(Protocol):
    """A connection of PyMySQL's, as it is given to what takes the place of its own code."""

    def write_packet(self, payload: bytes) -> None:
        """Send an answer."""

    def _read_packet(self) -> Packet: ...


class _Refuse:
    """Stands in for a way to log in that is not followed."""

    def __init__(self, name: str, _connection: Connection) -> None:
        self._name = name

    def authenticate(self, _packet: Packet) -> NoReturn:
        """Raise `DatabaseError`."""
        raise _refusal(self._name)


class _CachingSha2:
    """Logs in by caching_sha2_password as long as the server knows the password: then it is only proven."""

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
    """Return what takes the place of PyMySQL's own code for some ways to log in, by their names.

    If the server's public key is known (`key_is_known`), only that server can decrypt what caching_sha2_password
    sends, and PyMySQL takes no other key for it.
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
