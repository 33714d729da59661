"""Several connections that read one source together: one alone is held back by a long way and its window.

Each agent examines its share of the image (`extents.striped`), and the runs of all are sorted here.
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

#: Runs, of all streams together, that are received before it is their turn, each of 2 MiB or a block at most: a stream
#: that has to wait for the others loses a round trip.
_AHEAD = 32

#: How long to wait before each further try to open one of several connections, in seconds. sshd accepts only some that
#: have not logged in yet (MaxStartups).
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class Streams:
    """The sessions that scan one source, which all have opened; `opened` is what the first says of it."""

    def __init__(self, sessions: Sequence[Session], scan: ScanRequest, opened: Opened) -> None:
        self._sessions = sessions
        self._scan = scan
        self.opened = opened

    @property
    def bytes_received(self) -> int:
        """Bytes that came from all agents so far."""
        return sum(session.bytes_received for session in self._sessions)

    @property
    def totals(self) -> Totals:
        """What all of them read, once `changes` is at its end; the first knows all else."""
        known = [session.totals for session in self._sessions]
        # the worst that one of them saw; they do not look at the same time
        worst = max(known, key=lambda totals: (totals.touched is True, totals.touched is None, totals.how != ""))
        notes = (*known[0].notes, *_refusals(sum(session.refused for session in self._sessions)))
        read = sum(totals.read for totals in known)
        return replace(known[0], read=read, touched=worst.touched, how=worst.how, notes=notes)

    def changes(
        self, allocate: Callable[[int], memoryview], progress: Callable[[int], object] = lambda offset: None
    ) -> Iterator[Run]:
        """Yield the runs of blocks that changed, ascending; see `Session.changes`."""
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
    """Let the session's agent open its next source, and as many others as `scan` says open the same.

    `path` is the source's; others read the snapshot of it, if there is one. `connect` makes a session. Raises
    `SourceError` if they do not find the same.
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

        # all at once: each takes a dozen round trips
        others = pipeline.in_order(other, range(1, scan.streams), workers=scan.streams, ahead=scan.streams)
        yield Streams([main, *others], scan, found)
