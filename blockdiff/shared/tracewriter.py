"""The trace of a run, for an issue report: phases, child processes, frames by kind and size, and how long each took.

Shipped to the host: standard library only, Python 3.6 or newer. It is imported only if a trace is asked for. The
server appends lines to a file; the agent sends its lines over the connection (TRACE), with times of its own clock.
Each control frame has a line. Bulk frames are counted, and have one line for each kind and second.
"""

import os
import stat
import sys
import threading
import time
import zlib
from collections import deque
from typing import Callable, Dict, List, Optional, Sequence

from blockdiff.shared import wire
from blockdiff.shared.errors import ConnectionLost, printable

#: How each trace begins: nothing is appended to a file that begins otherwise.
MAGIC = "blockdiff trace\n"
#: How much of one agent's trace the server writes at most, in bytes: a run of a day has less.
AGENT_LIMIT = 64 << 20
#: Bulk frames are counted for this long before they are reported, in seconds.
_COUNT_S = 1.0
_BULK = (wire.ALIVE, wire.TABLE, wire.DATA, wire.ZERO, wire.PROGRESS, wire.WANT, wire.BYTES, wire.LENT, wire.TAKEN_OUT)


class TraceFile:
    """The file that a trace is appended to; an error of the trace never ends a run.

    `failure` says why lines are missing; None if all were written. Times are the server's, and never go back.
    """

    def __init__(self, path: str) -> None:
        self.failure: "Optional[str]" = None
        self._fd = -1
        self._lock = threading.Lock()
        self._begun_s = time.time() - time.monotonic()
        self._links = 0
        try:
            self._fd = _open(path)
        except (OSError, ValueError) as error:
            self.failure = getattr(error, "strerror", None) or str(error)

    def add(self, text: str, who: str = "server") -> None:
        """Append one line, with the time and the process."""
        with self._lock:
            if self.failure is not None:
                return
            now = self._begun_s + time.monotonic()
            shown = "{}.{:06d}Z".format(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)), int(now % 1 * 1e6))
            line = "{} {} {}: {}\n".format(shown, os.getpid(), who, printable(text, 500))
            try:
                data = line.encode("utf-8", "backslashreplace")
                if os.write(self._fd, data) != len(data):
                    self.failure = "a line was cut off"
            except OSError as error:
                self.failure = error.strerror or str(error)

    def link(
        self,
        carrier: wire.Carrier,
        silence_s: float,
        stall_s: "Optional[float]",
        crc32: "Callable[[wire.Buffer, int], int]",
    ) -> wire.Link:
        """Return the server's end of a connection, with a trace of it."""
        self._links += 1
        return _ServerLink(self, self._links, carrier, silence_s, stall_s, crc32)


def _open(path: str) -> int:
    """Open a trace to append to; raises `OSError`, and `ValueError` for a file that is not a trace."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK  # never wait for a FIFO
    fd = os.open(path, flags, 0o600)
    try:
        magic = MAGIC.encode("ascii")
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_size and os.pread(fd, len(magic), 0) != magic:
            raise ValueError("it holds something that is not a trace")
        if not found.st_size:
            os.write(fd, magic)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Counter:
    """Counts and reports the frames of one direction. Calls must not overlap."""

    def __init__(self, verb: str, report: "Callable[[str], None]") -> None:
        self._verb = verb
        self._report = report
        self._counted: Dict[int, List[float]] = {}  # for each kind of bulk frame: frames, bytes, seconds
        self._since = time.monotonic()

    def add(self, kind: int, length: int, took_s: float) -> None:
        """Count or report a frame of `length` bytes that took `took_s` seconds to send, or to arrive."""
        if kind in _BULK:
            counted = self._counted.setdefault(kind, [0, 0, 0.0])
            counted[0] += 1
            counted[1] += length
            counted[2] += took_s
            if time.monotonic() - self._since < _COUNT_S:
                return
        self.flush()
        if kind not in _BULK:
            self._report("{} {}, {} bytes, in {:.6f} s".format(self._verb, wire.kind_name(kind), length, took_s))

    def flush(self) -> None:
        """Report the frames that were counted."""
        for kind, (frames, length, took_s) in self._counted.items():
            said = "{} {} x {:.0f}, {:.0f} bytes, in {:.6f} s"
            self._report(said.format(self._verb, wire.kind_name(kind), frames, length, took_s))
        self._counted.clear()
        self._since = time.monotonic()


class _TracedLink(wire.Link):
    """A link whose frames are reported."""

    def __init__(
        self,
        report: "Callable[[str], None]",
        carrier: wire.Carrier,
        silence_s: float,
        stall_s: "Optional[float]" = None,
        crc32: "Callable[[wire.Buffer, int], int]" = zlib.crc32,
    ) -> None:
        super().__init__(carrier, silence_s, stall_s, crc32)
        self._report = report
        self._out, self._in = _Counter("sent", report), _Counter("received", report)

    def _send(self, kind: int, parts: Sequence[wire.Buffer], offset: int) -> None:
        begun = time.monotonic()
        super()._send(kind, parts, offset)
        self._out.add(kind, sum(len(part) for part in parts), time.monotonic() - begun)

    def receive(self) -> wire.Frame:
        """See `wire.Link`. The time is measured from the call until the header has arrived."""
        begun = time.monotonic()
        try:
            frame = self._next()
        except ConnectionLost as error:
            self._in.flush()
            self._report("received no more, after {:.6f} s: {}".format(time.monotonic() - begun, error.message))
            raise
        self._in.add(frame.kind, frame.length, time.monotonic() - begun)
        return frame

    def _next(self) -> wire.Frame:
        return super().receive()


class _ServerLink(_TracedLink):
    """The server's end, which takes the agent's trace lines out of the frames that it receives."""

    last_kind = wire.TRACE

    def __init__(
        self,
        file: TraceFile,
        number: int,
        carrier: wire.Carrier,
        silence_s: float,
        stall_s: "Optional[float]",
        crc32: "Callable[[wire.Buffer, int], int]",
    ) -> None:
        self._file = file
        self._number = number
        self._taken = 0
        super().__init__(self._add, carrier, silence_s, stall_s, crc32)

    def _add(self, text: str) -> None:
        self._file.add(text, "server {}".format(self._number))

    def _next(self) -> wire.Frame:
        begun = time.monotonic()
        while True:
            frame = super()._next()
            if frame.kind != wire.TRACE:
                return frame
            self._taken += frame.length
            line = self.read_bytes(frame, wire.MAX_CONTROL).decode("utf-8", "replace")
            if self._taken <= AGENT_LIMIT:
                self._file.add(line, "agent {}".format(self._number))
            if self.stall_s is not None and time.monotonic() - begun > self.stall_s:
                raise ConnectionLost("nothing but its trace for {:g} s".format(self.stall_s), silent=True)


class AgentLink(_TracedLink):
    """The agent's end: the lines that it reports are sent to the server after the next frame that is sent.

    So the thread that receives never sends, and never waits for a server that does not read.
    """

    def __init__(self, carrier: wire.Carrier, silence_s: float) -> None:
        self._lines: "deque[str]" = deque()
        self._begun = time.monotonic()
        self._reporting = threading.Lock()
        super().__init__(self.report, carrier, silence_s)
        self.report("python {} on {}, process {}".format(sys.version.split()[0], sys.platform, os.getpid()))

    def report(self, text: str) -> None:
        """Keep a line, with the time of the agent's clock."""
        with self._reporting:  # so lines are in the order of their times
            self._lines.append("{:.6f} s: {}".format(time.monotonic() - self._begun, printable(text, 400)))

    def _send(self, kind: int, parts: Sequence[wire.Buffer], offset: int) -> None:
        super()._send(kind, parts, offset)
        while self._lines:
            line = self._lines.popleft().encode("utf-8", "backslashreplace")
            wire.Link._send(self, wire.TRACE, (line,), 0)
