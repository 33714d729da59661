"""A socket of the host, carried through the real agent: bytes both ways, both ends, and failures in between."""

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff.host import relay
from blockdiff.session import tunnel
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.session import Session
from blockdiff.shared import wire
from blockdiff.shared.blocks import digest_named
from blockdiff.shared.errors import (
    BlockdiffError,
    ConnectionLost,
    DatabaseError,
    ProtocolError,
    SourceError,
    TransportError,
)
from blockdiff.transport import bundle
from blockdiff.transport.address import Address
from tests import agents, fake_agent, processes
from tests.descriptors import all_closed
from tests.interpreters import INTERPRETERS
from tests.mariadb import wait_for

LIMIT_S = 30.0
LARGE = os.urandom(1 << 20) * 5


@pytest.fixture(params=[name for name in INTERPRETERS if name in ("3.6", "3.11")])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Python of the host; every local source is read under it."""
    name = str(request.param)
    command = agents.command(INTERPRETERS[name])
    monkeypatch.setattr(bundle, "local_command", lambda: command)
    return name


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"content")
    return path


class Server:
    """Stands in for the database: lets `serve` talk on each connection to a Unix socket. A context manager."""

    def __init__(self, path: Path, serve: Callable[[socket.socket], object]) -> None:
        self.path = str(path)
        self.failures: list[BaseException] = []
        self.ended = threading.Event()
        self._serve = serve
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(LIMIT_S)
                self._serve(connection)
        except (OSError, AssertionError) as error:
            self.failures.append(error)
        finally:
            self.ended.set()

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT_S)
        self._listener.close()

    def assert_ended_well(self) -> None:
        """The connection is over, and nothing went wrong."""
        assert self.ended.wait(LIMIT_S) and not self.failures, self.failures


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def received(sock: socket.socket, size: int | None = None) -> bytes:
    """Return `size` bytes, or all up to the end."""
    sock.settimeout(LIMIT_S)
    found = bytearray()
    while size is None or len(found) < size:
        data = sock.recv(1 << 16 if size is None else min(1 << 16, size - len(found)))
        if not data:
            break
        found += data
    return bytes(found)


@contextmanager
def session(path: Path) -> Iterator[Session]:
    with Session(Address(None, str(path))) as found:
        yield found


def scanned(found: Session, image: Path, prepared: bool = False) -> bytes:
    """Return the image as the session reads it, to its end."""
    if not prepared:
        found.prepare(RunRequest([SourceRequest(os.fsencode(image))]))
        found.begin_take()
        found.end_take()
    scan = ScanRequest(4096, digest_named("sha256"))
    opened = found.scan(scan)
    runs = found.changes(scan, opened.size, lambda length: memoryview(bytearray(length)))
    content = b"".join(bytes(run.data or b"") for run in runs)
    found.finish()
    return content


# --- bytes


def test_bytes_go_both_ways_and_the_run_goes_on(python: str, image: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "db", echo) as server, session(image) as found:
        assert found.host["python"].startswith(python)
        with found.tunnel([server.path], 0) as sock:
            for size in (1, 100, 1 << 17):
                sock.sendall(LARGE[:size])
                assert received(sock, size) == LARGE[:size]
        server.assert_ended_well()
        assert scanned(found, image) == b"content"


def test_much_goes_both_ways_at_once(python: str, image: Path, tmp_path: Path) -> None:
    got: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        writer = threading.Thread(target=connection.sendall, args=(LARGE,), daemon=True)
        writer.start()
        got.append(received(connection, len(LARGE)))
        writer.join(LIMIT_S)

    with Server(tmp_path / "db", serve) as server, session(image) as found:
        with found.tunnel([server.path], 0) as sock:
            writer = threading.Thread(target=sock.sendall, args=(LARGE,), daemon=True)
            writer.start()
            assert received(sock, len(LARGE)) == LARGE
            writer.join(LIMIT_S)
            server.assert_ended_well()
        assert got == [LARGE]
        assert scanned(found, image) == b"content"


def test_the_run_is_ordered_and_answered_while_the_socket_is_open(python: str, image: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "db", echo) as server, session(image) as found:
        with found.tunnel([server.path], 0) as sock:
            ready = found.prepare(RunRequest([SourceRequest(os.fsencode(image))], directories=["/", "/no/such/place"]))
            assert [index for _device, index in ready.places] == [None, None] and ready.places[1][0] == ""
            found.begin_take()
            sock.sendall(b"meanwhile")
            assert received(sock, 9) == b"meanwhile"
            assert 0 <= found.end_take() < LIMIT_S
            sock.sendall(b"after")
            assert received(sock, 5) == b"after"
        assert scanned(found, image, prepared=True) == b"content"


# --- ends


def test_the_server_may_close_first(python: str, image: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "db", lambda connection: connection.sendall(LARGE)) as server, session(image) as found:
        with found.tunnel([server.path], 0) as sock:
            assert received(sock) == LARGE
            server.assert_ended_well()
        assert scanned(found, image) == b"content"


def test_the_client_may_close_while_the_server_still_sends(python: str, image: Path, tmp_path: Path) -> None:
    def serve(connection: socket.socket) -> None:
        with pytest.raises(OSError):
            while True:
                connection.sendall(LARGE)

    with Server(tmp_path / "db", serve) as server, session(image) as found:
        with found.tunnel([server.path], 0) as sock:
            assert received(sock, 1000) == LARGE[:1000]
        server.assert_ended_well()
        assert scanned(found, image) == b"content"


def test_a_server_that_takes_nothing_does_not_hold_up_the_end(python: str, image: Path, tmp_path: Path) -> None:
    go = threading.Event()
    with Server(tmp_path / "db", lambda connection: go.wait(LIMIT_S)) as server, session(image) as found:
        with found.tunnel([server.path], 0) as sock:
            sock.sendall(b"x" * 1000)
        assert scanned(found, image) == b"content"
        go.set()


def test_a_second_tunnel_follows_the_first(image: Path, tmp_path: Path) -> None:
    with session(image) as found:
        for name in ("first", "second"):
            with Server(tmp_path / name, echo) as server, found.tunnel([server.path], 0) as sock:
                sock.sendall(name.encode())
                assert received(sock, len(name)) == name.encode()
        assert scanned(found, image) == b"content"


def test_a_port_of_the_host_is_reached_where_none_of_the_sockets_is_there(image: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, session(image) as found:
        listener.settimeout(LIMIT_S)
        with found.tunnel([str(tmp_path / "none")], listener.getsockname()[1]) as sock:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"here")
            assert received(sock) == b"here"


# --- failures


@pytest.mark.parametrize(
    ("name", "words", "hint"),
    [
        (
            "none",
            "localhost: there is no database socket: {path}",
            "--mysql 'mysql+ssh://USER@/?socket=/path' names another",
        ),
        ("dead", "localhost: cannot connect to the database at {path}: Connection refused", "is it running there"),
        ("none/" + 200 * "x", "localhost: there is no database socket: {path}", "is the database running there?"),
    ],
)
def test_a_socket_that_cannot_be_reached_names_itself(
    python: str, image: Path, tmp_path: Path, name: str, words: str, hint: str
) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead"))
    dead.close()
    path = f"{tmp_path}/{name}"
    with session(image) as found:
        with pytest.raises(SourceError) as caught, found.tunnel([path], 0):
            pytest.fail("there was a socket")
        assert caught.value.message == words.format(path=path)
        assert hint in str(caught.value.hint)
        assert scanned(found, image) == b"content"  # the agent is as it was


def test_a_path_too_long_for_a_socket_names_itself(python: str, image: Path, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)
    path.touch()
    with (
        session(image) as found,
        pytest.raises(SourceError, match=r"cannot connect to the database at .*xxx: AF_UNIX path too long"),
        found.tunnel([str(path)], 0),
    ):
        pytest.fail("there was a socket")


def test_what_the_host_reports_meanwhile_is_what_is_raised_whatever_broke_inside(
    python: str, image: Path, tmp_path: Path
) -> None:
    """The agent ends after its report, and the database session with it: that is no news."""
    with Server(tmp_path / "db", echo) as server, session(image) as found:
        with pytest.raises(SourceError) as caught, found.tunnel([server.path], 0) as sock:
            found.prepare(RunRequest([SourceRequest(os.fsencode(image))], before="exit 3"))
            found.begin_take()
            assert received(sock) == b""  # the agent has ended
            try:
                found.end_take()
            except BlockdiffError as error:
                raise DatabaseError("the session is gone") from error
        assert (
            caught.value.message == "localhost: the command of --before failed: /bin/sh -c exit 3 exited with status 3"
        )
        server.assert_ended_well()


def test_an_error_report_is_raised_in_place_of_an_answer(python: str, tmp_path: Path) -> None:
    with Server(tmp_path / "db", echo) as server, session(tmp_path) as found:
        missing = SourceRequest(os.fsencode(tmp_path / "none"))
        with (
            pytest.raises(SourceError, match=r"^localhost: cannot open .*none: No such"),
            found.tunnel([server.path], 0),
        ):
            found.prepare(RunRequest([missing]))
        server.assert_ended_well()


@pytest.mark.parametrize("inner", [DatabaseError("the session is gone"), None])
def test_the_death_of_the_agent_is_what_is_raised(
    python: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: BlockdiffError | None
) -> None:
    mark = processes.new_mark()
    for name, value in processes.environment(mark).items():
        monkeypatch.setenv(name, value)
    with Server(tmp_path / "db", echo) as server, session(image) as found:
        with pytest.raises(TransportError) as caught, found.tunnel([server.path], 0) as sock:
            (pid,) = processes.marked(mark)
            os.kill(pid, signal.SIGKILL)
            assert received(sock) == b""
            if inner is not None:
                raise inner
            found.prepare(RunRequest([SourceRequest(os.fsencode(image))]))
        assert caught.value.message.startswith("lost the agent on localhost: ")
        assert "died of signal 9" in caught.value.message
        server.assert_ended_well()  # the host's end of the socket has ended with it


def test_a_failure_of_the_user_of_the_socket_is_raised_as_it_is(python: str, image: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "db", echo) as server, session(image) as found:
        with pytest.raises(DatabaseError, match="wrong password"), found.tunnel([server.path], 0):
            raise DatabaseError("wrong password")
        server.assert_ended_well()


def hostile(monkeypatch: pytest.MonkeyPatch, script: Callable[[fake_agent.Wire], None]) -> None:
    """Let the next session meet an agent that opens the socket, and then follows the script."""

    def run(wire_: fake_agent.Wire) -> None:
        wire_.begin()
        wire_.hello()
        wire_.ordered(wire.OPEN)
        wire_.json(wire.OPEN, {})
        script(wire_)

    monkeypatch.setattr("blockdiff.transport.connect", lambda *arguments: fake_agent.FakeConnection(run))


def drained(wire_: fake_agent.Wire) -> None:
    """Take whatever the server sends, until it has had enough."""
    while True:
        wire_.link.read_bytes(wire_.link.receive(), wire.MAX_PAYLOAD)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (lambda wire_: wire_.frame(wire.DATA, b"x"), "sent an unexpected frame of kind DATA"),
        (lambda wire_: wire_.frame(wire.CLOSE, b"x"), "sent an unexpected frame of kind CLOSE"),
        (lambda wire_: wire_.frame(wire.READY, b"[]"), "frame of kind READY is not a JSON object"),
        (lambda wire_: wire_.frame(wire.CLOSE), "closed the tunnel in place of an answer"),
        (lambda wire_: wire_.json(wire.TAKEN, {}), "sent a frame of kind TAKEN in place of READY"),
    ],
)
def test_an_agent_that_breaks_the_rules_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, script: Callable[[fake_agent.Wire], object], words: str
) -> None:
    def run(wire_: fake_agent.Wire) -> None:
        wire_.ordered(wire.REQUEST)
        script(wire_)
        drained(wire_)

    hostile(monkeypatch, run)
    with (
        Session(Address("host", "/x")) as found,
        pytest.raises(ProtocolError, match=f"^the agent on host broke the protocol: {words}"),
        found.tunnel(["/db"], 0) as sock,
    ):
        found.prepare(RunRequest([SourceRequest(b"/x")]))
        received(sock)
        found.end_take()


def test_answers_that_nobody_asked_for_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(wire_: fake_agent.Wire) -> None:
        while True:
            wire_.json(wire.READY, {"notes": ["x" * 100_000]})

    hostile(monkeypatch, flood)
    with (
        Session(Address("host", "/x")) as found,
        pytest.raises(ProtocolError, match="sent more answers than it was asked for"),
        found.tunnel(["/db"], 0) as sock,
    ):
        assert received(sock) == b""
        raise DatabaseError("the session is gone")


def test_bytes_that_nobody_takes_hold_up_the_agent_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(wire_: fake_agent.Wire) -> None:
        while True:
            wire_.frame(wire.BYTES, bytes(1 << 16))

    hostile(monkeypatch, flood)
    with (
        Session(Address("host", "/x")) as found,
        pytest.raises(DatabaseError, match="enough"),
        found.tunnel(["/db"], 0) as sock,
    ):
        received(sock, 1 << 20)
        seen = [0]
        while len(set(seen[-10:])) > 1 or len(seen) < 10:  # until nothing more comes
            time.sleep(0.05)
            seen.append(found.bytes_received)
            assert seen[-1] < 8 << 20
        raise DatabaseError("enough")


def test_an_answer_other_than_to_the_opening_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(wire_: fake_agent.Wire) -> None:
        wire_.begin()
        wire_.hello()
        wire_.json(wire.READY, {})
        drained(wire_)

    monkeypatch.setattr("blockdiff.transport.connect", lambda *arguments: fake_agent.FakeConnection(script))
    with (
        Session(Address("host", "/x")) as found,
        pytest.raises(ProtocolError, match="sent a frame of kind READY in place of OPEN"),
        found.tunnel(["/db"], 0),
    ):
        pytest.fail("there was a socket")


def test_a_tunnel_that_does_not_close_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile(monkeypatch, drained)
    with (
        Session(Address("host", "/x")) as found,
        pytest.raises(TransportError, match="the tunnel did not close"),
        found.tunnel(["/db"], 0),
    ):
        assert isinstance(found._connection, fake_agent.FakeConnection)
        wait_for(found._connection._read_lock.locked, "a tunnel that waits, with the patience that it has")
        found._link.silence_s = 0.2


@pytest.mark.parametrize("kind", [wire.BYTES, wire.CLOSE, 99])
def test_an_agent_without_a_socket_takes_no_bytes(python: str, image: Path, kind: int) -> None:
    with agents.conversation(bundle.local_command()) as talk:
        talk.link.send(kind)
        assert isinstance(talk.failure(), ProtocolError) or kind == 99
        assert talk.child.wait(LIMIT_S) == (1,)


def test_an_order_that_the_reading_thread_of_the_agent_cannot_follow_ends_it(python: str) -> None:
    with agents.conversation(bundle.local_command()) as talk:
        talk.link.send_json(wire.OPEN, {"sockets": [], "port": 1 << 20})
        error = talk.failure()
        assert type(error) is ProtocolError
        assert error.message.startswith("host: an order cannot be followed: OverflowError: ")
        assert talk.child.wait(LIMIT_S) == (1,)


def test_one_end_alone_takes_what_comes_in_any_order() -> None:
    """Feeding and closing an end that is over is nothing."""
    sent: queue.Queue[tuple[int, bytes]] = queue.Queue()

    class Link(wire.Link):
        def __init__(self) -> None:
            pass

        def send(self, kind: int, *parts: wire.Buffer, offset: int = 0) -> None:
            sent.put((kind, b"".join(parts)))

    ours, theirs = socket.socketpair()
    with theirs:
        end = relay.Relay(Link(), ours, wire.CLOSE)
        end.start()
        theirs.sendall(b"abc")
        assert sent.get(timeout=LIMIT_S) == (wire.BYTES, b"abc")
        end.feed(b"def")
        end.feed(b"")
        assert received(theirs) == b"def"
        theirs.close()
        assert sent.get(timeout=LIMIT_S) == (wire.CLOSE, b"")
        end.join(LIMIT_S)
        end.feed(b"late")
        end.feed(b"")
        end.close()
        end.close()
    assert sent.empty()


def test_a_socket_that_is_slow_to_speak_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for connecting and writing: a database may think for as long as it likes."""
    slept = threading.Event()

    class Slow(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            if not slept.is_set():
                slept.set()
                raise TimeoutError
            return super().recv(size, flags)

    ours, theirs = socket.socketpair()
    sent: queue.Queue[bytes] = queue.Queue()

    class Link(wire.Link):
        def __init__(self) -> None:
            pass

        def send(self, kind: int, *parts: wire.Buffer, offset: int = 0) -> None:
            sent.put(b"".join(parts))

    with theirs:
        end = relay.Relay(Link(), Slow(fileno=ours.detach()), wire.BYTES)
        end.start()
        theirs.sendall(b"late")
        assert sent.get(timeout=LIMIT_S) == b"late" and slept.is_set()
        end.close()
        end.join(LIMIT_S)


def test_the_failure_of_a_tunnel_is_told_to_whoever_asks_again() -> None:
    """A second question must not wait for an answer that nobody gives any more."""
    ours, theirs = socket.socketpair()
    with theirs:
        link = wire.Link(wire.Pipe(ours.fileno(), ours.fileno()), LIMIT_S)
        far = wire.Link(wire.Pipe(theirs.fileno(), theirs.fileno()), LIMIT_S)
        far.send_json(wire.OPEN, {})
        opened = tunnel.Tunnel(link, lambda fields: BlockdiffError("?"))
        with opened.open([], 1):
            theirs.shutdown(socket.SHUT_RDWR)
            for _ in range(2):
                with pytest.raises(ConnectionLost):
                    opened.control()
        with pytest.raises(ConnectionLost):
            opened.close()
    ours.close()
