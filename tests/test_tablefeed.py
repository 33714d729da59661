"""The digest table on its way to the agent: what is taken is right, little of what is skipped is sent, no deadlock."""

import os
import random
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff.format.digesttable import TableReader
from blockdiff.host.tablefeed import TableFeed
from blockdiff.session import tablesender
from blockdiff.session.rules import LENGTH, Rules
from blockdiff.session.tablesender import TableSender
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, DamagedError, ProtocolError
from tests.descriptors import all_closed

LIMIT_S = 30.0
WINDOW = 4096


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


class Pair:
    """A feed and the sender of `table`, with a real link between them, and what went over it.

    `wants` are start and end of what was wanted, `sent` offset and length of each frame.
    """

    def __init__(self, table: bytes, size: int, stack: ExitStack) -> None:
        self.wants: list[tuple[int, int]] = []
        self.sent: list[tuple[int, int]] = []
        self.failures: list[BaseException] = []
        self._sockets = [stack.enter_context(closing(each)) for each in socket.socketpair()]
        server, agent = (wire.Link(wire.Pipe(s.fileno(), s.fileno()), LIMIT_S) for s in self._sockets)
        file = os.memfd_create("table")
        os.write(file, b"\x00\x10\x00\x00" + table)
        self.sender = TableSender(server, stack.enter_context(TableReader(file, "table", size)))
        self.feed = TableFeed(agent, size, len(table) // size)
        self._rules = Rules(1, 4096, len(table))
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (lambda: self._serve(server), lambda: self._receive(agent))
        ]
        stack.callback(self._close)
        self.sender.start()
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ConnectionLost:
            pass
        except BaseException as error:  # noqa: BLE001  # the test fails with it
            self.failures.append(error)

    def _serve(self, link: wire.Link) -> None:
        """Pass what is wanted on to the sender, held against the server's rules."""
        while True:
            frame = link.receive()
            (start,) = LENGTH.unpack(link.read_bytes(frame, LENGTH.size))
            self._rules.check_want(start, frame.offset)
            self.wants.append((start, frame.offset))
            self.sender.want(start, frame.offset)

    def _receive(self, link: wire.Link) -> None:
        while True:
            frame = link.receive()
            self.sent.append((frame.offset, frame.length))
            self.feed.feed(frame.offset, link.read_bytes(frame, wire.MAX_PAYLOAD))

    def _close(self) -> None:
        for each in self._sockets:
            each.shutdown(socket.SHUT_RDWR)
        self.sender.stop()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


@contextmanager
def pair(table: bytes, size: int) -> Iterator[Pair]:
    with ExitStack() as stack:
        found = Pair(table, size, stack)
        yield found
        assert found.failures == []


def within_limit(work: Callable[[], object]) -> None:
    """Do something that may get stuck."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "stuck"
    for failure in failures:
        raise failure


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=40)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, count=st.integers(0, 5000), size=st.sampled_from([16, 20, 32, 64]), seed=st.integers(0, 99))
def test_what_is_taken_is_right_and_little_of_what_is_skipped_is_sent(
    monkeypatch: pytest.MonkeyPatch, steps: Sequence[tuple[bool, int]], count: int, size: int, seed: int
) -> None:
    monkeypatch.setattr(wire, "TABLE_WINDOW", WINDOW)
    monkeypatch.setattr(tablesender, "_FRAME_BYTES", 512)
    table = random.Random(seed).randbytes(count * size)
    with pair(table, size) as found:
        position = needed = jumps = 0

        def go() -> None:
            nonlocal position, needed, jumps
            for takes, blocks in steps:
                if takes:
                    blocks = min(blocks, WINDOW // 2 // size)
                    digests = found.feed.read(blocks)
                    assert digests == table[position * size : (position + blocks) * size]
                    needed += len(digests)
                else:
                    found.feed.skip(blocks)
                    jumps += 1
                position += blocks

        within_limit(go)
        assert sum(length for _, length in found.sent) <= needed + (jumps + 1) * WINDOW
        assert found.sent == sorted(found.sent)


def test_a_long_way_is_skipped_without_being_sent() -> None:
    size, count = 32, 1_000_000
    table = secrets.token_bytes(1 << 20) * (size * count >> 20) + bytes(size * count % (1 << 20))
    with pair(table, size) as found:

        def go() -> None:
            assert found.feed.read(10) == table[: 10 * size]
            found.feed.skip(900_000)
            assert found.feed.read(8192) == table[900_010 * size : 908_202 * size]
            found.feed.skip(10_000_000)
            assert found.feed.read(8192) == b""

        within_limit(go)
        assert sum(length for _, length in found.sent) <= 2 * wire.TABLE_WINDOW
        assert len(found.wants) <= 4


def test_a_scan_that_skips_nothing_has_the_next_digests_before_it_needs_them() -> None:
    table = secrets.token_bytes(32 * 100_000)
    with pair(table, 32) as found:

        def go() -> None:
            assert b"".join(found.feed.read(8192) for _ in range(13)) == table

        within_limit(go)
        assert sum(length for _, length in found.sent) == len(table)
        assert all(end - start == wire.TABLE_WINDOW for start, end in found.wants)


class Server(wire.Link):
    """Does with what is wanted what `answer` says, at once, in the thread that wants it."""

    def __init__(self, answer: Callable[[int, int], object]) -> None:
        self.wanted = [0]
        self._answer = answer

    def send(self, kind: int, *parts: wire.Buffer, offset: int = 0) -> None:
        assert kind == wire.WANT
        (start,) = (int.from_bytes(part, "little") for part in parts)
        before, self.wanted = self.wanted[-1], [*self.wanted, offset]
        self._answer(max(before, start), offset)


def test_the_feed_asks_for_more_in_time_and_takes_no_more_than_that() -> None:
    size, count = 32, 100_000
    table = secrets.token_bytes(size * count)
    server = Server(lambda start, stop: feed.feed(start, table[start:stop]))
    feed = TableFeed(server, size, count)
    taken = b""
    for blocks in (1, 8192, 0, 5000, *[8192] * 10, 8192):
        taken += feed.read(blocks)
        assert server.wanted[-1] <= len(taken) + wire.TABLE_WINDOW
    assert taken == table[: len(taken)]
    assert len(taken) == min(1 + 5000 + 12 * 8192, count) * size
    assert server.wanted == sorted(set(server.wanted))
    with pytest.raises(ProtocolError, match="the server sent more of the digest table than was asked for"):
        feed.feed(len(table), b"?")


def test_digests_that_nobody_asked_for_are_refused() -> None:
    feed = TableFeed(Server(lambda start, stop: None), 32, 100_000)
    with pytest.raises(ProtocolError, match=r"^the server sent more of the digest table than was asked for$"):
        feed.feed(0, b"?")


def test_behind_the_end_of_the_table_nothing_is_waited_for() -> None:
    """An image that grew, of whose older part all stayed the same."""
    feed = TableFeed(Server(lambda start, stop: feed.feed(start, bytes(64))), 32, 100_000)
    feed.skip(100_000)
    within_limit(lambda: [feed.read(8192) for _ in range(3)])
    feed = TableFeed(Server(lambda start, stop: feed.feed(start, bytes(64))), 32, 100_000)
    assert feed.read(2) == bytes(64)
    feed.skip(50_000)
    within_limit(lambda: feed.read(0))


@pytest.mark.parametrize(("part", "words"), [(0, "another part"), (-32, "another part"), (32, "another part")])
def test_another_part_than_was_asked_for_is_refused(part: int, words: str) -> None:
    """Neither what comes next in the table, nor where the last skip led to."""

    def answer(start: int, stop: int) -> None:
        if not start:
            feed.feed(0, bytes(64))
            return
        with pytest.raises(ProtocolError, match=f"^the server sent {words} of the digest table than was asked for$"):
            feed.feed(part if not part else start + part, bytes(64))
        feed.feed(start, b"x" * 64)

    feed = TableFeed(Server(answer), 32, 1_000_000)
    assert feed.read(2) == bytes(64)
    feed.skip(500_000)
    assert feed.read(2) == b"x" * 64


def test_what_was_on_its_way_when_something_was_skipped_is_no_trouble() -> None:
    table = secrets.token_bytes(32 * 200_000)

    def answer(start: int, stop: int) -> None:
        if not start:
            feed.feed(0, table[:64])
            return
        feed.feed(64, table[64:3200])  # sent before the server heard of the skip
        feed.feed(start, table[start : start + 64])

    feed = TableFeed(Server(answer), 32, 200_000)
    assert feed.read(2) == table[:64]
    feed.skip(100_000)
    assert feed.read(2) == table[100_002 * 32 : 100_004 * 32]


def test_a_table_that_cannot_be_read_any_more_fails_the_sender(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(b"\x00\x10\x00\x00" + bytes(32 * 100))
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        link = wire.Link(wire.Pipe(ours.fileno(), ours.fileno()), LIMIT_S)
        with TableReader(os.open(path, os.O_RDONLY), "the table", 32) as table:
            os.truncate(path, 100)
            sender = TableSender(link, table)
            sender.start()
            sender.want(0, 3200)
            sender._thread.join(LIMIT_S)
            assert type(sender.failure) is DamagedError
            sender.stop()


def test_a_sender_whose_connection_is_gone_just_ends() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    file = os.memfd_create("table")
    os.write(file, b"\x00\x10\x00\x00" + bytes(3200))
    with closing(ours), TableReader(file, "the table", 32) as table:
        sender = TableSender(wire.Link(wire.Pipe(ours.fileno(), ours.fileno())), table)
        sender.start()
        sender.want(0, 3200)
        sender._thread.join(LIMIT_S)
        assert not sender._thread.is_alive()
        failure: BlockdiffError | None = sender.failure
        assert failure is None
        sender.stop()


def test_a_sender_that_was_never_started_can_be_stopped(tmp_path: Path) -> None:
    """A signal may come between its making and its start."""
    path = tmp_path / "table"
    path.write_bytes(b"\4\0\0\0" + bytes(32))
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs), TableReader(os.open(path, os.O_RDONLY), "the table", 32) as table:
        tablesender.TableSender(wire.Link(wire.Pipe(ours.fileno(), ours.fileno())), table).stop()
