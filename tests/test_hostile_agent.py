"""Agents that break the rules, one rule each: the server refuses them, keeps nothing, and stays small."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff import backup, transport
from blockdiff.backup import Options
from blockdiff.cli.output import say_error
from blockdiff.shared import wire
from blockdiff.shared.errors import (
    EXIT_FAILED,
    BlockdiffError,
    ConnectionLost,
    ProtocolError,
    SourceError,
    TransportError,
    UsageError,
)
from blockdiff.transport import connection
from blockdiff.transport.address import Address
from blockdiff.transport.connection import NOISE_LIMIT
from tests import processes
from tests.descriptors import all_closed
from tests.fake_agent import BLOCK, FakeConnection, Script, Wire

BLOCKS = 17
SIZE = 16 * BLOCK + 100
SOURCE = Address("host", "/disk")
HINT = "nothing of this run was kept; if it happens again, suspect that host"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202e"
#: What any of these agents may cost the server in memory, in bytes, and in time, in seconds.
MEMORY_LIMIT = 64 << 20
TIME_LIMIT_S = 60.0


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where what is done within takes more of memory or time than it may."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before, begun = processes.peak_rss(os.getpid()), time.monotonic()
    try:
        yield
    finally:
        assert processes.peak_rss(os.getpid()) - before < MEMORY_LIMIT
        assert time.monotonic() - begun < TIME_LIMIT_S


def honest(agent: Wire) -> None:
    """Send a whole image: a tail, and zeros before it."""
    agent.source(SIZE)
    agent.zero(0, 15 * BLOCK)
    agent.data(15 * BLOCK, BLOCK + 100)
    agent.progress(SIZE)
    agent.end(SIZE, BLOCKS, SIZE)


class Server:
    """Runs backups of one chain against agents that follow scripts."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.name = str(directory / "chain")
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, script: Script, options: Options = Options(block_size=BLOCK), begin: bool = True) -> None:  # noqa: B008
        def follow(agent: Wire) -> int | None:
            if begin:
                agent.begin()
            return script(agent)

        def connect(*_: object) -> FakeConnection:
            made.append(FakeConnection(follow))
            return made[-1]

        made: list[FakeConnection] = []
        self._monkeypatch.setattr(transport, "connect", connect)
        try:
            with bounded():
                backup.backup(self.name, SOURCE, options)
        finally:
            assert all(each.closed for each in made)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir() if not path.name.endswith(".lock")}

    def refuse(
        self,
        script: Script,
        kind: type[BlockdiffError] = ProtocolError,
        options: Options = Options(block_size=BLOCK),  # noqa: B008
        begin: bool = True,
    ) -> BlockdiffError:
        """Run a script that must end in an error of exactly this kind and leave the chain as it was; return that."""
        before = self.files()
        with pytest.raises(BlockdiffError) as caught:
            self.run(script, options, begin)
        assert type(caught.value) is kind, caught.value
        assert self.files() == before
        self._check_words(caught.value)
        return caught.value

    def _check_words(self, error: BlockdiffError) -> None:
        """What the user gets to see is short, and harmless to a terminal."""
        say_error(error)
        shown = self._capsys.readouterr().err
        assert all(line.isprintable() for line in shown.splitlines())
        assert len(shown) < 5000
        assert len(shown.splitlines()) <= 2


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Server]:
    directory = tmp_path / "backups"
    directory.mkdir()
    with all_closed():
        yield Server(directory, monkeypatch, capsys)


def broken(error: BlockdiffError) -> str:
    """Return what is left of a `ProtocolError`'s sentence when the part is gone that all have."""
    start = "the agent on host broke the protocol: "
    assert error.message.startswith(start)
    assert error.hint == HINT
    return error.message[len(start) :]


def after_source(*steps: Callable[[Wire], object], size: int = SIZE) -> Script:
    """Return a script that begins like an honest one."""

    def script(agent: Wire) -> None:
        agent.source(size)
        for step in steps:
            step(agent)

    return script


def complete(agent: Wire) -> None:
    """Send all of the image, and the progress; the end is missing."""
    agent.data(0, SIZE)
    agent.progress(SIZE)


def test_the_honest_agent_is_believed(server: Server) -> None:
    server.run(honest)
    assert set(server.files()) == {"chain.1.gz", "chain.1.sha256", "chain.1.json", "chain.ver"}


NOT_WHOLE = "which are not whole blocks"
RUNS: dict[str, tuple[list[Callable[[Wire], object]], str]] = {
    "beyond the end": (
        [lambda a: a.data(BLOCKS * BLOCK, BLOCK)],
        f"sent {BLOCK} bytes at offset {BLOCKS * BLOCK} of {SIZE}, after 0",
    ),
    "over the end": (
        [lambda a: a.data(16 * BLOCK, BLOCK)],
        f"sent {BLOCK} bytes at offset {16 * BLOCK} of {SIZE}, after 0",
    ),
    "far away": (
        [lambda a: a.data((1 << 64) - BLOCK, BLOCK)],
        f"sent {BLOCK} bytes at offset {(1 << 64) - BLOCK} of {SIZE}, after 0",
    ),
    "unaligned at its start": (
        [lambda a: a.data(10, BLOCK - 10)],
        f"sent {BLOCK - 10} bytes at offset 10, {NOT_WHOLE}",
    ),
    "unaligned": ([lambda a: a.data(10, BLOCK)], f"sent {BLOCK} bytes at offset 10, {NOT_WHOLE}"),
    "too long for blocks": ([lambda a: a.data(0, BLOCK + 1)], f"sent {BLOCK + 1} bytes at offset 0, {NOT_WHOLE}"),
    "too short for a block": ([lambda a: a.data(0, 100)], f"sent 100 bytes at offset 0, {NOT_WHOLE}"),
    "short tail": ([lambda a: a.data(16 * BLOCK, 99)], f"sent 99 bytes at offset {16 * BLOCK}, {NOT_WHOLE}"),
    "repeated": (
        [lambda a: a.data(0, BLOCK), lambda a: a.data(0, BLOCK)],
        f"sent {BLOCK} bytes at offset 0 of {SIZE}, after {BLOCK}",
    ),
    "descending": (
        [lambda a: a.data(5 * BLOCK, BLOCK), lambda a: a.data(3 * BLOCK, BLOCK)],
        f"sent {BLOCK} bytes at offset {3 * BLOCK} of {SIZE}, after {6 * BLOCK}",
    ),
    "overlapping": (
        [lambda a: a.data(0, 2 * BLOCK), lambda a: a.zero(BLOCK, 2 * BLOCK)],
        f"sent {2 * BLOCK} bytes at offset {BLOCK} of {SIZE}, after {2 * BLOCK}",
    ),
    "no data": ([lambda a: a.data(0, 0)], f"sent 0 bytes at offset 0 of {SIZE}, after 0"),
    "no zeros": ([lambda a: a.zero(0, 0)], f"sent 0 bytes at offset 0 of {SIZE}, after 0"),
    "zeros beyond the end": (
        [lambda a: a.zero(0, SIZE + BLOCK)],
        f"sent {SIZE + BLOCK} bytes at offset 0 of {SIZE}, after 0",
    ),
    "zeros without end": (
        [lambda a: a.zero(BLOCK, (1 << 64) - BLOCK)],
        f"sent {(1 << 64) - BLOCK} bytes at offset {BLOCK} of {SIZE}, after 0",
    ),
    "unaligned zeros": ([lambda a: a.zero(7, BLOCK)], f"sent {BLOCK} bytes at offset 7, {NOT_WHOLE}"),
    "zeros for part of a block": ([lambda a: a.zero(0, BLOCK - 1)], f"sent {BLOCK - 1} bytes at offset 0, {NOT_WHOLE}"),
    "zeros of no length": ([lambda a: a.frame(wire.ZERO)], "sent a length of 0 bytes"),
    "zeros of a short length": ([lambda a: a.frame(wire.ZERO, b"\0\x10\0\0")], "sent a length of 4 bytes"),
    "zeros of a long length": ([lambda a: a.frame(wire.ZERO, b"\0\x10" + bytes(7))], "sent a length of 9 bytes"),
    "zeros with their bytes": ([lambda a: a.frame(wire.ZERO, bytes(SIZE))], f"sent a length of {SIZE} bytes"),
}
PROGRESS: dict[str, tuple[list[Callable[[Wire], object]], str]] = {
    "progress backwards": (
        [lambda a: a.progress(2 * BLOCK), lambda a: a.progress(BLOCK)],
        f"reported progress to offset {BLOCK} of {SIZE}, after {2 * BLOCK}",
    ),
    "progress nowhere": (
        [lambda a: a.progress(BLOCK), lambda a: a.progress(BLOCK)],
        f"reported progress to offset {BLOCK} of {SIZE}, after {BLOCK}",
    ),
    "progress beyond the end": (
        [lambda a: a.progress(SIZE + 1)],
        f"reported progress to offset {SIZE + 1} of {SIZE}, after 0",
    ),
    "progress with a payload": (
        [lambda a: a.frame(wire.PROGRESS, b"x", BLOCK)],
        "sent an unexpected frame of kind PROGRESS",
    ),
}
ENDS: dict[str, tuple[list[Callable[[Wire], object]], str]] = {
    "end at once": ([lambda a: a.end(SIZE, 0)], f"stopped at offset 0 of {SIZE}"),
    "end before the end": (
        [lambda a: a.data(0, BLOCK), lambda a: a.progress(BLOCK), lambda a: a.end(SIZE, 1, BLOCK)],
        f"stopped at offset {BLOCK} of {SIZE}",
    ),
    "all data but no progress": (
        [lambda a: a.data(0, SIZE), lambda a: a.end(SIZE, BLOCKS)],
        f"stopped at offset 0 of {SIZE}",
    ),
    "fewer blocks than came": (
        [complete, lambda a: a.end(SIZE, BLOCKS - 1)],
        f"counts {BLOCKS - 1} blocks of {SIZE} bytes, {BLOCKS} came",
    ),
    "more blocks than came": (
        [complete, lambda a: a.end(SIZE, BLOCKS + 1)],
        f"counts {BLOCKS + 1} blocks of {SIZE} bytes, {BLOCKS} came",
    ),
    "another size": (
        [complete, lambda a: a.end(SIZE + 1, BLOCKS)],
        f"counts {BLOCKS} blocks of {SIZE + 1} bytes, {BLOCKS} came",
    ),
    "more read than there is": (
        [complete, lambda a: a.end(SIZE, BLOCKS, SIZE + 1)],
        f"stopped at offset {SIZE} of {SIZE}",
    ),
    "a negative total": (
        [complete, lambda a: a.end(SIZE, BLOCKS, -1)],
        "field read of a control frame is missing or not valid",
    ),
    "a total that is true": (
        [complete, lambda a: a.end(SIZE, True)],
        "field changed_blocks of a control frame is missing or not valid",
    ),
    "empty totals": (
        [complete, lambda a: a.json(wire.TOTALS, {})],
        "field image_size of a control frame is missing or not valid",
    ),
    "no totals": ([complete, lambda a: a.json(wire.END, {})], "sent an unexpected frame of kind END"),
    "totals that are a list": (
        [complete, lambda a: a.json(wire.TOTALS, [])],
        "frame of kind TOTALS is not a JSON object",
    ),
    "totals that are no JSON": (
        [complete, lambda a: a.frame(wire.TOTALS, b"\xff")],
        "frame of kind TOTALS is not JSON",
    ),
    "notes that are none": (
        [complete, lambda a: a.end(SIZE, BLOCKS, notes="removed")],
        "field notes of a control frame is missing or not valid",
    ),
    "a fill level beyond all numbers": (
        [complete, lambda a: a.end(SIZE, BLOCKS, level_permille=10**400)],
        "field level_permille of a control frame is missing or not valid",
    ),
    "a fill level that is none": (
        [complete, lambda a: a.end(SIZE, BLOCKS, level_permille="full")],
        "field level_permille of a control frame is missing or not valid",
    ),
    "totals again": (
        [complete, lambda a: a.totals(SIZE, BLOCKS), lambda a: a.totals(SIZE, BLOCKS)],
        "sent a frame of kind TOTALS in place of END",
    ),
    "data after the totals": (
        [complete, lambda a: a.totals(SIZE, BLOCKS), lambda a: a.data(0, BLOCK)],
        "sent a frame of kind DATA in place of END",
    ),
    "data after the end": (
        [complete, lambda a: a.end(SIZE, BLOCKS), lambda a: a.data(0, BLOCK)],
        "sent a frame of kind DATA after its end",
    ),
    "two ends": (
        [complete, lambda a: a.end(SIZE, BLOCKS), lambda a: a.json(wire.END, {})],
        "sent a frame of kind END after its end",
    ),
    "an error after the end": (
        [complete, lambda a: a.end(SIZE, BLOCKS), lambda a: a.json(wire.ERROR, {"message": "no"})],
        "sent a frame of kind ERROR after its end",
    ),
    "no frames after the end": (
        [complete, lambda a: a.end(SIZE, BLOCKS), lambda a: a.raw(b"#" * 100)],
        "unknown frame 23232323",
    ),
}
FRAMES: dict[str, tuple[list[Callable[[Wire], object]], str]] = {
    "kind 0": ([lambda a: a.frame(0)], "unknown frame 00000000"),
    "kind 23": ([lambda a: a.frame(23)], "unknown frame 17000000"),
    "a place of memory that is not shared": (
        [lambda a: a.frame(wire.LENT, bytes(16))],
        "sent an unexpected frame of kind LENT",
    ),
    "the server's word that it took something": ([lambda a: a.frame(21)], "sent an unexpected frame of kind TAKEN_OUT"),
    "kind 255": ([lambda a: a.frame(255)], "unknown frame ff000000"),
    "a second hello": ([lambda a: a.hello()], "sent an unexpected frame of kind HELLO"),
    "a request": ([lambda a: a.json(wire.REQUEST, {})], "sent an unexpected frame of kind REQUEST"),
    "a second source": (
        [lambda a: a.json(wire.SOURCE, {"size": 1, "kind": "file"})],
        "sent an unexpected frame of kind SOURCE",
    ),
    "a digest table": ([lambda a: a.frame(wire.TABLE, bytes(32))], "sent an unexpected frame of kind TABLE"),
    "a wish for digests on a full run": (
        [lambda a: a.want(0, 1)],
        "sent an unexpected frame of kind WANT",
    ),
    "alive with a payload": ([lambda a: a.frame(wire.ALIVE, b"!")], "frame of kind ALIVE with a payload"),
    "more data than announced": (
        [lambda a: a.frame(wire.DATA, b"#" * 2 * BLOCK, length=BLOCK)],
        "frame 4 was damaged on the way",
    ),
    "an oversized frame": (
        [lambda a: a.frame(wire.DATA, length=wire.MAX_PAYLOAD + 1)],
        f"oversized frame of {wire.MAX_PAYLOAD + 1} bytes",
    ),
    "bytes that are no frame": ([lambda a: a.raw(b"#" * 64)], "unknown frame 23232323"),
    "a frame twice": (
        [lambda a: setattr(a, "_sent", 3), lambda a: a.data(0, BLOCK)],
        "frame 3 arrived in place of frame 4",
    ),
}
RULES = {**RUNS, **PROGRESS, **ENDS, **FRAMES}


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_ends_the_run(server: Server, name: str) -> None:
    steps, words = RULES[name]
    assert broken(server.refuse(after_source(*steps))) == words


def test_too_many_blocks_in_a_frame_are_refused(server: Server) -> None:
    script = after_source(lambda agent: agent.data(0, 8193), size=70_000)
    assert broken(server.refuse(script, options=Options(block_size=1))) == "sent 8193 blocks at once"


def test_more_data_than_announced_is_refused_where_its_checksum_fits(server: Server) -> None:
    def script(agent: Wire) -> None:
        agent.source(SIZE)
        agent.data(0, BLOCK)
        agent.raw(b"#" * BLOCK)

    assert broken(server.refuse(script)) == "unknown frame 23232323"


def test_less_data_than_announced_is_a_lost_connection(server: Server) -> None:
    error = server.refuse(after_source(lambda a: a.frame(wire.DATA, b"#" * 100, length=BLOCK)), TransportError)
    assert error.message == "lost the agent on host: the connection ended"


def test_without_an_end_there_is_no_generation(server: Server) -> None:
    error = server.refuse(after_source(complete), TransportError)
    assert error.message == "lost the agent on host: the connection ended"


def test_an_end_and_a_bad_exit_status_is_no_generation(server: Server) -> None:
    def script(agent: Wire) -> int:
        honest(agent)
        return 1

    assert broken(server.refuse(script)) == "ended with status 1 after it had sent everything"


def test_an_agent_that_does_not_end_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "EXIT_TIMEOUT_S", 0.05)

    def script(agent: Wire) -> None:
        honest(agent)
        agent.link.receive()

    assert broken(server.refuse(script)) == "did not end after it had sent everything"


def test_an_agent_that_goes_silent_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "push_agent", functools.partial(connection.push_agent, silence_s=0.05))

    def script(agent: Wire) -> None:
        agent.source(SIZE)
        agent.data(0, BLOCK)
        agent.link.receive()

    error = server.refuse(script, TransportError)
    assert error.message == "lost the agent on host: silent for 0.05 s"


def test_a_full_run_that_leaves_blocks_out_is_refused(server: Server) -> None:
    def script(agent: Wire) -> None:
        agent.source(SIZE)
        agent.data(0, BLOCK)
        agent.data(2 * BLOCK, BLOCK)
        agent.progress(SIZE)
        agent.end(SIZE, 2)

    error = server.refuse(script)
    assert error.message == "blocks 1 to 1 were not sent, and no earlier generation has them"


def test_an_image_that_grew_must_come_with_what_it_grew_by(server: Server) -> None:
    server.run(honest)
    larger = 20 * BLOCK

    def script(agent: Wire) -> None:
        agent.source(larger)
        agent.progress(larger)
        agent.end(larger, 0)

    error = server.refuse(script)
    assert error.message == "blocks 17 to 19 were not sent, and no earlier generation has them"


TABLE_SIZE = BLOCKS * 32
WANTS: dict[str, tuple[list[Callable[[Wire], object]], str]] = {
    "the same again": (
        [lambda a: a.want(0, 32), lambda a: a.want(0, 32)],
        f"asks for 0 to 32 of {TABLE_SIZE} bytes of digests",
    ),
    "less": (
        [lambda a: a.want(0, 64), lambda a: a.want(0, 32)],
        f"asks for 0 to 32 of {TABLE_SIZE} bytes of digests",
    ),
    "nothing": ([lambda a: a.want(0, 0)], f"asks for 0 to 0 of {TABLE_SIZE} bytes of digests"),
    "more than there is": (
        [lambda a: a.want(0, TABLE_SIZE + wire.TABLE_WINDOW + 1)],
        f"asks for 0 to {TABLE_SIZE + wire.TABLE_WINDOW + 1} of {TABLE_SIZE} bytes of digests",
    ),
    "from behind its end": ([lambda a: a.want(64, 32)], f"asks for 64 to 32 of {TABLE_SIZE} bytes of digests"),
    "without a start": ([lambda a: a.frame(wire.WANT, b"x", offset=32)], "sent a length of 1 bytes"),
}


@pytest.mark.parametrize("name", WANTS)
def test_wishes_for_digests_must_come_to_an_end(server: Server, name: str) -> None:
    server.run(honest)
    steps, words = WANTS[name]
    assert broken(server.refuse(after_source(*steps))) == words


def test_an_agent_that_does_not_read_what_it_wanted_does_not_hold_the_server(server: Server) -> None:
    """The digest table is larger than the socket's buffer: the thread that sends it is stuck when the run ends."""
    size = 200_000

    def first(agent: Wire) -> None:
        agent.source(size)
        agent.zero(0, size)
        agent.progress(size)
        agent.end(size, size)

    server.run(first, Options(block_size=1))

    def second(agent: Wire) -> None:
        agent.source(size)
        agent.want(0, wire.TABLE_WINDOW)
        agent.data(1, 0)

    started = time.monotonic()
    assert broken(server.refuse(second)) == f"sent 0 bytes at offset 1 of {size}, after 0"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "size",
    [0, (1 << 63) - (4 << 20), (1 << 63) - 1],
    ids=lambda size: f"{size.bit_length()} bits",
)
def test_a_source_of_impossible_size_is_refused(server: Server, size: int) -> None:
    assert broken(server.refuse(lambda agent: agent.source(size))) == f"claims a file of {size} bytes"


@pytest.mark.parametrize("size", [-1, True, False, None, "5", 1.5, [5], {}, 1 << 63, 1 << 64, 10**400], ids=repr)
def test_a_source_whose_size_is_no_number_of_bytes_is_refused(server: Server, size: object) -> None:
    words = "field size of a control frame is missing or not valid"
    assert broken(server.refuse(lambda agent: agent.source(size))) == words


def test_a_source_of_unknown_kind_is_refused(server: Server) -> None:
    error = server.refuse(lambda agent: agent.source(SIZE, ESCAPES))
    assert broken(error).startswith("claims a \\x1b]0")
    assert (
        broken(server.refuse(lambda a: a.source(SIZE, None))) == "field kind of a control frame is missing or not valid"
    )


def test_something_else_in_place_of_the_source_is_refused(server: Server) -> None:
    def script(agent: Wire) -> None:
        agent.hello()
        agent.data(0, BLOCK)

    assert broken(server.refuse(script)) == "sent a frame of kind DATA in place of READY"


HELLOS: dict[str, tuple[dict[str, object], str]] = {
    "an older protocol": ({"protocol": 2}, "speaks protocol 2 instead of 3"),
    "a newer protocol": ({"protocol": 4}, "speaks protocol 4 instead of 3"),
    "a protocol in words": ({"protocol": "1"}, "field protocol of a control frame is missing or not valid"),
    "a protocol that is true": ({"protocol": True}, "field protocol of a control frame is missing or not valid"),
    "a negative protocol": ({"protocol": -1}, "field protocol of a control frame is missing or not valid"),
    "no protocol": ({"protocol": None}, "field protocol of a control frame is missing or not valid"),
    "no Python": ({"python": 3.9}, "field python of a control frame is missing or not valid"),
    "no host name": ({"hostname": ["evil"]}, "field hostname of a control frame is missing or not valid"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_wrong_hello_is_refused(server: Server, name: str) -> None:
    changes, words = HELLOS[name]
    assert broken(server.refuse(lambda agent: agent.hello(**changes))) == words


def test_something_else_in_place_of_a_hello_is_refused(server: Server) -> None:
    error = server.refuse(lambda agent: agent.json(wire.SOURCE, {"size": SIZE, "kind": "file"}))
    assert broken(error) == "sent a frame of kind SOURCE in place of HELLO"


@pytest.mark.parametrize(
    "digests", [[], ["md5"], None, "sha256", {"sha256": 1}, [["sha256"]], [ESCAPES, "md5"]], ids=repr
)
def test_a_host_without_the_digest_is_told_so(server: Server, digests: object) -> None:
    error = server.refuse(lambda agent: agent.hello(digests=digests), UsageError)
    assert error.message == "python on host cannot compute sha256 digests"


def test_what_a_host_says_of_itself_is_stored_in_printable_form(server: Server) -> None:
    def script(agent: Wire) -> None:
        agent.source(SIZE, python=ESCAPES * 1000, hostname=ESCAPES)
        complete(agent)
        agent.end(SIZE, BLOCKS, SIZE)

    server.run(script)
    manifest = server.files()["chain.1.json"]
    assert b"\\\\x1b]0;owned" in manifest
    assert all(line.isprintable() for line in manifest.decode().splitlines())
    assert len(manifest) < 5000


@pytest.mark.parametrize("when", ["in place of the hello", "in place of the source", "in the middle"])
def test_an_error_of_the_agent_is_shown_without_its_escapes(server: Server, when: str) -> None:
    def script(agent: Wire) -> None:
        if when == "in place of the source":
            agent.hello()
        elif when == "in the middle":
            agent.source(SIZE)
            agent.data(0, BLOCK)
        agent.json(wire.ERROR, {"type": "SourceError", "message": "no" + ESCAPES, "hint": "well" + ESCAPES})

    error = server.refuse(script, SourceError)
    assert error.message == "host: no\\x1b]0;owned\\x07\\x1b[2J\\r\\n\\x9b31m\\u202e"
    assert error.hint == "well\\x1b]0;owned\\x07\\x1b[2J\\r\\n\\x9b31m\\u202e"


def test_an_error_of_the_agent_is_cut(server: Server) -> None:
    long = {"message": "\x1b" * 50_000, "hint": "x" * 500_000}
    error = server.refuse(after_source(lambda agent: agent.json(wire.ERROR, long)), BlockdiffError)
    assert len(error.message) < 2100
    assert len(error.hint or "") == 2000


def test_megabytes_of_error_are_refused(server: Server) -> None:
    huge = {"message": "x" * (wire.MAX_CONTROL + 1)}
    error = server.refuse(after_source(lambda agent: agent.json(wire.ERROR, huge)))
    assert broken(error).startswith("oversized frame of kind ERROR: ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("UsageError", UsageError),
        ("ProtocolError", ProtocolError),
        ("ConnectionLost", ConnectionLost),
        ("Interrupted", BlockdiffError),
        ("BusyError", BlockdiffError),
        ("DamagedError", BlockdiffError),
        ("SystemExit", BlockdiffError),
        (None, BlockdiffError),
        (["SourceError"], BlockdiffError),
        ({"a": 1}, BlockdiffError),
    ],
    ids=repr,
)
def test_an_agent_may_not_choose_any_error(server: Server, name: object, kind: type[BlockdiffError]) -> None:
    """What happened on the host is never that the chain is busy or damaged, whatever the host says."""
    error = server.refuse(after_source(lambda agent: agent.json(wire.ERROR, {"type": name, "message": "no"})), kind)
    assert error.message == "host: no"
    assert error.exit_status == (2 if kind is UsageError else EXIT_FAILED)


@pytest.mark.parametrize("fields", [{}, {"message": None}, {"message": ["a"], "hint": {"b": 1}}, {"hint": 5}], ids=repr)
def test_an_error_without_words_is_an_error(server: Server, fields: dict[str, object]) -> None:
    error = server.refuse(after_source(lambda agent: agent.json(wire.ERROR, fields)), BlockdiffError)
    assert error.message.startswith("host: ")
    assert error.hint is None


def test_a_refused_run_does_not_stop_the_next(server: Server) -> None:
    server.run(honest)
    server.refuse(after_source(lambda agent: agent.data(1, BLOCK)))

    def nothing_changed(agent: Wire) -> None:
        agent.source(SIZE)
        agent.want(0, wire.TABLE_WINDOW)
        agent.progress(SIZE)
        frame = agent.link.receive()
        assert len(agent.link.read_bytes(frame, wire.MAX_PAYLOAD)) == TABLE_SIZE
        agent.end(SIZE, 0)

    server.run(nothing_changed)
    assert server.files()["chain.ver"] == b"2\n"


# Large ones: each sends without end, or claims what would need room without end.


def noise_without_end(agent: Wire) -> None:
    while True:
        agent.raw(b"Welcome!\n" * 1000)


def errors_without_end(agent: Wire) -> None:
    agent.source(SIZE)
    while True:
        agent.json(wire.ERROR, {"message": "x" * 100_000})


def json_without_end(agent: Wire) -> None:
    agent.frame(wire.HELLO, b'{"a":"' + b"x" * 1000, length=wire.MAX_PAYLOAD)
    while True:
        agent.raw(b"x" * 65536)


def progress_without_end(agent: Wire) -> None:
    agent.source(SIZE)
    while True:
        agent.progress(BLOCK)


def data_without_end(agent: Wire) -> None:
    agent.source(1 << 60)
    while True:
        agent.data(0, 64 * BLOCK)


def digests_without_end(agent: Wire) -> None:
    agent.hello(digests=["x"] * 200_000)


LARGE: dict[str, tuple[Script, type[BlockdiffError], str, bool]] = {
    "noise": (noise_without_end, TransportError, f"host printed more than {NOISE_LIMIT >> 10} KiB", False),
    "errors": (errors_without_end, BlockdiffError, "host: xxx", True),
    "json": (json_without_end, ProtocolError, "oversized frame of kind HELLO", True),
    "progress": (progress_without_end, ProtocolError, "reported progress to offset 4096", True),
    "data": (data_without_end, ProtocolError, f"bytes at offset 0 of {1 << 60}, after {64 * BLOCK}", True),
    "digests": (digests_without_end, UsageError, "cannot compute sha256", True),
}


@pytest.mark.parametrize("name", LARGE)
def test_an_agent_without_end_is_refused_in_bounded_memory(server: Server, name: str) -> None:
    script, kind, words, begin = LARGE[name]
    assert words in server.refuse(script, kind, begin=begin).message


@pytest.mark.parametrize("delta_format", [1, 2])
def test_a_long_run_of_zeros_takes_no_room_in_memory(
    large_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], delta_format: int
) -> None:
    """An honest agent sends the holes of a sparse image as one run, a hostile one whatever it likes."""
    size = 16 << 30 if delta_format == 2 else 128 << 20

    def script(agent: Wire) -> None:
        agent.source(size)
        agent.zero(0, size)
        agent.progress(size)
        agent.end(size, size // BLOCK)

    server = Server(large_tmp_path, monkeypatch, capsys)
    server.run(script, Options(block_size=BLOCK, digest="md5", delta_format=delta_format))
