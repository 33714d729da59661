"""What the transports have in common: the bytes to and from a started command, and the start of the agent on it."""

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
#: How long it may take until the agent begins, whatever comes before it, in seconds.
START_TIMEOUT_S = 90.0
#: How long a login shell may take to run the command, in seconds.
SHELL_TIMEOUT_S = 30.0
#: How long the command may take to end once it has nothing more to do, in seconds.
EXIT_TIMEOUT_S = 30.0
#: How much of what the other side says on standard error is kept, in characters.
STDERR_LIMIT = 4000
# How often it is looked whether there was a login, in seconds. To see that the command has ended, and that all else
# holds its pipe says nothing, takes twice `process.LINGER_S`.
_LOOK_S = 2.5 * process.LINGER_S


class Exit(NamedTuple):
    """How the command on the other side ended: `status` is negative for a signal, None if the connection broke."""

    status: int | None


class Connection(wire.Carrier):
    """A running command on the other side. A context manager that leaves nothing running.

    `place` is where it is, `memory` what a command on this machine has inherited. `nonce` is what the agent will begin
    with, once it was sent, and `prefix` the command that it is to run under. `tells_end` is whether the command's end
    is known even if others, as what its host's start files have begun, hold the connection open; `readinto` then
    treats their silence as the end.
    """

    tells_end: bool = True
    place: Place
    memory: SharedMemory | None = None
    nonce: bytes | None = None
    prefix: Sequence[str] = ()

    @property
    def login(self) -> str:
        """What messages call the other side."""
        return self.place.login

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def write_start(self, data: bytes, timeout_s: float) -> None:
        """Write the first bytes that the command reads; raises `ConnectionLost` as `write` does.

        Nobody receives yet whose patience could end it: if it may not fit into what is in between, this raises as
        well if not all was taken after `timeout_s` seconds.
        """
        self.write([data])

    def logged_in(self) -> bool:
        """Return whether it is known that a login shell is there, which is to run the command."""
        return False

    @abstractmethod
    def wait(self, timeout_s: float) -> Exit | None:
        """Return how the command ended, once it has; None if it has not after `timeout_s` seconds."""

    @abstractmethod
    def close(self) -> None:
        """End the connection at once; may be called again."""

    @abstractmethod
    def stderr(self) -> str:
        """Return the end of what the other side said on standard error, after a moment for the rest to arrive."""

    @abstractmethod
    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """Return why the connection was lost, as far as can be known."""


class Tail:
    """Keeps the end of a text that a thread reads to its end."""

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
    """Send what makes the command the agent; `push_agent` then waits for it. Raises `TransportError`."""
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

    What the login shell printed before, up to `NOISE_LIMIT` bytes, is skipped: the agent begins with a random nonce
    that we gave it. Raises `TransportError` if no agent answers.
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
    """Read up to the end of `nonce` and not one byte further; `noise` is what came before it."""
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
    """How long the start may still take: in all, and from the login until its shell runs the command."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._begun = time.monotonic()
        self._login: float | None = None

    def next_s(self, noise: bytearray) -> float:
        """Return how many seconds to wait for the next bytes at most; raises `ConnectionLost` after all of them.

        `noise` is what came so far.
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
    """Return why no agent began. `noise` is what came in its place."""
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
