"""What the transports have in common: a byte stream to a started command, and the start of the agent on it."""

import secrets
import threading
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType

from isal import isal_zlib

from blockdiff import bundle, loader, wire
from blockdiff.errors import BlockdiffError, ConnectionLost, TransportError, printable
from blockdiff.sharedmemory import SharedMemory

#: Login shells may print this many bytes before the agent begins.
NOISE_LIMIT = 64 << 10
#: How long the way from the start of the connection to the agent's first byte may be silent, in seconds.
START_TIMEOUT_S = 90.0
#: How long the command may take to end once it has nothing more to do, in seconds.
EXIT_TIMEOUT_S = 30.0
#: How much of what the other side says on standard error is kept, in characters.
STDERR_LIMIT = 4000
#: What to do about a connection that was lost.
LOST_HINT = "nothing of this run was kept; run again"


class Connection(wire.Stream):
    """A running command on the other side. A context manager that leaves nothing running.

    `login` is what messages call the other side, `memory` what a command on this machine has inherited. `nonce` is what
    the agent will begin with, once it was sent.
    """

    login: str
    memory: SharedMemory | None = None
    nonce: bytes | None = None

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def write_start(self, data: bytes, timeout_s: float) -> None:
        """Write the first bytes that the command reads; raises `ConnectionLost` as `write` does.

        Nobody receives yet whose patience could end it: where it may not fit into what is in between, this raises as
        well once nothing was taken for `timeout_s` seconds.
        """
        self.write([data])

    @abstractmethod
    def wait(self, timeout_s: float) -> int | None:
        """Return the command's exit status once it has ended, None if it has not after `timeout_s` seconds.

        A negative status is the number of a signal, or -1 where the connection ended without any.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection at once; may be called again."""

    @abstractmethod
    def stderr(self) -> str:
        """Return the end of what the other side said on standard error, after a moment for the rest to arrive."""

    @abstractmethod
    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """Return why the connection was lost, as far as can be told."""


class Tail:
    """Keeps the end of a text stream that a thread reads to its end."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._text = b""
        self._chunks = chunks
        self._thread = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for chunk in self._chunks:
            self._text = (self._text + chunk)[-STDERR_LIMIT:]

    def text(self, wait_s: float = 0.0) -> str:
        """Return the end of the stream, after waiting up to `wait_s` seconds for it to be complete."""
        self._thread.join(wait_s)
        return self._text.decode("utf-8", "replace")

    def last_line(self, wait_s: float = 0.0) -> str:
        """Return the last line that is not blank, fit for a message."""
        lines = [line.strip() for line in self.text(wait_s).splitlines() if line.strip()]
        return printable(lines[-1], 500) if lines else ""


def send_agent(connection: Connection, prefix: Sequence[str] = (), timeout_s: float = START_TIMEOUT_S) -> None:
    """Send what makes the command the agent; `push_agent` then waits for it. Raises `TransportError`."""
    nonce = secrets.token_bytes(bundle.NONCE_SIZE)
    try:
        connection.write_start(bundle.startup(nonce, prefix), timeout_s)
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
    that we gave it. Raises `TransportError` where no agent answers.
    """
    if connection.nonce is None:
        send_agent(connection, prefix, timeout_s)
    assert connection.nonce is not None
    try:
        _skip_to(connection, connection.nonce, timeout_s)
    except ConnectionLost as error:
        raise failed_start(connection, error) from error
    return wire.Link(connection, silence_s, wire.STALL_S, isal_zlib.crc32)


def _skip_to(connection: Connection, nonce: bytes, timeout_s: float) -> None:
    """Read up to the end of `nonce` and not one byte further."""
    seen, skipped = b"", 0
    while seen != nonce:
        view = memoryview(bytearray(len(nonce) - len(seen)))
        count = connection.readinto(view, timeout_s)
        if count == 0:
            raise ConnectionLost("the connection ended before the agent began")
        skipped += count
        if skipped > NOISE_LIMIT:
            raise TransportError(
                f"{connection.login} printed more than {NOISE_LIMIT // 1024} KiB before the agent began",
                f"look at what `ssh {connection.login} true` prints, and at the shell's start files there",
            )
        seen += bytes(view[:count])
        while not nonce.startswith(seen):
            seen = seen[1:]


def failed_start(connection: Connection, error: ConnectionLost) -> BlockdiffError:
    """Return why no agent began, from the exit status of the command that should have become it."""
    status = connection.wait(EXIT_TIMEOUT_S if "silent" not in error.message else 0)
    where = connection.login
    said = printable(connection.stderr().strip(), 500)
    reasons = {
        loader.NO_PYTHON: (f"{where} has no python3", "install python3 (3.6 or newer) there; nothing else is needed"),
        loader.TOO_OLD: (f"{where} has no python3 of version 3.6 or newer", "install a newer python3 there"),
        loader.DAMAGED: (f"the agent arrived damaged at {where}", "run again; if it stays so, suspect the network"),
        loader.OTHER_AGENT: (
            f"the key for {where} accepts the agent of another version of blockdiff only",
            "make the line for its authorized_keys, or the script there, anew: blockdiff authorize",
        ),
        loader.NO_PREFIX: (f"{where} cannot run the agent under SSH_BLOCKDIFF_PREFIX: {said}", "correct the command"),
    }
    if status in reasons:
        return TransportError(*reasons[status])
    return connection.explain(error)
