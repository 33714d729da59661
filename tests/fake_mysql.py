"""A server that speaks MySQL's protocol as a test's script says, and records everything that it receives."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from types import TracebackType

SALT = b"abcdefghijklmnopqrst"
OK = b"\0\0\0\x02\0\0\0"
EOF = b"\xfe\0\0\x02\0"
_SSL, _CAPABILITIES = 1 << 11, 1 << 9 | 1 << 15 | 1 << 19 | 1 << 21
_PATIENCE_S = 60.0


class Wire:
    """The connection of one client: sends and receives packets."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._next = 0
        self.received: list[bytes] = []

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def send(self, payload: bytes, number: int | None = None) -> None:
        """Send a packet, numbered after the last one."""
        self._sock.sendall(struct.pack("<I", len(payload))[:3] + bytes([self._next if number is None else number]))
        self._sock.sendall(payload)
        self._next = (self._next + 1) % 256

    def raw(self, data: bytes) -> None:
        """Send bytes that need not be a packet."""
        self._sock.sendall(data)

    def receive(self) -> bytes:
        """Return the client's next packet."""
        head = self._exactly(4)
        self._next = (head[3] + 1) % 256
        payload = self._exactly(int.from_bytes(head[:3], "little"))
        self.received.append(payload)
        return payload

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._sock.recv(count - len(data))
            if not more:
                raise ConnectionError("the client is gone")
            data += more
        return data

    def greet(self, plugin: str = "mysql_native_password", version: str = "8.4.3", flags: int = 0) -> bytes:
        """Greet, and return the client's answer."""
        flags |= _CAPABILITIES
        self._next = 0
        fixed = struct.pack("<I8sxHBHHB10x", 7, SALT[:8], flags & 0xFFFF, 45, 2, flags >> 16, 21)
        self.send(b"\x0a" + version.encode() + b"\0" + fixed + SALT[8:] + b"\0" + plugin.encode() + b"\0")
        return self.receive()

    def greet_encrypted(self, context: ssl.SSLContext) -> bytes:
        """Greet, continue with TLS when the client asks for it, and return its answer."""
        self.greet(flags=_SSL)
        self._sock = context.wrap_socket(self._sock, server_side=True)
        return self.receive()

    def switch(self, plugin: str) -> bytes:
        """Ask for another method to log in, and return the answer."""
        self.send(b"\xfe" + plugin.encode() + b"\0" + SALT + b"\0")
        return self.receive()

    def serve(self, answer: "Callable[[str], list[bytes]]") -> None:
        """Take statements, and send the packets that `answer` gives for each, until the client leaves."""
        while (command := self.receive())[:1] == b"\x03":
            for packet in answer(command[1:].decode()):
                self.send(packet)


def cell(text: str) -> bytes:
    """Return a text as the protocol encodes it in a row."""
    data = text.encode()
    return (bytes([len(data)]) if len(data) < 251 else b"\xfd" + struct.pack("<I", len(data))[:3]) + data


def table(columns: "list[str]", *rows: "list[str]") -> list[bytes]:
    """Return the packets of an answer with rows."""
    kind = b"\x0c" + struct.pack("<HIBHBxx", 45, 1024, 253, 0, 0)
    described = [cell("def") + 3 * cell("") + cell(name) + cell("") + kind for name in columns]
    return [bytes([len(columns)]), *described, EOF, *(b"".join(map(cell, row)) for row in rows), EOF]


def columns(name: str) -> list[bytes]:
    """Return the first packets of an answer with rows of one column."""
    return table([name])[:-1]


def usual(statement: str) -> list[bytes]:
    """Return a real server's answer to the statements of a login."""
    if "CURRENT_USER" in statement:
        return table(["account"], ["u@%"])
    if "VERSION()" in statement:
        return table(["version"], ["8.4.3"])
    return [OK]


class FakeServer:
    """Listens until the end of the `with` statement, and calls `script` for each client, in a thread."""

    def __init__(self, script: "Callable[[Wire], None]") -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_PATIENCE_S)
        self.port = self._listener.getsockname()[1]
        self.clients: list[Wire] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_PATIENCE_S)
        self._listener.close()

    @property
    def received(self) -> list[bytes]:
        """All packets that were received, of all clients."""
        return [packet for wire in self.clients for packet in wire.received]

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(_PATIENCE_S)
            wire = Wire(sock)
            self.clients.append(wire)
            try:
                self._script(wire)
            except OSError:
                pass  # the client has closed the connection, as it should
            finally:
                wire.close()
