"""Talk to the real agent, as it is shipped, without the checks of the server."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, from_wire
from blockdiff.transport import bundle
from blockdiff.transport.advice import Place
from blockdiff.transport.child import ChildConnection
from blockdiff.transport.connection import push_agent

#: The fields of the request; all others belong to the order to scan.
REQUEST_FIELDS = (
    *("paths", "directories", "before", "after", "low_priority"),
    *("snapshot", "snapshot_size", "keep", "owners", "chains", "kept"),
)

#: How long an agent may take to do what it should do immediately, in seconds.
PROMPTLY_S = 30.0


@dataclass
class Outcome:
    """What an agent sent. `runs` are (offset, length, bytes or None for zeros).

    `table_bytes` is how many bytes of the digest table it asked for.
    """

    source: dict[str, object] = field(default_factory=dict)
    runs: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    totals: dict[str, object] = field(default_factory=dict)
    table_bytes: int = 0

    def applied_to(self, image: bytes = b"") -> bytes:
        """Return the image after the runs are written to `image`, the previous one."""
        size = self.source["size"]
        assert isinstance(size, int)
        result = bytearray(image[:size].ljust(size, b"\xee"))
        for offset, length, data in self.runs:
            result[offset : offset + length] = bytes(length) if data is None else data
        return bytes(result)


class Conversation:
    """The server's side: an agent that has said hello."""

    def __init__(self, child: ChildConnection) -> None:
        self.child = child
        self.link = push_agent(child, timeout_s=PROMPTLY_S, silence_s=PROMPTLY_S)
        self.hello = self.link.read_json(self.expect(wire.HELLO))

    def expect(self, kind: int) -> wire.Frame:
        """Return the next frame, which must be of this kind; raise the error that the agent reports.

        For SOURCE, it first takes the frames that always come before it.
        """
        for other in (wire.READY, wire.TAKEN) if kind == wire.SOURCE else ():
            self.link.read_json(self.expect(other))
        frame = self.next()
        assert frame.kind == kind
        return frame

    def next(self) -> wire.Frame:
        """Return the next frame; raise the error that the agent reports."""
        frame = self.link.receive()
        if frame.kind == wire.ERROR:
            raise from_wire(self.link.read_json(frame), "host")
        return frame

    def request(self, path: str | bytes | Path, **fields: object) -> None:
        """Ask for a dump: send the request and all orders up to that to scan. `fields` replace those of these names."""
        request: dict[str, object] = {"paths": [os.fsencode(path).hex()], "directories": []}
        scan: dict[str, object] = {"block_size": 4096, "digest": "sha256", "full": "table_blocks" not in fields}
        request.update({name: value for name, value in fields.items() if name in REQUEST_FIELDS})
        scan.update({name: value for name, value in fields.items() if name not in REQUEST_FIELDS})
        with suppress(ConnectionLost):  # it may have ended after the first; the caller still receives what it reports
            self.link.send_json(wire.REQUEST, request)
            self.link.send_json(wire.TAKE, {})
            self.link.send_json(wire.SCAN, scan)

    def receive(self, table: bytes = b"", digest_size: int = 32) -> Outcome:
        """Take everything from READY to END, and send as much of the digest table as the agent asks for."""
        outcome = Outcome(self.link.read_json(self.expect(wire.SOURCE)))
        sent = 0
        while True:
            frame = self.next()
            payload = self.link.read_bytes(frame, wire.MAX_PAYLOAD)
            if frame.kind == wire.DATA:
                outcome.runs.append((frame.offset, frame.length, payload))
            elif frame.kind == wire.ZERO:
                outcome.runs.append((frame.offset, int.from_bytes(payload, "little"), None))
            elif frame.kind == wire.PROGRESS:
                outcome.progress.append(frame.offset)
            elif frame.kind == wire.WANT:
                stop, sent = min(frame.offset, len(table)), max(sent, int.from_bytes(payload, "little"))
                for start in range(sent, stop, 1000 * digest_size):
                    digests = table[start : min(start + 1000 * digest_size, stop)]
                    self.link.send(wire.TABLE, digests, offset=start)
                    outcome.table_bytes += len(digests)
                sent = max(sent, stop)
            else:
                assert frame.kind == wire.TOTALS
                outcome.totals = json.loads(payload)
                self.link.read_json(self.expect(wire.END))
                return outcome

    def failure(self) -> BlockdiffError:
        """Return the error that the agent reports; what it sends before is ignored."""
        try:
            self.receive()
        except BlockdiffError as error:
            return error
        raise AssertionError("the agent did not fail")


def command(python: str | Path = sys.executable) -> list[str]:
    """Return the command that starts the agent under an interpreter."""
    return [str(python), *bundle.local_command()[1:]]


@contextmanager
def conversation(arguments: Sequence[str] | None = None) -> Iterator[Conversation]:
    """Start the agent, under this interpreter by default; at the end, nothing of it is left."""
    child = ChildConnection(arguments or command(), Place("host", "host"))
    with child:
        yield Conversation(child)


def dump(
    path: str | bytes | Path, arguments: Sequence[str] | None = None, table: bytes | None = None, **fields: object
) -> Outcome:
    """Dump a source, incrementally if there is a table, and check that the agent ends with status 0."""
    with conversation(arguments) as talk:
        if table is not None:
            fields["table_blocks"] = len(table) // 32
        talk.request(path, **fields)
        outcome = talk.receive(table or b"")
        assert talk.child.wait(PROMPTLY_S) == (0,)
        assert talk.child.stderr() == ""
        return outcome


def failure(path: str | bytes | Path, arguments: Sequence[str] | None = None, **fields: object) -> BlockdiffError:
    """Ask for a dump that must fail; return the agent's error, and check that it ends with status 1."""
    with conversation(arguments) as talk:
        talk.request(path, **fields)
        error = talk.failure()
        assert talk.child.wait(PROMPTLY_S) == (1,)
        return error
