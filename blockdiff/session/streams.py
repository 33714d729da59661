"""Several connections that read one source together: one alone is slow on a path with a long round trip.

Each agent examines its part of the image (`extents.striped`); this module puts the runs of all in order.
"""

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.rules import Opened, Totals
from blockdiff.session.session import Session
from blockdiff.shared import pipeline
from blockdiff.shared.errors import ProtocolError, SourceError
from blockdiff.shared.runs import Run

#: How many runs, of all streams together, are received before it is their turn. Each has at most 2 MiB, or one block. A
#: stream that has to wait for the others loses a round trip.
_AHEAD = 32

#: How long to wait before each further attempt to open one of several connections, in seconds: sshd accepts only a few
#: connections that have not logged in yet (MaxStartups).
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class Streams:
    """The sessions that scan one source, which all of them have opened; `opened` is what the first found."""

    def __init__(self, sessions: Sequence[Session], scan: ScanRequest, opened: Opened) -> None:
        self._sessions = sessions
        self._scan = scan
        self.opened = opened

    @property
    def bytes_received(self) -> int:
        """Bytes that were received from all agents so far."""
        return sum(session.bytes_received for session in self._sessions)

    @property
    def totals(self) -> Totals:
        """The totals of all sessions together, after the end of `changes`; most of them are the first session's."""
        known = [session.totals for session in self._sessions]
        # the worst that one of them saw: they do not check at the same time
        worst = max(known, key=lambda totals: (totals.touched is True, totals.touched is None, totals.how != ""))
        notes = (*known[0].notes, *_refusals(sum(session.refused for session in self._sessions)))
        read = sum(totals.read for totals in known)
        return replace(known[0], read=read, touched=worst.touched, how=worst.how, notes=notes)

    def changes(
        self, allocate: Callable[[int], memoryview], progress: Callable[[int], object] = lambda offset: None
    ) -> Iterator[Run]:
        """Yield the runs of blocks that changed, in ascending order; see `Session.changes`."""
        if len(self._sessions) == 1:
            yield from self._sessions[0].changes(self._scan, self.opened.size, allocate, progress)
            return
        with ExitStack() as stack:
            runs = []
            ahead = max(2, _AHEAD // len(self._sessions))
            reached = [0] * len(self._sessions)
            for number, session in enumerate(self._sessions):

                def show(offset: int, number: int = number) -> None:
                    reached[number] = offset
                    progress(min(reached))

                scan = replace(self._scan, stream=number)
                found = pipeline.ahead(session.changes(scan, self.opened.size, _room, show), ahead)
                runs.append(stack.enter_context(closing(found)))
            position = 0
            for run in heapq.merge(*runs, key=lambda run: run.offset):
                if run.offset < position:
                    raise ProtocolError("two agents sent the same block", "nothing of this run was kept; run again")
                position = run.offset + run.length
                yield run if run.data is None else _moved(run, run.data, allocate)
            for session in self._sessions[1:]:
                session.finish()


def _refusals(count: int) -> list[str]:
    tries = "a connection" if count == 1 else f"{count} connections"
    mend = "use fewer --streams, or raise MaxStartups in its sshd_config"
    return [f"the host refused {tries} at first, and accepted after a pause: {mend}"] if count else []


def _room(length: int) -> memoryview:
    return memoryview(bytearray(length))


def _moved(run: Run, data: memoryview, allocate: Callable[[int], memoryview]) -> Run:
    room = allocate(run.length)
    room[:] = data
    return Run(run.offset, run.length, room)


@contextmanager
def opened(main: Session, scan: ScanRequest, path: str, connect: Callable[[], Session]) -> Iterator[Streams]:
    """Let the agent of `main` open its next source, and other agents open the same one, `scan.streams` in total.

    `path` is the path of the source; the other agents read its snapshot, if there is one. `connect` makes a session.
    Raises `SourceError` if the agents do not find the same size and kind.
    """
    found = main.scan(scan)
    with ExitStack() as stack:

        def other(number: int) -> Session:
            session = stack.enter_context(connect())
            session.prepare(RunRequest([SourceRequest(os.fsencode(found.path or path))]))
            session.begin_take()
            session.end_take()
            its = session.scan(replace(scan, stream=number, hinted=False, audited=False))
            if (its.size, its.kind) != (found.size, found.kind):
                raise SourceError(f"{path} changed while several streams opened it", "run again")
            return session

        # all at the same time, because each takes a dozen round trips
        others = pipeline.in_order(other, range(1, scan.streams), workers=scan.streams, ahead=scan.streams)
        yield Streams([main, *others], scan, found)
