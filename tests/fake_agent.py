"""An agent that can break the rules: it runs in a thread of the test, and does what the test's script says."""

import json
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Sequence

from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, TransportError
from blockdiff.transport import bundle
from blockdiff.transport.advice import Place
from blockdiff.transport.connection import Connection, Exit

BLOCK = 4096
HELLO: dict[str, object] = {
    "protocol": wire.PROTOCOL,
    "python": "3.9.1",
    "hostname": "evil",
    "user": "root",
    "digests": ["blake2b", "md5", "sha256"],
}


class Wire:
    """The agent's end of the connection: sends frames, and bytes that are not frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._pipe = wire.Pipe(sock.fileno(), sock.fileno())
        self.link = wire.Link(self._pipe)
        self._sent = 0

    def begin(self) -> None:
        """Receive the agent's code, and answer with the nonce in it; the rest of the code is ignored."""
        expected = len(bundle.startup(bytes(bundle.NONCE_SIZE)))
        received = bytearray(expected)
        filled = 0
        while filled < expected:
            count = self._pipe.readinto(memoryview(received)[filled:], 30)
            if not count:
                raise ConnectionLost("the connection ended")
            filled += count
        nonce = bytes(received).partition(b'"nonce": "')[2][: 2 * bundle.NONCE_SIZE]
        self.raw(bytes.fromhex(nonce.decode()))

    def raw(self, data: bytes) -> None:
        """Send bytes that need not be a frame."""
        self._pipe.write([data])

    def frame(self, kind: int, payload: bytes = b"", offset: int = 0, length: int | None = None) -> None:
        """Send a frame. Its header may announce another `length` than it has; the CRC is correct nevertheless."""
        fields = struct.pack("<B3xIIQ", kind, len(payload) if length is None else length, self._sent, offset)
        self._sent += 1
        self.raw(fields + struct.pack("<I", zlib.crc32(payload, zlib.crc32(fields))) + payload)

    def json(self, kind: int, fields: object) -> None:
        """Send a control frame."""
        self.frame(kind, json.dumps(fields).encode())

    def hello(self, **changes: object) -> None:
        """Send HELLO, with `changes` to what it should be."""
        self.json(wire.HELLO, {**HELLO, **changes})

    def source(self, size: object, kind: object = "file", **hello: object) -> None:
        """Send HELLO, take all orders up to that to scan, and send SOURCE."""
        self.hello(**hello)
        self.ordered(wire.REQUEST)
        self.json(wire.READY, {"sources": [{}], "directories": [], "notes": []})
        self.ordered(wire.TAKE)
        self.json(wire.TAKEN, {"took_us": 0, "apart_us": 0})
        self.ordered(wire.SCAN)
        self.json(wire.SOURCE, {"kind": kind, "size": size})

    def ordered(self, kind: int) -> dict[str, object]:
        """Return the server's next order, which must be of this kind."""
        frame = self.link.receive()
        assert frame.kind == kind
        return self.link.read_json(frame)

    def data(self, offset: int, length: int) -> None:
        """Send bytes of the image that are not zero."""
        self.frame(wire.DATA, b"\x5a" * length, offset)

    def zero(self, offset: int, length: int) -> None:
        """Send a run of zeros."""
        self.frame(wire.ZERO, struct.pack("<Q", length), offset)

    def progress(self, offset: int) -> None:
        """Report progress."""
        self.frame(wire.PROGRESS, offset=offset)

    def want(self, start: int, stop: int) -> None:
        """Ask for digests."""
        self.frame(wire.WANT, struct.pack("<Q", start), offset=stop)

    def totals(self, size: object, changed: object, read: object = 0, **more: object) -> None:
        """Send the totals."""
        totals = {"image_size": size, "changed_blocks": changed, "read": read, "touched": False, "notes": []}
        self.json(wire.TOTALS, {**totals, **more})

    def end(self, size: object, changed: object, read: object = 0, **more: object) -> None:
        """Send the totals and END."""
        self.totals(size, changed, read, **more)
        self.json(wire.END, {})


Script = Callable[[Wire], int | None]


class FakeConnection(Connection):
    """A connection to an agent that follows `script`. The result of `script` is its exit status (None: 0).

    When the script ends, the stream ends.
    """

    def __init__(self, script: Script, login: str = "host") -> None:
        self.place = Place(login, login)
        self.closed = False
        self.failure: BaseException | None = None
        self._status = 0
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        ours, self._theirs = socket.socketpair()
        self._ours = ours
        self._pipe = wire.Pipe(ours.fileno(), ours.fileno())
        self._thread = threading.Thread(target=self._run, args=(script,), daemon=True)
        self._thread.start()

    def _run(self, script: Script) -> None:
        try:
            self._status = script(Wire(self._theirs)) or 0
        except ConnectionLost:
            pass  # the server has closed the connection
        except BaseException as error:  # noqa: BLE001  # `close` raises it, so that the test fails
            self.failure = error
        finally:
            self._theirs.shutdown(socket.SHUT_WR)

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        with self._read_lock:  # so that no descriptor is closed while a thread reads from it
            if self.closed:
                raise ConnectionLost("the connection is closed")
            return self._pipe.readinto(view, timeout_s)

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        with self._write_lock:  # nor while a heartbeat writes: a new connection could get its number
            if self.closed:
                raise ConnectionLost("the connection is closed")
            self._pipe.write(parts)

    def wait(self, timeout_s: float) -> Exit | None:
        self._thread.join(timeout_s)
        return None if self._thread.is_alive() else Exit(self._status)

    def close(self) -> None:
        """Close both sides; a script that still sends gets an error."""
        if self.closed:
            return
        self.closed = True
        self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the script did not notice that the connection is closed"
        with self._read_lock, self._write_lock:
            self._ours.close()
        self._theirs.close()
        if self.failure is not None:
            raise self.failure

    def stderr(self) -> str:
        return ""

    def explain(self, error: ConnectionLost) -> BlockdiffError:
        return TransportError(f"lost the agent on {self.login}: {error.message}")
