"""The server's side of a session: ask the agent for what changed, and check everything that it sends.

All that the agent sends is checked with `blockdiff.session.rules` before it is used, and every buffer has a limit.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from blockdiff import transport
from blockdiff.session import rules
from blockdiff.session.requests import RunRequest, ScanRequest
from blockdiff.session.rules import Leftovers, Opened, Ready, Rules, Totals
from blockdiff.session.tablesender import TableSender
from blockdiff.session.tunnel import Tunnel
from blockdiff.shared import process, wire
from blockdiff.shared.blocks import Digest
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, ProtocolError, UsageError, from_wire, printable
from blockdiff.shared.runs import Run
from blockdiff.transport import connection
from blockdiff.transport.address import Address
from blockdiff.transport.advice import UnreachedError
from blockdiff.transport.connection import Connection
from blockdiff.transport.sharedmemory import SharedMemory


class Session:
    """One agent, from its start to its end. A context manager that ends all its processes and threads.

    The steps of a run are methods, to be called in this order: `prepare`, `begin_take`, `end_take`, then for each
    source `scan` and `changes`, and `finish`. Entering raises `TransportError` if no agent can be started. All of them
    raise the errors that the agent reports, `ConnectionLost` or `TransportError` if it has ended, and `ProtocolError`
    if it breaks a rule.

    `host` is what the agent reports about its machine, as printable text. The moments of its sources are at most
    `apart_s` seconds apart. `prefix` is a command that runs the agent, `begun` a connection from `transport.begin`, if
    there is one. If the host does not accept a connection, it is tried again after each of `pauses_s`, in seconds;
    `refused` counts these failures.
    """

    def __init__(
        self,
        address: Address,
        transport_name: str | None = None,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        begun: Connection | None = None,
        pauses_s: Sequence[float] = (),
    ) -> None:
        self.address = address
        self.apart_s = 0.0
        self._transport_name = transport_name
        self._options = options
        self._prefix = prefix
        self._begun = begun
        self._pauses_s = pauses_s
        self.refused = 0
        self._digests: list[str] = []
        self._shared_bytes = 0
        self._totals: Totals | None = None
        self._sender: TableSender | None = None
        self._tunnel: Tunnel | None = None

    def __enter__(self) -> "Session":
        for pause_s in self._pauses_s:
            try:
                return self._begin()
            except UnreachedError:
                self.refused += 1
                self._begun = None
            time.sleep(pause_s)
        return self._begin()

    def _begin(self) -> "Session":
        self._connection = self._begun or transport.connect(self.address, self._transport_name, self._options)
        try:
            self._link = connection.push_agent(self._connection, self._prefix)
            self._heartbeat = wire.Heartbeat(self._link, wire.HEARTBEAT_S)
            self._link.deadline = time.monotonic() + connection.START_TIMEOUT_S
            self.host = self._hello()
            self._link.deadline = None
            self._heartbeat.start()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._connection.close()  # first, so that a thread that is stuck in a write fails now
        self._heartbeat.stop()
        if self._sender is not None:
            self._sender.stop()

    @property
    def bytes_received(self) -> int:
        """Bytes that came from the agent so far, including those in shared memory."""
        return self._link.bytes_received + self._shared_bytes

    @property
    def totals(self) -> Totals:
        """What the agent reported at the end of the last source; available after the end of `changes`."""
        assert self._totals is not None, "no source was scanned to its end"
        return self._totals

    def _hello(self) -> dict[str, str]:
        hello = self._expect(wire.HELLO)
        with self._rules():
            (protocol,) = wire.integers(hello, "protocol")
            if protocol != wire.PROTOCOL:
                raise ProtocolError(f"speaks protocol {protocol} instead of {wire.PROTOCOL}")
            digests = hello.get("digests")
            self._digests = [str(name) for name in digests] if isinstance(digests, list) else []
            return {name: printable(wire.text(hello, name), 200) for name in ("python", "hostname", "user")}

    @contextmanager
    def tunnel(self, sockets: Sequence[str], port: int) -> Iterator[socket.socket]:
        """Yield a socket that is connected to the first of `sockets` on the host that exists, else to its `port`.

        Within the `with` statement, a thread receives the frames. Raises `SourceError` if the host cannot connect. If
        the connection to the host breaks, its error replaces an error that this causes inside the `with` statement.
        """
        self._tunnel = tunnel = Tunnel(self._link, lambda fields: from_wire(fields, self.address.login))
        try:
            with self._rules():
                end = tunnel.open(sockets, port)
            with end:
                yield end
            with self._rules():
                tunnel.close()
        except BlockdiffError as error:
            if tunnel.failure is not None and error is not tunnel.failure:
                with self._rules():
                    raise tunnel.failure from error
            raise
        finally:
            self._tunnel = None

    def prepare(self, request: RunRequest) -> Ready:
        """Send the agent what the run takes, and let it check what can be checked; raises `SourceError`."""
        self._order(
            wire.REQUEST,
            {
                "paths": [source.path.hex() for source in request.sources],
                "owners": [source.owner for source in request.sources],
                "chains": [source.chain for source in request.sources],
                "kept": [source.kept for source in request.sources],
                "snapshot": request.snapshot_size is not None,
                "snapshot_size": request.snapshot_size or "",
                "keep": request.keep,
                "before": request.before,
                "after": request.after,
                "directories": list(request.directories),
                "datadir": request.datadir,
                "low_priority": request.low_priority,
                "rehearsal": request.rehearsal,
            },
        )
        ready = self._expect(wire.READY)
        with self._rules():
            return rules.check_ready(ready, len(request.sources), len(request.directories))

    def leftovers(self, remove: Sequence[str]) -> Leftovers:
        """Let the agent remove the snapshots with these names, instead of a run; return which exist afterwards.

        Raises `SourceError` if one of them is not ours, or if a run is using it: then none is removed.
        """
        self._order(wire.SNAPSHOTS, {"remove": list(remove)})
        answer = self._expect(wire.SNAPSHOTS)
        with self._rules():
            return rules.check_leftovers(answer)

    def begin_take(self) -> None:
        """Let the agent take the moment of all sources; `end_take` must follow."""
        self._order(wire.TAKE, {})

    def end_take(self) -> float:
        """Wait until the moment was taken; return how long that took the agent, in seconds."""
        taken = self._expect(wire.TAKEN)
        with self._rules():
            took_us, apart_us = wire.integers(taken, "took_us", "apart_us")
            self.apart_s = apart_us / 1e6
            return took_us / 1e6

    def check_digest(self, digest: Digest) -> None:
        """Raise `UsageError` if the host cannot compute this digest."""
        if digest.name not in self._digests:
            raise UsageError(
                f"python on {self.address.login} cannot compute {digest.name} digests",
                f"choose another with --digest ({', '.join(sorted(self._digests))}), or install python3-xxhash there",
            )

    def scan(self, scan: ScanRequest) -> Opened:
        """Let the agent open the next source, and return what it is; raises `SourceError`."""
        memory = self._connection.memory
        self._order(
            wire.SCAN,
            {
                "block_size": scan.block_size,
                "digest": scan.digest.name,
                "table_blocks": scan.old.count if scan.old is not None else None,
                "bandwidth": scan.bandwidth,
                "full": scan.old is None,
                "hinted": scan.hinted,
                "audited": scan.audited,
                "memory": memory.fd if memory is not None and memory.prepare(scan.block_size) else None,
                "stream": scan.stream,
                "streams": scan.streams,
            },
        )
        source = self._expect(wire.SOURCE)
        with self._rules():
            return rules.check_source(source)

    def changes(
        self,
        scan: ScanRequest,
        image_size: int,
        allocate: Callable[[int], memoryview],
        progress: Callable[[int], object] = lambda offset: None,
    ) -> Iterator[Run]:
        """Yield the runs of blocks that changed, in ascending order; `totals` is set at the end.

        `allocate` returns a buffer for the bytes of the next run; `progress` is called with the offset up to which the
        source was examined.
        """
        if scan.old is not None:
            self._sender = TableSender(self._link, scan.old)
            self._sender.start()
        table_size = scan.old.count * scan.old.digest_size if scan.old is not None else 0
        checker = Rules(image_size, scan.block_size, table_size)
        while True:
            frame = self._next()
            with self._rules():
                if frame.kind == wire.DATA:
                    checker.check_run(frame.offset, frame.length, is_zero=False)
                    room = allocate(frame.length)
                    self._link.read_into(room)
                    yield Run(frame.offset, frame.length, room)
                elif frame.kind == wire.LENT and self._connection.memory is not None:
                    yield self._taken_out(frame, self._connection.memory, checker, allocate)
                elif frame.kind == wire.ZERO:
                    length = self._read_length(frame)
                    checker.check_run(frame.offset, length, is_zero=True)
                    yield Run(frame.offset, length, None)
                elif frame.kind == wire.PROGRESS and not frame.length:
                    checker.check_progress(frame.offset)
                    progress(frame.offset)
                elif frame.kind == wire.WANT and self._sender is not None:
                    start = self._read_length(frame)
                    checker.check_want(start, frame.offset)
                    self._sender.want(start, frame.offset)
                elif frame.kind == wire.TOTALS:
                    self._totals = checker.check_totals(self._link.read_json(frame))
                    break
                else:
                    raise ProtocolError(f"sent an unexpected frame of kind {wire.kind_name(frame.kind)}")
            if self._sender is not None and self._sender.failure is not None:
                raise self._sender.failure
        if self._sender is not None:
            self._sender.stop()
            self._sender = None

    def _taken_out(
        self, frame: wire.Frame, memory: SharedMemory, checker: Rules, allocate: Callable[[int], memoryview]
    ) -> Run:
        """Return a copy of the run in the shared memory, which the agent cannot change any more."""
        place, length = rules.read_place(self._link.read_bytes(frame, rules.PLACE.size))
        checker.check_run(frame.offset, length, is_zero=False)
        room = allocate(length)
        memory.read_into(room, place)
        self._shared_bytes += length
        try:
            self._link.send(wire.TAKEN_OUT)
        except ConnectionLost:
            pass  # an agent that failed has sent the reason, which is received next
        return Run(frame.offset, length, room)

    def finish(self) -> float | None:
        """Wait until the agent has cleaned up and has ended without an error.

        Returns for how many seconds the user's commands stopped writers in a run without snapshots; otherwise None.
        """
        end = self._expect(wire.END)
        with self._rules():
            held_s = wire.integers(end, "held_us")[0] / 1e6 if end.get("held_us") is not None else None
        self._check_exit()
        return held_s

    def _read_length(self, frame: wire.Frame) -> int:
        if frame.length != rules.LENGTH.size:
            raise ProtocolError(f"sent a length of {frame.length} bytes")
        (length,) = rules.LENGTH.unpack(self._link.read_bytes(frame, rules.LENGTH.size))
        return int(length)

    def _check_exit(self) -> None:
        """Check that the agent, which has sent END, sends nothing more and ends with status 0.

        Other processes may keep the connection open. We do not wait for them, nor for the agent's end if they hide it
        from us: the agent had cleaned up before it sent END.
        """
        patience_s = connection.EXIT_TIMEOUT_S if self._connection.tells_end else process.LINGER_S
        self._link.silence_s = self._link.stall_s = patience_s
        with self._rules():
            try:
                frame = self._link.receive()
                raise ProtocolError(f"sent a frame of kind {wire.kind_name(frame.kind)} after its end")
            except ConnectionLost:
                pass  # expected
        ended = self._connection.wait(patience_s)
        if ended is None and not self._connection.tells_end:
            return
        if ended is None:
            raise self._broken("did not end after it had sent everything")
        if ended.status is None:
            raise self._connection.explain(
                ConnectionLost("the connection ended before it reported how the agent ended")
            )
        if ended.status != 0:
            raise self._broken(f"ended with status {ended.status} after it had sent everything")

    def _order(self, kind: int, fields: dict[str, object]) -> None:
        with self._rules():
            self._link.send_json(kind, fields)

    def _next(self) -> wire.Frame:
        """Return the next frame; raise the error of an error frame."""
        with self._rules():
            frame = self._link.receive()
            if frame.kind != wire.ERROR:
                return frame
            fields = self._link.read_json(frame)
        raise from_wire(fields, self.address.login)

    def _expect(self, kind: int) -> dict[str, object]:
        """Return the fields of the next frame, which must be of this kind; raise the error of an error frame."""
        if self._tunnel is not None:
            with self._rules():
                found, fields = self._tunnel.control()
        else:
            frame = self._next()
            found, fields = frame.kind, {}
            if found == kind:
                with self._rules():
                    fields = self._link.read_json(frame)
        if found != kind:
            raise self._broken(f"sent a frame of kind {wire.kind_name(found)} in place of {wire.kind_name(kind)}")
        return fields

    @contextmanager
    def _rules(self) -> Iterator[None]:
        """Turn errors of the link and of the checks into errors for the user, with the host and what to do."""
        try:
            yield
        except ProtocolError as error:
            raise self._broken(error.message) from error
        except ConnectionLost as error:
            raise self._lost(error) from error

    def _lost(self, error: ConnectionLost) -> BlockdiffError:
        self._connection.wait(0 if error.silent else connection.EXIT_TIMEOUT_S)
        return self._connection.explain(error)

    def _broken(self, why: str) -> ProtocolError:
        return ProtocolError(
            f"the agent on {self.address.login} broke the protocol: {why}",
            "nothing of this run was kept; if it happens again, suspect that host",
        )
