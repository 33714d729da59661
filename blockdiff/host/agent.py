"""The agent: the program that runs on the host. It answers the server over the connection through which it was sent.

Shipped to the host: standard library only, Python 3.6 or newer.

It has three threads that matter. The main thread scans and sends. The reader receives the server's frames; when the
server has ended, it stops the main thread with a signal, whatever that is waiting for. The heartbeat sends ALIVE.
The agent writes nothing to the host's disk.
"""

import os
import pwd
import queue
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from typing import Dict, List, Optional, Tuple

from blockdiff import dump
from blockdiff.host import datadir, leftovers, relay
from blockdiff.host.freeze import Freeze
from blockdiff.host.relay import Relay
from blockdiff.host.restraint import Throttle, lower_priority
from blockdiff.host.sharedbuffers import MIN_RUN, SharedBuffers
from blockdiff.host.sources import LiveSource, Reading, Source, VolumeSource, locate
from blockdiff.host.tablefeed import TableFeed
from blockdiff.shared import blocks, pipeline, signals, trace, wire
from blockdiff.shared.errors import (
    BlockdiffError,
    ConnectionLost,
    Interrupted,
    ProtocolError,
    SourceError,
    of_system,
    printable,
    to_wire,
)
from blockdiff.shared.extents import Audit, aligned
from blockdiff.shared.grant import Grant
from blockdiff.shared.runs import Run, batch_size

#: How long to wait for the server's next order, in seconds: the server may be waiting for a lock.
ORDER_TIMEOUT_S = 600.0

#: How long the agent tries to report why it failed, in seconds; then SIGALRM ends it.
LAST_WORD_S = 60

#: How often to report the progress of a scan, in seconds: a frame for each batch would keep the server busy.
PROGRESS_S = 0.1


class Agent:
    """One session with the server, which gets only what is granted."""

    def __init__(self, link: wire.Link, grant: Grant) -> None:
        self._link = link
        self._grant = grant
        self._orders: "queue.Queue[Tuple[int, Dict[str, object]]]" = queue.Queue()
        self._feed: "Optional[TableFeed]" = None
        self._shared: "Optional[SharedBuffers]" = None
        self._relay: "Optional[Relay]" = None
        self._finished = False
        self._failure: "Optional[BlockdiffError]" = None

    def run(self) -> None:
        """Send HELLO, do what the server asks, and clean up; raises the exception that ends it early."""
        signals.unwind()
        try:
            threading.Thread(target=self._read, name="reader", daemon=True).start()
            wire.Heartbeat(self._link, wire.HEARTBEAT_S).start()
            self._link.send_json(wire.HELLO, hello())
            kind, order = self._next_order(wire.REQUEST, wire.SNAPSHOTS)
            if kind == wire.REQUEST:
                self._serve(order)
            else:
                self._show_snapshots(order)
        except Interrupted as error:
            if self._failure is not None:
                raise self._failure from error
            raise
        self._finished = True

    def _next_order(self, *kinds: int) -> Tuple[int, Dict[str, object]]:
        """Wait for the server's next order, which must be of one of these kinds; return its kind and its fields."""
        try:
            found, fields = self._orders.get(timeout=ORDER_TIMEOUT_S)
        except queue.Empty as error:
            raise ProtocolError("nothing from the server for {:g} s".format(ORDER_TIMEOUT_S)) from error
        if found not in kinds:
            names = wire.kind_name(found), wire.kind_name(kinds[0])
            raise ProtocolError("the server sent a frame of kind {} in place of {}".format(*names))
        return found, fields

    def _order(self, kind: int) -> Dict[str, object]:
        """Wait for the server's next order, which must be of this kind, and return its fields."""
        return self._next_order(kind)[1]

    def _read(self) -> None:
        """The reader thread: receive frames until the server has ended, then stop the main thread."""
        try:
            while True:
                self._handle(self._link.receive())
        except BlockdiffError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001  # nothing else would notice that the server has ended
            self._failure = ProtocolError("an order cannot be followed: {}: {}".format(type(error).__name__, error))
        if self._relay is not None:
            self._relay.close()
        if not self._finished:
            os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, frame: wire.Frame) -> None:
        if frame.kind in (wire.REQUEST, wire.TAKE, wire.SCAN, wire.SNAPSHOTS):
            fields = self._link.read_json(frame)
            if frame.kind == wire.SCAN:
                self._expect_table(fields)
            self._orders.put((frame.kind, fields))
        elif frame.kind == wire.TABLE and self._feed is not None:
            self._feed.feed(frame.offset, self._link.read_bytes(frame, wire.TABLE_WINDOW))
        elif frame.kind == wire.TAKEN_OUT and self._shared is not None:
            self._shared.taken_out()
        elif frame.kind == wire.OPEN:
            self._open_relay(self._link.read_json(frame))
        elif frame.kind == wire.BYTES and self._relay is not None:
            self._relay.feed(self._link.read_bytes(frame, wire.MAX_PAYLOAD))
        elif frame.kind == wire.CLOSE and self._relay is not None:
            self._relay.close()
            self._relay.join(relay.SOCKET_TIMEOUT_S)
            self._link.send(wire.CLOSE)
        else:
            raise ProtocolError("the server sent an unexpected frame of kind {}".format(wire.kind_name(frame.kind)))

    def _expect_table(self, order: Dict[str, object]) -> None:
        """Prepare for the digest table, which the server sends as soon as WANT asks for it."""
        self._feed = None
        if order.get("table_blocks") is not None:
            (count,) = wire.integers(order, "table_blocks")
            self._feed = TableFeed(self._link, blocks.digest_named(wire.text(order, "digest")).size, count)

    def _open_relay(self, order: Dict[str, object]) -> None:
        """Connect to a socket of this machine for the server; if that fails, the agent reports it and continues."""
        (port,) = wire.integers(order, "port")
        try:
            sockets, port = self._grant.check_sockets(wire.texts(order, "sockets"), port)
            self._relay = Relay(self._link, relay.connect(sockets, port), wire.BYTES)
        except SourceError as error:
            self._link.send_json(wire.OPEN, to_wire(error))
            return
        self._link.send_json(wire.OPEN, {})
        self._relay.start()

    def _serve(self, request: Dict[str, object]) -> None:
        """Take all sources at one moment, and scan one after the other.

        The user's commands run before and after the moment. Sources that are read as they are have no such moment: then
        the commands run before and after the whole scan.
        """
        commands = [command for command in _commands(request) if command is not None]
        paths = [os.fsdecode(path) for path in _paths(request)]
        self._grant.check_sources(paths, commands)
        end: Dict[str, object] = {}
        with ExitStack() as stack:
            sources = [stack.enter_context(source) for source in _sources(request)]
            for source, path in zip(sources, paths):
                source.notes += self._grant.notes([path])
            self._link.send_json(wire.READY, _ready(sources, request, self._grant))
            self._order(wire.TAKE)
            begun = time.monotonic()
            frozen = stack.enter_context(ExitStack())
            frozen.enter_context(Freeze(*_commands(request)))
            taking = time.monotonic()
            for source in sources:
                source.take()
            apart_us = _since(taking)
            held = bool(commands) and not request.get("snapshot")
            if not held:
                frozen.close()
            self._link.send_json(wire.TAKEN, {"took_us": _since(begun), "apart_us": apart_us})
            for source in sources:
                source.watch()
            if request.get("low_priority") and not held:
                lower_priority()  # not earlier, because stopped writers were waiting for us
            for source in sources:
                self._scan(source, self._order(wire.SCAN))
            if held:
                frozen.close()
                end["held_us"] = _since(begun)
        self._link.send_json(wire.END, end)

    def _show_snapshots(self, order: Dict[str, object]) -> None:
        """Remove those of our snapshots that the server names, and report which exist afterwards."""
        self._grant.check_snapshots()
        removed, failures = leftovers.remove(wire.texts(order, "remove"))
        found = leftovers.found()
        self._link.send_json(wire.SNAPSHOTS, {"removed": removed, "failures": failures, "snapshots": found})
        self._link.send_json(wire.END, {})

    def _scan(self, source: Source, order: Dict[str, object]) -> None:
        """Scan one source; send the blocks that changed, and the totals."""
        (block_size,) = wire.integers(order, "block_size")
        if not blocks.MIN_BLOCK_SIZE <= block_size <= blocks.MAX_BLOCK_SIZE:
            raise ProtocolError("block size {} is out of range".format(block_size))
        hasher = blocks.Hasher(blocks.digest_named(wire.text(order, "digest")), block_size)
        limit = wire.integers(order, "bandwidth")[0] if order.get("bandwidth") is not None else None
        hinted, audited, full = (bool(order.get(name)) for name in ("hinted", "audited", "full"))
        reading = Reading(hinted, audited, full)
        if full != (self._feed is None):
            raise ProtocolError("a full scan has no digest table, and every other has one")
        self._shared = _shared(order, batch_size(block_size))
        file, claimed = source.open(reading)
        if order.get("stream") is not None:
            file.stream, file.streams = wire.integers(order, "stream", "streams")
            if file.stream >= file.streams:
                raise ProtocolError("stream {} of {}".format(file.stream, file.streams))
        self._link.send_json(wire.SOURCE, {"kind": file.kind, "size": file.size, **source.opened()})
        audit = Audit(aligned(claimed, block_size, file.size)) if claimed is not None else None
        try:
            read, changed = self._send_changes(file, hasher, Throttle(limit), audit)
        except SourceError as error:
            cause = source.explain()
            if cause is None:
                raise
            raise cause from error
        totals = {"image_size": file.size, "changed_blocks": changed, "read": read}
        self._link.send_json(wire.TOTALS, {**totals, **source.finish(), "notes": source.notes})

    def _send_changes(
        self, source: dump.FileSource, hasher: blocks.Hasher, throttle: Throttle, audit: "Optional[Audit]"
    ) -> "Tuple[int, int]":
        """Send every changed run; neighbouring runs of zeros are sent as one. Returns bytes read and blocks changed."""
        read = changed = position = 0
        zeros_start = zeros_end = 0  # not sent yet
        reported_s = time.monotonic()
        pool = self._shared or pipeline.BufferPool(batch_size(hasher.block_size))
        for batch in dump.scan(source, hasher, pool, self._feed):
            for run in batch.runs:
                if audit is not None:
                    _check_claim(audit, run)
                if run.data is None and run.offset == zeros_end:
                    zeros_end += run.length
                    continue
                self._send_zeros(zeros_start, zeros_end)
                zeros_start = zeros_end = run.offset
                if run.data is None:
                    zeros_end += run.length
                else:
                    throttle.spend(run.length)
                    self._send_data(batch, run, run.data)
            read += batch.read
            changed += batch.changed
            position = batch.offset + batch.length
            if time.monotonic() - reported_s > PROGRESS_S or position == source.size:
                self._link.send(wire.PROGRESS, offset=position)
                reported_s = time.monotonic()
        self._send_zeros(zeros_start, zeros_end)
        if self._shared is not None:
            self._shared.finish()
        return read, changed

    def _send_data(self, batch: dump.Batch, run: Run, data: memoryview) -> None:
        if self._shared is None or batch.buffer is None or run.length < MIN_RUN:
            self._link.send(wire.DATA, data, offset=run.offset)
        else:
            place = self._shared.lend(batch.buffer) + run.offset - batch.offset
            self._link.send(wire.LENT, struct.pack("<QQ", place, run.length), offset=run.offset)

    def _send_zeros(self, start: int, end: int) -> None:
        if end > start:
            self._link.send(wire.ZERO, struct.pack("<Q", end - start), offset=start)


def _shared(order: Dict[str, object], size: int) -> "Optional[SharedBuffers]":
    """Return buffers in the memory that the server offers; None if it offers none, or if we cannot use it."""
    if order.get("memory") is None:
        return None
    try:
        return SharedBuffers(wire.integers(order, "memory")[0], size)
    except (OSError, ValueError):
        return None


def _paths(request: Dict[str, object]) -> List[bytes]:
    """Return the paths of the sources that a request names."""
    return [bytes.fromhex(path) for path in wire.texts(request, "paths")]


def _commands(request: Dict[str, object]) -> List[Optional[str]]:
    """Return the user's commands to run before and after the moment; None for a command that is not given."""
    return [wire.text(request, name) if request.get(name) is not None else None for name in ("before", "after")]


def _sources(request: Dict[str, object]) -> List[Source]:
    """Return the sources that a request names; raises `ProtocolError`."""
    paths = _paths(request)
    if not request.get("snapshot"):
        return [LiveSource(path, is_made=request.get("before") is not None) for path in paths]
    size = wire.text(request, "snapshot_size")
    owners, kept, chains = (wire.texts(request, name) for name in ("owners", "kept", "chains"))
    if not len(paths) == len(owners) == len(kept) == len(chains):
        raise ProtocolError("the request names {} sources, {} owners".format(len(paths), len(owners)))
    how = bool(request.get("keep")), bool(request.get("rehearsal"))
    return [
        VolumeSource(path, size, owner, chain, uuid, *how)
        for path, owner, chain, uuid in zip(paths, owners, chains, kept)
    ]


def _ready(sources: List[Source], request: Dict[str, object], grant: Grant) -> Dict[str, object]:
    """Check the sources, and find out on which of them the directories are that the server asks about."""
    prepared = [source.prepare() for source in sources]
    paths = [os.fsdecode(path) for path in _paths(request)]
    located = [grant.place(*locate(directory, paths)) for directory in wire.texts(request, "directories")]
    notes = [note for source in sources for note in source.notes]
    groups = sorted({source.group for source in sources if source.group})
    found: Dict[str, object] = {
        "sources": prepared,
        "directories": located,
        "volumes": datadir.volumes(located),
        "notes": notes,
        "left": grant.snapshots([left for group in groups for left in leftovers.found(group)]),
    }
    if request.get("datadir") is not None:
        found.update(datadir.outside(wire.text(request, "datadir"), paths, grant.place))
    return found


def _since(begun: float) -> int:
    return int((time.monotonic() - begun) * 1e6)


def _check_claim(audit: Audit, run: Run) -> None:
    wrong = audit.first_wrong(run.offset, run.offset + run.length)
    if wrong >= 0:
        raise SourceError(
            "the audit failed: thin_delta did not report the change at offset {}".format(wrong),
            "earlier runs with --keep-snapshot may have missed changes: use --full now, without --keep-snapshot",
        )


def hello() -> Dict[str, object]:
    """Return what the server should know about this machine."""
    return {
        "protocol": wire.PROTOCOL,
        "python": sys.version.split()[0],
        "hostname": socket.gethostname(),
        "user": _user(),
        "digests": sorted(blocks.AVAILABLE),
    }


def _user() -> str:
    """Return the name of the user that runs this process."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _traced(pipe: wire.Pipe) -> wire.Link:
    """Return our end of the connection, which also sends a trace to the server."""
    from blockdiff.shared import tracewriter  # imported here, because few runs need it

    link = tracewriter.AgentLink(pipe, wire.SILENCE_S)
    trace.report = link.report
    return link


def main(nonce: bytes, granted: "Optional[List[str]]" = None, traced: bool = False) -> None:
    """Run the agent on standard input and output, and end the process. `nonce` shows the server where it begins.

    `granted` are the words of a `Grant`. With `traced`, the agent sends a trace to the server.
    The descriptors are moved to other numbers first: so nothing that is printed by accident gets between the frames.
    """
    pipe = wire.Pipe(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    pipeline.switch_quickly()
    status = 1
    try:
        pipe.write([nonce])
        link = _traced(pipe) if traced else wire.Link(pipe, wire.SILENCE_S)
        try:
            Agent(link, Grant(granted)).run()
            status = 0
        except (ConnectionLost, Interrupted):
            raise
        except BlockdiffError as error:
            signal.alarm(LAST_WORD_S)
            link.send_json(wire.ERROR, to_wire(error))
        except Exception as error:  # noqa: BLE001  # the server gets a message in any case
            signal.alarm(LAST_WORD_S)
            known = of_system(error)
            if known is None:
                os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
                known = BlockdiffError("the agent failed: {}: {}".format(type(error).__name__, error))
            link.send_json(wire.ERROR, to_wire(known))
    except (BlockdiffError, Interrupted) as error:
        os.write(2, "blockdiff agent: {}\n".format(printable(str(error))).encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)  # not sys.exit: a thread that is stuck in a read must not keep the process alive
