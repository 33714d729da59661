"""What the transports have in common: the bytes to and from a command, and how that command becomes the agent."""

import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

from isal import isal_zlib

from blockdiff.host import loader
from blockdiff.shared import process, trace, wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, TransportError
from blockdiff.transport import advice, bundle
from blockdiff.transport.advice import Cause, Place
from blockdiff.transport.sharedmemory import SharedMemory

#: Login shells may print this many bytes before the agent begins.
NOISE_LIMIT = 64 << 10
#: How long it may take until the agent begins, including everything before it, in seconds.
START_TIMEOUT_S = 90.0
#: How long a login shell may take to run the command, in seconds.
SHELL_TIMEOUT_S = 30.0
#: How long the command may take to end when it has nothing more to do, in seconds.
EXIT_TIMEOUT_S = 30.0
#: How much of the other side's standard error is kept, in bytes.
STDERR_LIMIT = 4000
# How often to check whether there was a login, in seconds. This must be more than twice `process.LINGER_S`: `readinto`
# needs that long to find out that the command has ended if other processes keep its pipe open.
_LOOK_S = 2.5 * process.LINGER_S


class Exit(NamedTuple):
    """How the command on the other side ended: `status` is negative for a signal, None if the connection broke."""

    status: int | None


class Connection(wire.Carrier):
    """A running command on the other side. A context manager that ends it.

    `place` is where it runs, `memory` is the memory that a command on this machine has inherited. After the agent was
    sent, `nonce` is what its output will begin with, and `prefix` is the command that runs it. `tells_end` says whether
    we learn of the command's end even if other processes (for example from the shell's start files) keep the connection
    open; `readinto` then returns 0 when these are silent.
    """

    tells_end: bool = True
    place: Place
    memory: SharedMemory | None = None
    nonce: bytes | None = None
    prefix: Sequence[str] = ()

    @property
    def login(self) -> str:
        """The name of the other side in messages."""
        return self.place.login

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def write_start(self, data: bytes, timeout_s: float) -> None:
        """Write the first bytes that the command reads; raises `ConnectionLost` like `write`.

        No thread receives yet that could time out. So if the bytes may be more than the pipe holds, this also raises if
        they were not all accepted after `timeout_s` seconds.
        """
        self.write([data])

    def logged_in(self) -> bool:
        """Return whether it is known that the login worked, so that the login shell is to run the command."""
        return False

    @abstractmethod
    def wait(self, timeout_s: float) -> Exit | None:
        """Wait for the command's end, and return how it ended; None if it has not ended after `timeout_s` seconds."""

    @abstractmethod
    def close(self) -> None:
        """End the connection at once; may be called more than once."""

    @abstractmethod
    def stderr(self) -> str:
        """Return the end of the other side's standard error, after a short wait for the rest to arrive."""

    @abstractmethod
    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """Return the error that says why the connection was lost, as far as that is known."""


class Tail:
    """Reads a text in a thread, to its end, and keeps the last part of it."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._text = b""
        self._chunks = chunks
        self._thread = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for chunk in self._chunks:
            self._text = (self._text + chunk)[-STDERR_LIMIT:]

    def text(self, wait_s: float = 0.0) -> str:
        """Return the end of the text, after waiting up to `wait_s` seconds for it to be complete."""
        self._thread.join(wait_s)
        return self._text.decode("utf-8", "replace")


def send_agent(connection: Connection, prefix: Sequence[str] = (), timeout_s: float = START_TIMEOUT_S) -> None:
    """Send the bytes that make the command the agent; `push_agent` then waits for it. Raises `TransportError`."""
    nonce = secrets.token_bytes(bundle.NONCE_SIZE)
    connection.prefix = prefix
    try:
        connection.write_start(bundle.startup(nonce, prefix, trace.report is not None), timeout_s)
    except ConnectionLost as error:
        raise failed_start(connection, error) from error
    connection.nonce = nonce


def push_agent(
    connection: Connection,
    prefix: Sequence[str] = (),
    timeout_s: float = START_TIMEOUT_S,
    silence_s: float = wire.SILENCE_S,
) -> wire.Link:
    """Start the agent over `connection` and return the link to it, on which it may be silent for `silence_s`.

    Whatever the login shell prints before the agent's output, up to `NOISE_LIMIT` bytes, is skipped: the agent begins
    with a random nonce that we sent to it. Raises `TransportError` if no agent answers.
    """
    if connection.nonce is None:
        send_agent(connection, prefix, timeout_s)
    assert connection.nonce is not None
    noise = bytearray()
    try:
        _skip_to(connection, connection.nonce, timeout_s, noise)
    except ConnectionLost as error:
        raise failed_start(connection, error, bytes(noise)) from error
    link = trace.link or wire.Link
    return link(connection, silence_s, wire.STALL_S, isal_zlib.crc32)


def _skip_to(connection: Connection, nonce: bytes, timeout_s: float, noise: bytearray) -> None:
    """Read exactly to the end of `nonce`; everything that was read is added to `noise`."""
    patience = _Patience(connection, timeout_s)
    matched = 0
    while matched < len(nonce):
        view = memoryview(bytearray(len(nonce) - matched))
        wait_s = patience.next_s(noise)
        try:
            count = connection.readinto(view, wait_s)
        except ConnectionLost as error:
            if error.silent:
                continue
            raise
        if count == 0:
            raise ConnectionLost("the connection ended before the agent began")
        noise += view[:count]
        if len(noise) > NOISE_LIMIT:
            raise TransportError(
                f"{connection.login} printed more than {NOISE_LIMIT // 1024} KiB before the agent began",
                f"look at what `ssh {connection.login} true` prints, and at the shell's start files there",
            )
        matched = next(size for size in range(min(len(nonce), len(noise)), -1, -1) if noise.endswith(nonce[:size]))


class _Patience:
    """How long the start may still take: in total, and from the login until the login shell runs the command."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._begun = time.monotonic()
        self._login: float | None = None

    def next_s(self, noise: bytearray) -> float:
        """Return how many seconds to wait for the next bytes; raises `ConnectionLost` if the time is over.

        `noise` is what has arrived so far.
        """
        now = time.monotonic()
        left_s = self._begun + self._timeout_s - now
        if left_s <= 0:
            raise ConnectionLost(f"waited for {self._timeout_s:g} s", silent=True)
        if loader.BEGUN in noise:
            return left_s
        if self._login is None and self._connection.logged_in():
            self._login = now
        if self._login is not None and self._login + SHELL_TIMEOUT_S <= now:
            raise ConnectionLost(f"the login shell did not run the command for {SHELL_TIMEOUT_S:g} s", silent=True)
        return min(left_s, _LOOK_S)


def failed_start(connection: Connection, error: ConnectionLost, noise: bytes = b"") -> BlockdiffError:
    """Return the error that says why no agent began. `noise` is what arrived instead of the agent's output."""
    ended = connection.wait(0 if error.silent else EXIT_TIMEOUT_S)
    before = noise.replace(loader.BEGUN, b"").decode("utf-8", "replace")
    said = advice.last_words((before + "\n" + connection.stderr()).splitlines())
    if ended is None and error.silent:
        return advice.failure(Cause.NOT_IN_TIME, connection.place, said, why=error.message)
    if ended is None or ended.status is None:
        return connection.explain(error)
    how = process.status_text(ended.status)
    prefix = " ".join(connection.prefix)
    unknown = Cause.PREFIX_FAILED if prefix else Cause.NOT_BEGUN
    cause = advice.STATUSES.get(ended.status, unknown)
    return advice.failure(cause, connection.place, said, ended=how, prefix=prefix)
