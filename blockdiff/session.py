"""The server's half of a session: ask the agent for what changed, and believe nothing that it did not prove.

The host is trusted for the content of its own volume and for nothing else. Whatever the agent sends is held against the
rules of `docs/architecture.md` before it is used, and every buffer has a bound.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from blockdiff import dump, transport, wire
from blockdiff.address import Address
from blockdiff.blocks import MAX_BLOCK_SIZE, MAX_IMAGE_SIZE, Digest, block_count
from blockdiff.deltafile import TableReader
from blockdiff.dump import Run
from blockdiff.errors import BlockdiffError, ConnectionLost, ProtocolError, UsageError, from_wire, printable
from blockdiff.process import STOP_TIMEOUT_S
from blockdiff.transport import connection

#: Digests that are sent in one frame, in bytes.
_TABLE_FRAME = 64 << 10

_LENGTH = struct.Struct("<Q")
_KINDS = ("file", "device")


@dataclass(frozen=True)
class Request:
    """What to back up: `old` is the previous digest table, None for a full generation; `bandwidth` in bytes/s."""

    path: bytes
    block_size: int
    digest: Digest
    old: TableReader | None = None
    bandwidth: int | None = None
    low_priority: bool = True


@dataclass(frozen=True)
class Totals:
    """What the agent says at the end: bytes read, and whether the file was written to meanwhile (None: unknown)."""

    read: int
    touched: bool | None


class _TableSender:
    """A thread that sends the previous digest table as far as the agent wants it."""

    def __init__(self, link: wire.Link, table: TableReader) -> None:
        self._link = link
        self._table = table
        self._wanted = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="table", daemon=True)
        self.failure: BlockdiffError | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the connection is closed by now, so that it is not stuck in a write."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(STOP_TIMEOUT_S)

    def want(self, limit: int) -> None:
        """Send up to byte `limit` of the table's digests."""
        with self._changed:
            self._wanted = max(self._wanted, limit)
            self._changed.notify()

    def _run(self) -> None:
        size, step = self._table.digest_size, _TABLE_FRAME // self._table.digest_size
        sent = 0
        try:
            while sent < self._table.count:
                with self._changed:
                    while not self._stopped and self._wanted // size <= sent:
                        self._changed.wait()
                    if self._stopped:
                        return
                    count = min(step, self._wanted // size - sent, self._table.count - sent)
                self._link.send(wire.TABLE, self._table.digests(sent, count))
                sent += count
        except ConnectionLost:
            pass  # the receiving thread notices as well, and knows more
        except BlockdiffError as error:
            self.failure = error


class Session:
    """One agent, from its start to its end. A context manager that leaves no process and no thread behind.

    Entering raises `TransportError` where no agent can be started. `host` is what the agent says of its machine: text,
    made printable. `prefix` is a command to run the agent under.
    """

    def __init__(
        self,
        address: Address,
        transport_name: str | None = None,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.image_size = 0
        self.source_kind = ""
        self.totals: Totals | None = None
        self._transport_name = transport_name
        self._options = options
        self._prefix = prefix
        self._digests: list[str] = []
        self._sender: _TableSender | None = None

    def __enter__(self) -> "Session":
        self._connection = transport.connect(self.address, self._transport_name, self._options)
        try:
            self._link = connection.push_agent(self._connection, self._prefix)
            self._heartbeat = wire.Heartbeat(self._link)
            self.host = self._hello()
            self._heartbeat.start()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._connection.close()  # first: whatever thread is stuck in a write fails now
        self._heartbeat.stop()
        if self._sender is not None:
            self._sender.stop()

    @property
    def bytes_received(self) -> int:
        """Bytes that came from the agent so far."""
        return self._link.bytes_received

    def _hello(self) -> dict[str, str]:
        hello = self._expect(wire.HELLO)
        with self._rules():
            (protocol,) = wire.integers(hello, "protocol")
            if protocol != wire.PROTOCOL:
                raise ProtocolError(f"speaks protocol {protocol} instead of {wire.PROTOCOL}")
            digests = hello.get("digests")
            self._digests = [str(name) for name in digests] if isinstance(digests, list) else []
            return {name: printable(wire.text(hello, name), 200) for name in ("python", "hostname")}

    def open_source(self, request: Request) -> int:
        """Tell the agent what to scan and return the image's size in bytes.

        Raises `SourceError` where the source cannot be read, and `UsageError` where the host lacks the digest.
        """
        if request.digest.name not in self._digests:
            raise UsageError(
                f"python on {self.address.login} cannot compute {request.digest.name} digests",
                f"choose another with --digest ({', '.join(sorted(self._digests))}), or install python3-xxhash there",
            )
        self._link.send_json(
            wire.REQUEST,
            {
                "path": request.path.hex(),
                "block_size": request.block_size,
                "digest": request.digest.name,
                "table_blocks": request.old.count if request.old is not None else None,
                "bandwidth": request.bandwidth,
                "low_priority": request.low_priority,
            },
        )
        source = self._expect(wire.SOURCE)
        with self._rules():
            (self.image_size,) = wire.integers(source, "size")
            self.source_kind = wire.text(source, "kind")
            if not 0 < self.image_size <= MAX_IMAGE_SIZE - MAX_BLOCK_SIZE or self.source_kind not in _KINDS:
                raise ProtocolError(f"claims a {printable(self.source_kind, 20)} of {self.image_size} bytes")
        return self.image_size

    def changes(
        self,
        request: Request,
        allocate: Callable[[int], memoryview],
        progress: Callable[[int], object] = lambda offset: None,
    ) -> Iterator[Run]:
        """Yield the runs of blocks that changed, ascending; `totals` is set at the end.

        `allocate` returns the room for the bytes of the next run, `progress` is told up to which offset the source was
        examined. Raises what the agent reports, `ConnectionLost` or `TransportError` where it is gone, and
        `ProtocolError` where it breaks a rule.
        """
        if request.old is not None:
            self._sender = _TableSender(self._link, request.old)
            self._sender.start()
        table_size = request.old.count * request.old.digest_size if request.old is not None else 0
        checker = _Checker(self.image_size, request.block_size, table_size)
        while True:
            frame = self._next()
            with self._rules():
                if frame.kind == wire.DATA:
                    checker.check_run(frame.offset, frame.length, is_zero=False)
                    room = allocate(frame.length)
                    self._link.read_into(room)
                    yield Run(frame.offset, frame.length, room)
                elif frame.kind == wire.ZERO:
                    length = self._read_length(frame)
                    checker.check_run(frame.offset, length, is_zero=True)
                    yield Run(frame.offset, length, None)
                elif frame.kind == wire.PROGRESS and not frame.length:
                    checker.check_progress(frame.offset)
                    progress(frame.offset)
                elif frame.kind == wire.WANT and not frame.length and self._sender is not None:
                    checker.check_want(frame.offset)
                    self._sender.want(frame.offset)
                elif frame.kind == wire.END:
                    self.totals = checker.check_totals(self._link.read_json(frame))
                    break
                else:
                    raise ProtocolError(f"sent an unexpected frame of kind {frame.kind}")
            if self._sender is not None and self._sender.failure is not None:
                raise self._sender.failure
        self._check_exit()

    def _read_length(self, frame: wire.Frame) -> int:
        if frame.length != _LENGTH.size:
            raise ProtocolError(f"sent a length of {frame.length} bytes")
        (length,) = _LENGTH.unpack(self._link.read_bytes(frame, _LENGTH.size))
        return int(length)

    def _check_exit(self) -> None:
        """The agent has said that all is well; it must also end well, and without another word."""
        self._link.silence_s = self._link.stall_s = connection.EXIT_TIMEOUT_S
        with self._rules():
            try:
                frame = self._link.receive()
                raise ProtocolError(f"sent a frame of kind {frame.kind} after its end")
            except ConnectionLost:
                pass  # as it should be
        status = self._connection.wait(connection.EXIT_TIMEOUT_S)
        if status == -1:
            raise self._connection.explain(ConnectionLost("the connection ended before it told how the agent did"))
        if status != 0:
            how = "did not end" if status is None else f"ended with status {status}"
            raise self._broken(f"{how} after it had sent everything")

    def _next(self) -> wire.Frame:
        """Return the next frame; an error frame is raised."""
        with self._rules():
            frame = self._link.receive()
            if frame.kind != wire.ERROR:
                return frame
            fields = self._link.read_json(frame)
        raise from_wire(fields, self.address.login)

    def _expect(self, kind: int) -> dict[str, object]:
        frame = self._next()
        with self._rules():
            if frame.kind != kind:
                raise ProtocolError(f"sent a frame of kind {frame.kind} in place of {kind}")
            return self._link.read_json(frame)

    @contextmanager
    def _rules(self) -> Iterator[None]:
        """Turn what the link and the checks raise into what the user should know: which host, and what to do."""
        try:
            yield
        except ProtocolError as error:
            raise self._broken(error.message) from error
        except ConnectionLost as error:
            raise self._lost(error) from error

    def _lost(self, error: ConnectionLost) -> BlockdiffError:
        self._connection.wait(connection.EXIT_TIMEOUT_S if "ended" in error.message else 0)
        return self._connection.explain(error)

    def _broken(self, why: str) -> ProtocolError:
        return ProtocolError(
            f"the agent on {self.address.login} broke the protocol: {why}",
            "nothing of this run was kept; if it happens again, suspect that host",
        )


class _Checker:
    """The rules for what an agent may send. Raises `ProtocolError`."""

    def __init__(self, image_size: int, block_size: int, table_size: int) -> None:
        self._image_size = image_size
        self._block_size = block_size
        self._table_size = table_size
        self._position = 0
        self._progress = 0
        self._wanted = 0
        self._changed_blocks = 0

    def check_run(self, offset: int, length: int, is_zero: bool) -> None:
        """A run is of whole blocks within the image, behind all runs before it."""
        stop = offset + length
        if offset < self._position or not length or stop > self._image_size:
            raise ProtocolError(f"sent {length} bytes at offset {offset} of {self._image_size}, after {self._position}")
        if offset % self._block_size or (stop % self._block_size and stop != self._image_size):
            raise ProtocolError(f"sent {length} bytes at offset {offset}, which are not whole blocks")
        blocks = block_count(length, self._block_size)
        if not is_zero and blocks > dump.BATCH_BLOCKS:
            raise ProtocolError(f"sent {blocks} blocks at once")
        self._position = stop
        self._changed_blocks += blocks

    def check_progress(self, offset: int) -> None:
        """Progress goes forward, each time, and to the image's end at most: so there is an end of it."""
        if not self._progress < offset <= self._image_size:
            raise ProtocolError(f"reported progress to offset {offset} of {self._image_size}, after {self._progress}")
        self._progress = offset

    def check_want(self, offset: int) -> None:
        """More of the digest table is wanted each time, and not much more than there is: so there is an end of it."""
        if not self._wanted < offset <= self._table_size + wire.TABLE_WINDOW:
            raise ProtocolError(f"wants {offset} of {self._table_size} bytes of digests, after {self._wanted}")
        self._wanted = offset

    def check_totals(self, end: dict[str, object]) -> Totals:
        """The totals are those of what came, and the whole image was examined."""
        image_size, changed_blocks, read = wire.integers(end, "image_size", "changed_blocks", "read")
        if (image_size, changed_blocks) != (self._image_size, self._changed_blocks):
            raise ProtocolError(f"counts {changed_blocks} blocks of {image_size} bytes, {self._changed_blocks} came")
        if self._progress != self._image_size or read > self._image_size:
            raise ProtocolError(f"stopped at offset {self._progress} of {self._image_size}")
        touched = end.get("touched")
        return Totals(read, touched if isinstance(touched, bool) else None)
