"""The agent: what runs on the host. Answers the server over the connection that it was pushed through.

Shipped to the host: standard library only, Python 3.6 or newer.

Three threads matter: the main thread scans and sends; the reader takes what the server sends, and tells the main
thread by a signal when the server is gone, whatever it is waiting for just then; the heartbeat says that we are alive.
The agent writes nothing to the host's disk.
"""

import os
import platform
import queue
import signal
import socket
import struct
import threading
import time
import traceback
from typing import Dict, Optional

from blockdiff import blocks, dump, process, wire
from blockdiff.errors import (
    BlockdiffError,
    ConnectionLost,
    Interrupted,
    ProcessError,
    ProtocolError,
    printable,
    to_wire,
)

#: How long the server may take from the agent's start to its request, in seconds: it may be taking a lock elsewhere.
REQUEST_TIMEOUT_S = 600.0

#: How long the agent may try to tell why it failed, in seconds; then SIGALRM ends it.
LAST_WORD_S = 60

#: Added to the niceness, and the level in the best-effort class of I/O priorities (7 is the lowest): a backup yields to
#: production but is never starved, because a snapshot that is kept for long fills up.
NICENESS = 10
IO_LEVEL = 7


class TableFeed:
    """The previous generation's digests as they arrive from the server, in a bounded buffer.

    The reader thread calls `feed`, the scanning thread `take`, which grants the server more as it goes.
    """

    def __init__(self, link: wire.Link, digest_size: int, block_count: int) -> None:
        self._link = link
        self._digest_size = digest_size
        self._total = block_count * digest_size
        self._buffer = bytearray()
        self._arrived = threading.Condition()
        self._fed = 0
        self._taken = 0
        self._granted = 0

    def feed(self, data: bytes) -> None:
        """Append what arrived; raises `ProtocolError` for more than was granted or than there can be."""
        with self._arrived:
            self._fed += len(data)
            if self._fed > min(self._granted, self._total):
                raise ProtocolError("the server sent more of the digest table than was asked for")
            self._buffer += data
            self._arrived.notify()

    def take(self, count: int) -> bytes:
        """Return the digests of the next `count` blocks, or as many as the table still has."""
        wanted = min(count * self._digest_size, self._total - self._taken)
        if self._taken + wanted > self._granted - wire.TABLE_WINDOW // 2 and self._granted < self._total:
            self._granted = self._taken + wire.TABLE_WINDOW
            self._link.send(wire.WANT, offset=self._granted)
        with self._arrived:
            while len(self._buffer) < wanted:
                self._arrived.wait()
            digests = bytes(self._buffer[:wanted])
            del self._buffer[:wanted]
        self._taken += wanted
        return digests


class Throttle:
    """Holds the sender to `bytes_per_s` on average; None means no limit."""

    def __init__(self, bytes_per_s: Optional[int]) -> None:
        self._bytes_per_s = bytes_per_s
        self._due = time.monotonic()

    def spend(self, count: int) -> None:
        """Pause until `count` more bytes may be sent."""
        if self._bytes_per_s is None:
            return
        self._due = max(self._due, time.monotonic()) + count / self._bytes_per_s
        time.sleep(max(0.0, self._due - time.monotonic()))


class Agent:
    """One session with the server."""

    def __init__(self, link: wire.Link) -> None:
        self._link = link
        self._requests: "queue.Queue[Dict[str, object]]" = queue.Queue()
        self._feed: "Optional[TableFeed]" = None
        self._finished = False
        self._failure: "Optional[BlockdiffError]" = None

    def run(self) -> None:
        """Say hello, do what the server asks, and send the totals; raises whatever ends it early."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._interrupt)
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        wire.Heartbeat(self._link).start()
        try:
            self._link.send_json(wire.HELLO, hello())
            self._link.send_json(wire.END, self._dump(self._request()))
        except Interrupted as error:
            if self._failure is not None:
                raise self._failure from error
            raise
        self._finished = True

    def _request(self) -> Dict[str, object]:
        try:
            return self._requests.get(timeout=REQUEST_TIMEOUT_S)
        except queue.Empty as error:
            raise ProtocolError("no request after {:g} s".format(REQUEST_TIMEOUT_S)) from error

    def _interrupt(self, number: int, _frame: object) -> None:
        """Unwind the main thread, once: what follows is clean-up, which no further signal may disturb."""
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted("the agent was stopped by signal {}".format(number))

    def _read(self) -> None:
        """The reader thread: take frames until the server is gone, then stop the main thread."""
        try:
            while True:
                self._take(self._link.receive())
        except BlockdiffError as error:
            self._failure = error
        if not self._finished:
            os.kill(os.getpid(), signal.SIGTERM)

    def _take(self, frame: wire.Frame) -> None:
        if frame.kind == wire.REQUEST:
            request = self._link.read_json(frame)
            self._prepare(request)
            self._requests.put(request)
        elif frame.kind == wire.TABLE and self._feed is not None:
            self._feed.feed(self._link.read_bytes(frame, wire.TABLE_WINDOW))
        else:
            raise ProtocolError("the server sent an unexpected frame of kind {}".format(frame.kind))

    def _prepare(self, request: Dict[str, object]) -> None:
        """Get ready for the digest table, which may follow the request as soon as it is wanted."""
        if request.get("table_blocks") is not None:
            (count,) = wire.integers(request, "table_blocks")
            self._feed = TableFeed(self._link, blocks.digest_named(wire.text(request, "digest")).size, count)

    def _dump(self, request: Dict[str, object]) -> Dict[str, object]:
        """Scan the source, send what changed, and return the totals."""
        (block_size,) = wire.integers(request, "block_size")
        if not blocks.MIN_BLOCK_SIZE <= block_size <= blocks.MAX_BLOCK_SIZE:
            raise ProtocolError("block size {} is out of range".format(block_size))
        hasher = blocks.Hasher(blocks.digest_named(wire.text(request, "digest")), block_size)
        limit = wire.integers(request, "bandwidth")[0] if request.get("bandwidth") is not None else None
        if request.get("low_priority"):
            lower_priority()
        with dump.FileSource(bytes.fromhex(wire.text(request, "path"))) as source:
            self._link.send_json(wire.SOURCE, {"kind": source.kind, "size": source.size})
            read, changed = self._send_changes(source, hasher, Throttle(limit))
            source.check_size()
            return {"image_size": source.size, "changed_blocks": changed, "read": read, "touched": source.changed()}

    def _send_changes(self, source: dump.FileSource, hasher: blocks.Hasher, throttle: Throttle) -> "tuple[int, int]":
        """Send every changed run; neighbouring runs of zeros go as one. Returns bytes read and blocks sent."""
        old = self._feed.take if self._feed is not None else None
        read = changed = 0
        zeros = (0, 0)
        for batch in dump.scan(source, hasher, dump.buffers_for(hasher.block_size), old, with_digests=False):
            for run in batch.runs:
                if run.data is None and run.offset == sum(zeros):
                    zeros = (zeros[0], zeros[1] + run.length)
                    continue
                self._send_zeros(*zeros)
                zeros = (run.offset, run.length) if run.data is None else (0, 0)
                if run.data is not None:
                    throttle.spend(run.length)
                    self._link.send(wire.DATA, run.data, offset=run.offset)
            read += batch.read
            changed += batch.changed
            self._link.send(wire.PROGRESS, offset=batch.offset + batch.length)
        self._send_zeros(*zeros)
        return read, changed

    def _send_zeros(self, offset: int, length: int) -> None:
        if length:
            self._link.send(wire.ZERO, struct.pack("<Q", length), offset=offset)


def hello() -> Dict[str, object]:
    """Return what the server should know of this machine."""
    return {
        "protocol": wire.PROTOCOL,
        "python": platform.python_version(),
        "hostname": socket.gethostname(),
        "digests": sorted(blocks.AVAILABLE),
    }


def lower_priority() -> None:
    """Yield the CPU and the disk to everybody else; a host that has no ionice(1) gives no I/O priority."""
    os.nice(NICENESS)
    try:
        process.run(["ionice", "-c", "2", "-n", str(IO_LEVEL), "-p", str(os.getpid())], timeout_s=10)
    except ProcessError:
        pass


def main(nonce: bytes) -> None:
    """Run the agent on standard input and output, and end the process. `nonce` tells the server where we begin.

    The descriptors are moved away first: nothing that prints by accident can get between the frames.
    """
    pipe = wire.Pipe(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    status = 1
    try:
        pipe.write([nonce])
        link = wire.Link(pipe)
        try:
            Agent(link).run()
            status = 0
        except (ConnectionLost, Interrupted):
            raise
        except BlockdiffError as error:
            signal.alarm(LAST_WORD_S)
            link.send_json(wire.ERROR, to_wire(error))
        except Exception as error:  # noqa: BLE001  # the boundary: the server gets a sentence in any case
            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
            signal.alarm(LAST_WORD_S)
            link.send_json(wire.ERROR, {"message": "the agent failed: {}: {}".format(type(error).__name__, error)})
    except (BlockdiffError, Interrupted) as error:
        os.write(2, "blockdiff agent: {}\n".format(printable(str(error))).encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)  # not sys.exit: a thread that is stuck in a read must not keep the process
