"""An `ssh` that runs the command on this machine, and makes one fault in the connection.

`install` makes the program for the PATH. The ssh option ``Fault=`` contains the `Fault` for one run of it. The program
is this file, which needs only the standard library.
"""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

UP, DOWN = "up", "down"
#: The edges of a piece.
BEGIN, END = "begin", "end"

# The kinds of faults. RECORD is not a fault: it records what passes.
RECORD = "record"
CUT = "cut"
STALL = "stall"
STALL_BOTH = "stall both"
DELAY = "delay"
REPEAT_BYTE = "repeat byte"
REPEAT_PIECE = "repeat piece"
GARBLE = "garble"
# Only one end of this direction is closed; the other end never learns of it:
CLOSE_SERVER_SIDE = "close server side"
CLOSE_HOST_SIDE = "close host side"

DELAY_S = 0.3

#: The same as `blockdiff.shared.wire.HEADER`, which cannot be imported under ``python -S``; a test compares them.
HEADER = struct.Struct("<B3xIIQI")
ALIVE = 1
NONCE_SIZE = 16
#: The same as `blockdiff.host.loader.BEGUN`.
BEGUN = b"blockdiff begins\n"


class Point(NamedTuple):
    """A place in the stream of one direction: `shift` bytes after an edge of the piece number `piece` (from 0)."""

    way: str
    piece: int
    edge: str
    shift: int

    def within(self, piece: bytes) -> int:
        """Return the place as an offset into the piece."""
        return self.shift + (len(piece) if self.edge == END else 0)


class Fault(NamedTuple):
    """What goes wrong, and where. When it has happened, there is a file `applied` in `directory`."""

    kind: str
    point: Point
    directory: str

    def option(self) -> str:
        """Return this fault as a value of ``--ssh-option``."""
        return "Fault=" + json.dumps(self)

    @property
    def applied(self) -> Path:
        """The file that shows that the fault has happened."""
        return Path(self.directory, "applied")

    def recorded(self, way: str) -> Path:
        """Return the file that RECORD writes for a direction."""
        return Path(self.directory, way)


def from_option(text: str) -> Fault:
    kind, point, directory = json.loads(text.partition("=")[2])
    return Fault(kind, Point(*point), directory)


class EndOfStreamError(Exception):
    """The stream ended inside a piece, of which `rest` had arrived."""

    def __init__(self, rest: bytes) -> None:
        super().__init__()
        self.rest = rest


def pieces(way: str, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the pieces of a stream: the parts of the start, then frames. `read` is that of a buffered file."""

    def take(count: int) -> bytes:
        data = read(count)
        if len(data) < count:
            raise EndOfStreamError(data)
        return data

    if way == DOWN:
        yield take(NONCE_SIZE)
    else:  # a line for shells, the loader's length, the loader, a line of JSON, and the archive
        yield (first := take(16))
        yield take(int(first[8:]))
        line = take(1)
        while line[-1:] != b"\n":
            line += take(1)
        yield line
        yield take(json.loads(line)["size"])
    while True:
        header = take(HEADER.size)
        length = HEADER.unpack(header)[1]
        yield header + take(length)


class Way(threading.Thread):
    """Passes the bytes of one direction from `source` to `target`, piece by piece."""

    def __init__(
        self,
        way: str,
        fault: Fault,
        source: io.BufferedReader,
        target: int,
        blocked: threading.Event,
        deciding: threading.Lock,
    ) -> None:
        super().__init__(daemon=True)
        self._way = way
        self._fault = fault
        self._source = source
        self._target = target
        self._blocked = blocked
        self._deciding = deciding

    def run(self) -> None:
        try:
            number = 0
            if self._way == DOWN:  # the server treats what comes before the nonce as noise
                self._write(self._source.read(len(BEGUN)))
            for piece in pieces(self._way, self._source.read):
                if self._blocked.is_set():
                    self._hang()
                if piece[0] == ALIVE and len(piece) == HEADER.size:
                    self._write(piece)
                    continue
                self._pass(number, piece)
                number += 1
        except EndOfStreamError as end:
            self._write(end.rest)
            os.close(self._target)
        except OSError:
            pass  # the reader has closed its end

    def _pass(self, number: int, piece: bytes) -> None:
        fault = self._fault
        if fault.kind == RECORD:
            with fault.recorded(self._way).open("ab") as file:
                file.write(piece)
        if fault.kind == RECORD or (fault.point.way, fault.point.piece) != (self._way, number):
            self._write(piece)
            return
        at = fault.point.within(piece)
        with self._deciding:
            self._write(piece[:at])
            if fault.kind == STALL_BOTH:
                self._blocked.set()
            fault.applied.touch()
            if fault.kind == CUT:
                os.write(2, b"Connection to host closed by remote host.\n")
                os._exit(255)
        self._act(piece, at)

    def _act(self, piece: bytes, at: int) -> None:
        kind, rest = self._fault.kind, piece[at:]
        if kind in (STALL, STALL_BOTH):
            self._hang()
        elif kind == DELAY:
            time.sleep(DELAY_S)
        elif kind == REPEAT_BYTE:
            self._write(piece[max(0, at - 1) : at])
        elif kind == REPEAT_PIECE:
            self._write(piece[:at])
        elif kind == GARBLE:
            rest = bytes([rest[0] ^ 1]) + rest[1:]
        elif kind == CLOSE_SERVER_SIDE:
            ours = 0 if self._way == UP else 1
            os.dup2(os.open(os.devnull, os.O_RDWR), ours)
            if self._way == UP:
                self._hang()
        elif kind == CLOSE_HOST_SIDE:
            os.close(self._target if self._way == UP else self._source.fileno())
            self._hang()
        self._write(rest)

    def _hang(self) -> None:
        threading.Event().wait()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._target, data) :]


def main(arguments: list[str]) -> None:
    """Do what ssh does."""
    if arguments[0] == "-G":  # it has no settings
        return
    (fault,) = [from_option(word) for word in arguments if word.startswith("Fault=")]
    child = subprocess.Popen(["/bin/sh", "-c", arguments[-1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and isinstance(child.stdout, io.BufferedReader)
    blocked, deciding = threading.Event(), threading.Lock()
    Way(UP, fault, open(0, "rb"), child.stdin.fileno(), blocked, deciding).start()  # noqa: SIM115
    down = Way(DOWN, fault, child.stdout, 1, blocked, deciding)
    down.start()
    status = child.wait()
    down.join()
    with deciding:  # a fault after the last byte must happen before this process ends
        os._exit(status if status >= 0 else 255)


def install(directory: Path) -> Path:
    """Make a directory for the PATH, below `directory`, with the program."""
    commands = directory / "commands"
    commands.mkdir()
    script = commands / "ssh"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} "$@"\n')
    script.chmod(0o755)
    return commands


if __name__ == "__main__":
    main(sys.argv[1:])
