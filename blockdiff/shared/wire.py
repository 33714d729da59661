"""Frames between server and agent.

Shipped to the host: standard library only, Python 3.6 or newer.

A frame is a header of 24 bytes and at most `MAX_PAYLOAD` bytes::

    u8 kind, 3 zero bytes, u32le length, u32le sequence, u64le offset, u32le crc

`length` is the size of the payload in bytes. `sequence` counts the frames sent in this direction, from 0. `offset` is a
place in the image in bytes, if the kind of frame has one. `crc` is the CRC-32 of everything else: the header before it,
and the payload. Control frames carry JSON, bulk frames raw bytes.
SSH already protects its data; CRC and sequence protect every transport, and cost little.
"""

import json
import os
import select
import struct
import threading
import time
import zlib
from abc import ABC, abstractmethod
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from blockdiff.shared.errors import ConnectionLost, ProtocolError
from blockdiff.shared.fields import Fields

# Frame kinds: plain numbers, because each frame is compared with several of them. Both sides may send these:
ALIVE = 1  # empty: the sender is still alive
ERROR = 2  # JSON: what ended the sender's part of the run
# One run, in this order; the server need not wait for an answer before it continues:
HELLO = 3  # JSON, agent: what it is and what it found
REQUEST = 4  # JSON, server: which sources, and how to take them
READY = 5  # JSON, agent: it has checked everything that can be checked while writers continue
TAKE = 6  # server: make the snapshots now
TAKEN = 7  # JSON, agent: they are made, and writers may continue
# For each source in turn:
SCAN = 8  # JSON, server: send what changed
SOURCE = 9  # JSON, agent: what the source is
TABLE = 10  # server: digests of the previous generation, from byte `offset` of the digests on, as far as WANT allows
DATA = 11  # agent: whole blocks at `offset`; only the image's last may be short
ZERO = 12  # agent: u64le length: this many zero bytes at `offset`
PROGRESS = 13  # agent: everything before `offset` was examined
WANT = 14  # agent: u64le start: digests from byte `start` of the table on may be sent, up to byte `offset`
TOTALS = 15  # JSON, agent: the totals of the scan
# After the last source:
END = 16  # JSON, agent: the clean-up is done; nothing follows
# A socket of the host, relayed to the server and back (`blockdiff.host.relay`):
OPEN = 17  # JSON, server: connect to it
BYTES = 18  # bytes that this side's socket received; empty: end of its data
CLOSE = 19  # server: its socket was closed; agent: the host's socket was closed, too, and the relay has ended
# If both are on one machine and share memory (`blockdiff.host.sharedbuffers`):
LENT = 20  # agent: u64le place, u64le length: the bytes of a DATA frame at `offset` are at that place of the memory
TAKEN_OUT = 21  # server: the next of the runs that LENT named was copied out
# Instead of a run:
SNAPSHOTS = 22  # JSON, server: remove these snapshots of ours; agent: what was removed, and which exist; END follows
# At any time after a frame of the agent's, if a trace was asked for (`blockdiff.shared.tracewriter`):
TRACE = 23  # agent: one line of the trace
# The names of the kinds; up to here, no other name of this module is a number.
_KINDS = {value: name for name, value in globals().copy().items() if isinstance(value, int)}

#: Is increased with each change that makes older agents or servers incompatible. In normal use these never meet: the
#: server pushes its own agent.
PROTOCOL = 3

HEADER = struct.Struct("<B3xIIQI")
_HEADER_BEFORE_CRC = struct.Struct("<B3xIIQ")
_CRC = struct.Struct("<I")
MAX_PAYLOAD = 4 << 20
#: Largest JSON payload.
MAX_CONTROL = 1 << 20
#: Largest number in a JSON payload: more than any real count.
MAX_INTEGER = (1 << 63) - 1

#: READY names at most this many places outside of a database's directory.
MAX_OUTSIDE = 1000
# Why a snapshot of ours exists: its run still works; it is kept for the next run; its run died, and the next one
# removes it.
RUNNING = "running"
KEPT = "kept"
DEAD = "dead"

# Bytes to read at once if fewer are needed: so one call reads many small frames, and only a small part of a large
# frame's payload is copied twice.
_AHEAD = 16 << 10

#: Bytes of digests that the agent buffers. Several times what one batch of a scan needs.
TABLE_WINDOW = 1 << 20

#: Each side sends something at least this often, in seconds ...
HEARTBEAT_S = 10.0
#: ... and gives up on the other side after this many seconds of silence. A host under heavy load may stall for a while.
SILENCE_S = 120.0
#: A side that is alive but makes no progress for this many seconds is given up on: a disk does not answer, or the side
#: is malicious.
STALL_S = 3600.0


def kind_name(kind: int) -> str:
    """Return the name of a frame's kind, for messages."""
    return _KINDS[kind]


Buffer = Union[bytes, bytearray, memoryview]


class Carrier(ABC):
    """Carries the bytes of a `Link` in both directions."""

    @abstractmethod
    def readinto(self, view: memoryview, timeout_s: float) -> int:
        """Read at least one byte into `view` and return how many; 0: the other side has ended.

        Raises `ConnectionLost` after `timeout_s` seconds without a byte, and if the read fails.
        """

    @abstractmethod
    def write(self, parts: Sequence[Buffer]) -> None:
        """Write all bytes of all `parts`; raises `ConnectionLost` if the other side has ended."""


class Pipe(Carrier):
    """A carrier over a pair of file descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._readable = select.poll()
        self._readable.register(read_fd, select.POLLIN)

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        """See `Carrier`."""
        try:
            if not self._readable.poll(timeout_s * 1000):
                raise ConnectionLost("silent for {:g} s".format(timeout_s), silent=True)
            return os.readv(self._read_fd, [view])
        except OSError as error:
            raise ConnectionLost("cannot read: {}".format(error.strerror)) from error

    def write(self, parts: Sequence[Buffer]) -> None:
        """See `Carrier`."""
        views = [memoryview(part) for part in parts if len(part)]
        try:
            while views:
                written = os.writev(self._write_fd, views)
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]
        except OSError as error:
            raise ConnectionLost("cannot write: {}".format(error.strerror)) from error


class Frame(NamedTuple):
    """The header of a frame whose payload was not read yet."""

    kind: int
    length: int
    offset: int


class Link:
    """One end of the connection: sends and receives frames.

    Any thread may send; one thread receives. `silence_s` is how long the other side may send nothing, `stall_s` how
    long it may send nothing but ALIVE (None: no limit), and `deadline` the time (`time.monotonic`) after which nothing
    is received any more (None: no deadline). `crc32` may be a faster function than `zlib.crc32`.
    """

    #: The last of the frame kinds that this end accepts: TRACE is sent only to an end that asked for it.
    last_kind = SNAPSHOTS

    def __init__(
        self,
        carrier: Carrier,
        silence_s: float = SILENCE_S,
        stall_s: Optional[float] = None,
        crc32: "Callable[[Buffer, int], int]" = zlib.crc32,
    ) -> None:
        self._carrier = carrier
        self._crc32 = crc32
        self.silence_s = silence_s
        self.stall_s = stall_s
        self.deadline = None  # type: Optional[float]
        self._send_lock = threading.Lock()
        self._sent = 0
        self._received = 0
        self._header = bytearray(HEADER.size)
        self._ahead = memoryview(bytearray(_AHEAD))
        self._waiting = self._ahead[:0]  # what was read and not needed yet
        self._remaining = 0
        self._crc = 0
        self._expected_crc = 0
        self.bytes_received = 0

    def send(self, kind: int, *parts: Buffer, offset: int = 0) -> None:
        """Send one frame whose payload is `parts`, one after the other; raises `ConnectionLost`."""
        with self._send_lock:
            self._send(kind, parts, offset)

    def send_json(self, kind: int, fields: Dict[str, object]) -> None:
        """Send one control frame."""
        self.send(kind, json.dumps(fields).encode("ascii"))

    def send_alive(self) -> None:
        """Send ALIVE, unless another thread is sending at this moment: its frame shows the same."""
        if self._send_lock.acquire(False):
            try:
                self._send(ALIVE, (), 0)
            finally:
                self._send_lock.release()

    def _send(self, kind: int, parts: Sequence[Buffer], offset: int) -> None:
        length = sum(len(part) for part in parts)
        header = _HEADER_BEFORE_CRC.pack(kind, length, self._sent & 0xFFFFFFFF, offset)
        crc = self._crc32(header, 0)
        for part in parts:
            crc = self._crc32(part, crc)
        self._sent += 1
        self._carrier.write((header + _CRC.pack(crc),) + tuple(parts))

    def receive(self) -> Frame:
        """Return the next frame's header, skipping ALIVE frames; the caller must then read the payload completely.

        Raises `ConnectionLost` if the other side has ended, after `silence_s` seconds of silence, and after `stall_s`
        seconds with nothing but ALIVE frames; `ProtocolError` for a frame that is not valid.
        """
        begun = time.monotonic()
        while True:
            self._fill(memoryview(self._header))
            kind, length, sequence, offset, crc = HEADER.unpack(self._header)
            if self._header[1:4] != b"\0\0\0" or not ALIVE <= kind <= self.last_kind:
                raise ProtocolError("unknown frame {}".format(bytes(self._header[:4]).hex()))
            if sequence != self._received & 0xFFFFFFFF:
                raise ProtocolError("frame {} arrived in place of frame {}".format(sequence, self._received))
            if length > MAX_PAYLOAD:
                raise ProtocolError("oversized frame of {} bytes".format(length))
            self._received += 1
            self._remaining, self._expected_crc = length, crc
            self._crc = self._crc32(memoryview(self._header)[: _HEADER_BEFORE_CRC.size], 0)
            if not length:
                self._check_crc()
            if kind != ALIVE:
                return Frame(kind, length, offset)
            if length:
                raise ProtocolError("frame of kind {} with a payload".format(kind_name(kind)))
            if self.stall_s is not None and time.monotonic() - begun > self.stall_s:
                raise ConnectionLost("alive, but nothing done for {:g} s".format(self.stall_s), silent=True)

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes of the payload; after the last byte, the frame's CRC is checked."""
        if len(view) > self._remaining:
            raise ProtocolError("frame is {} bytes short".format(len(view) - self._remaining))
        if not len(view):
            return
        self._fill(view)
        self._crc = self._crc32(view, self._crc)
        self._remaining -= len(view)
        if not self._remaining:
            self._check_crc()

    def read_bytes(self, frame: Frame, limit: int) -> bytes:
        """Return the whole payload of `frame`; raises `ProtocolError` if it has more than `limit` bytes."""
        if frame.length > limit:
            raise ProtocolError("oversized frame of kind {}: {} bytes".format(kind_name(frame.kind), frame.length))
        payload = bytearray(frame.length)
        self.read_into(memoryview(payload))
        return bytes(payload)

    def read_json(self, frame: Frame) -> Dict[str, object]:
        """Return the JSON object that `frame` carries."""
        payload = self.read_bytes(frame, MAX_CONTROL)
        try:
            fields = json.loads(payload.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ProtocolError("frame of kind {} is not JSON".format(kind_name(frame.kind))) from error
        if not isinstance(fields, dict):
            raise ProtocolError("frame of kind {} is not a JSON object".format(kind_name(frame.kind)))
        return fields

    def _check_crc(self) -> None:
        if self._crc != self._expected_crc:
            raise ProtocolError("frame {} was damaged on the way".format(self._received - 1))

    def _fill(self, view: memoryview) -> None:
        """Fill `view` with the next bytes; a short read also reads what follows, if it has arrived already."""
        filled, size = 0, len(view)
        while filled < size:
            if not self._waiting and size - filled < _AHEAD:
                self._waiting = self._ahead[: self._read(self._ahead)]
            if self._waiting:
                count = min(len(self._waiting), size - filled)
                view[filled : filled + count] = self._waiting[:count]
                self._waiting = self._waiting[count:]
            else:
                count = self._read(view[filled:])
            filled += count
        self.bytes_received += size

    def _read(self, view: memoryview) -> int:
        if self.deadline is None:
            count = self._carrier.readinto(view, self.silence_s)
        else:
            count = self._read_until(view, self.deadline)
        if count == 0:
            raise ConnectionLost("the connection ended")
        return count

    def _read_until(self, view: memoryview, deadline: float) -> int:
        left_s = deadline - time.monotonic()
        try:
            if left_s > 0:
                return self._carrier.readinto(view, min(self.silence_s, left_s))
        except ConnectionLost as error:
            if not error.silent or time.monotonic() < deadline:
                raise
        raise ConnectionLost("the expected data did not come in time", silent=True)


class Heartbeat:
    """A thread that sends ALIVE over a link every `interval_s` seconds, from `start` to `stop` or to the link's end."""

    def __init__(self, link: Link, interval_s: float) -> None:
        self._link = link
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end, but do not wait for it: it may be stuck in a write until the connection closes."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self._link.send_alive()
            except ConnectionLost:
                return


def integers(fields: Dict[str, object], *names: str) -> Tuple[int, ...]:
    """Return the fields `names`, which must be whole numbers from 0 to `fields.MAX_INTEGER`; raises `ProtocolError`."""
    return tuple(Fields(fields, _refuse).count(name) for name in names)


def text(fields: Dict[str, object], name: str) -> str:
    """Return the field `name`, which must be a string; raises `ProtocolError`."""
    return Fields(fields, _refuse).text(name)


def texts(fields: Dict[str, object], name: str) -> List[str]:
    """Return the field `name`, which must be a list of strings; raises `ProtocolError`."""
    return Fields(fields, _refuse).texts(name)


def _refuse(name: str) -> ProtocolError:
    return ProtocolError("field {} of a control frame is missing or not valid".format(name))
