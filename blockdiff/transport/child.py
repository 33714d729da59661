"""Connections that are child processes: for the agent on this machine, and as the base of `openssh`."""

import fcntl
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from blockdiff.shared import process, trace, wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, TransportError
from blockdiff.transport import advice, bundle
from blockdiff.transport.advice import Place
from blockdiff.transport.connection import Connection, Exit, Tail
from blockdiff.transport.sharedmemory import SharedMemory

#: Size of the pipes to and from the child in bytes, if the system allows it: so the processes switch less often.
PIPE_SIZE = 1 << 20
#: How long an agent on this machine may take to clean up when it is asked to end, in seconds: LVM is slow.
UNWIND_TIMEOUT_S = 60.0
#: This machine.
HERE = Place("localhost", "localhost")


class ChildConnection(Connection):
    """A command that runs as our child; the connection is its standard input and output.

    `stop_timeout_s` is how long it may take to end when it is asked to, before it is killed. The command inherits
    `memory`, which is closed with the connection.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        place: Place,
        stop_timeout_s: float = process.STOP_TIMEOUT_S,
        memory: SharedMemory | None = None,
    ) -> None:
        self.place = place
        self.memory = memory
        self._stop_timeout_s = stop_timeout_s
        self._program = arguments[0]
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._closed = False
        self._ended_s: float | None = None  # when we noticed it
        try:
            self._child = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=() if memory is None else (memory.fd,),
            )
        except OSError as error:
            raise TransportError(f"cannot start {arguments[0]}: {error.strerror}") from error
        trace.child_began(self._child)
        assert self._child.stdin is not None and self._child.stdout is not None and self._child.stderr is not None
        self._input, self._output = self._child.stdin, self._child.stdout
        for pipe in (self._input, self._output):
            _enlarge(pipe.fileno())
        self._pipe = wire.Pipe(self._output.fileno(), self._input.fileno())
        self._readable = select.poll()
        self._readable.register(self._output, select.POLLIN)
        self._tail = Tail(chunks(self._child.stderr))

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        """See `connection.Connection`."""
        with self._read_lock:
            if self._closed:
                raise ConnectionLost("the connection is closed")
            return 0 if self._is_over(timeout_s) else self._pipe.readinto(view, 0)

    def _is_over(self, timeout_s: float) -> bool:
        """Wait for something to read; return True if there is nothing and the command has ended.

        Processes that still hold its pipe are then silent. Raises `ConnectionLost` if nothing arrived for `timeout_s`
        seconds.
        """
        deadline = time.monotonic() + timeout_s
        ended = False
        while not self._readable.poll(1000 * max(0.0, min(process.LINGER_S, deadline - time.monotonic()))):
            if ended:
                return True
            if time.monotonic() >= deadline:
                raise ConnectionLost(f"silent for {timeout_s:g} s", silent=True)
            ended = self._child.poll() is not None
        return False

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        """See `connection.Connection`."""
        with self._write_lock:
            if self._closed:
                raise ConnectionLost("the connection is closed")
            self._pipe.write(parts)

    def write_start(self, data: bytes, timeout_s: float) -> None:
        """See `connection.Connection`."""
        writable = select.poll()
        writable.register(self._input, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        # a pipe that is ready accepts this many bytes without blocking; a whole pipe may hold less than the agent
        for begin in range(0, len(data), select.PIPE_BUF):
            if not writable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise ConnectionLost(f"waited for {timeout_s:g} s", silent=True)
            self.write([data[begin : begin + select.PIPE_BUF]])

    def wait(self, timeout_s: float) -> Exit | None:
        """See `connection.Connection`."""
        try:
            return Exit(self._child.wait(timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """See `connection.Connection`."""
        process.stop(self._child, self._stop_timeout_s)
        # Threads may still be writing and reading. They fail now, because the child has ended. A descriptor must not be
        # closed before that: a thread could use its number when it already belongs to another file. If a grandchild
        # keeps the other end of the pipe open, the thread does not end, and the descriptor stays open.
        for lock, pipe in ((self._write_lock, self._input), (self._read_lock, self._output)):
            if lock.acquire(timeout=process.STOP_TIMEOUT_S):
                self._closed = True
                pipe.close()
                lock.release()
        # a child of another user could not be stopped; it learns only now, from the closed pipes, that it must end
        if self.wait(self._stop_timeout_s) is None and self._child not in process.LEFT_ALONE:
            process.LEFT_ALONE.append(self._child)
        trace.child_ended(self._child)
        if self.memory is not None:
            memory, self.memory = self.memory, None
            memory.close()

    def stderr(self) -> str:
        """See `connection.Connection`."""
        return self._tail.text(self._patience_s())

    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """See `connection.Connection`."""
        return advice.lost(self.place, error, self.ended(), advice.last_words(self.stderr().splitlines()))

    def ended(self) -> str:
        """Return how the child ended, in words; "" if it has not ended."""
        status = self._child.poll()
        return "" if status is None else f"{self._program} {process.status_text(status)}"

    def _patience_s(self) -> float:
        """Return how long to wait for the rest of its output: a grandchild may keep the pipe open after its end."""
        if self._child.poll() is None:
            return 1.0
        if self._ended_s is None:
            self._ended_s = time.monotonic()
        return max(0.0, self._ended_s + process.STOP_TIMEOUT_S - time.monotonic())


def local() -> ChildConnection:
    """Start the agent on this machine, with shared memory if the system provides it."""
    try:
        memory = SharedMemory()
    except OSError:
        return ChildConnection(bundle.local_command(), HERE, UNWIND_TIMEOUT_S)
    try:
        return ChildConnection(bundle.local_command(), HERE, UNWIND_TIMEOUT_S, memory)
    except BaseException:
        memory.close()
        raise


def _enlarge(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # an unprivileged user may have reached the limit for all pipes; the default size works as well


def chunks(pipe: IO[bytes]) -> Iterator[bytes]:
    """Yield what arrives through a pipe until its end, and close it."""
    with pipe:
        while chunk := os.read(pipe.fileno(), 4096):
            yield chunk
