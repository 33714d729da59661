"""LVCREATE_PREFIX: run a command of the user's around the making of a snapshot.

The command gets another to execute, which makes the snapshot; it takes its lock, executes that, and releases it. Any
lock script of the original's days will do.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockdiff.chain import temporary
from blockdiff.shared import process
from blockdiff.shared.errors import ProcessError, printable

#: How long the command may take until it executes what it was given, and to end after that, in seconds.
LOCK_TIMEOUT_S = 540.0
END_TIMEOUT_S = 60.0

_POLL_S = 0.05

# What the command is to execute: reports that it runs, and ends when we say so, or have ended.
_RUNNER = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.exit(s.recv(1)!=b'0')"


def around(command: str, take: Callable[[], float]) -> tuple[float, float]:
    """Run `command`, a line for the shell, so that it executes `take`; return what that returned, and seconds held.

    Raises `ProcessError` if the command fails, does not execute what it is given, or is not done in time, and what
    `take` raises; whatever was taken must not be used then. What the command prints goes to standard error.
    """
    with _listening() as (listener, path), _started(command, path) as child:
        runner = _accept(listener, child)
        begun = time.monotonic()
        try:
            with runner:
                took_s = take()
                waited = child.poll() is None and _told(runner)
        finally:
            status = _ended(child)  # in any case, the command is to release its lock
        if status is None:
            raise ProcessError(f"the command in LVCREATE_PREFIX did not end within {END_TIMEOUT_S:g} s of the snapshot")
        if status != 0 or not waited:
            raise ProcessError(
                f"the command in LVCREATE_PREFIX {process.status_text(status)}"
                f"{'' if waited else ' before the snapshot was made'}: "
                "whether it held its lock while the snapshot was made is not known"
            )
        return took_s, time.monotonic() - begun


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket for what the command executes, and its path, which only this user can reach."""
    with temporary.directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "go")
        try:
            listener.bind(path)
        except OSError as error:
            raise ProcessError(
                f"cannot make the socket {printable(path)} for the command in LVCREATE_PREFIX: {error}",
                "TMPDIR in the environment names another directory",
            ) from error
        listener.listen(1)
        listener.settimeout(_POLL_S)
        yield listener, path


@contextmanager
def _started(command: str, path: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield the running command; ends it with all that it started. Its words are never shown: they may be secret."""
    runner = [sys.executable, "-I", "-S", "-c", _RUNNER, path]

    def start() -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(
                ["/bin/sh", "-c", command + ' "$@"', "sh", *runner],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,  # so that it can be ended as a whole
            )
        except OSError as error:
            raise ProcessError(f"cannot start /bin/sh for the command in LVCREATE_PREFIX: {error.strerror}") from error

    with process.started(start, process.stop_session) as child:
        yield child


def _accept(listener: socket.socket, child: "subprocess.Popen[bytes]") -> socket.socket:
    """Return the connection of what the command executes."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection, _address = listener.accept()
            listener.close()  # once is enough
            return connection
        except TimeoutError:
            pass
        status = child.poll()
        if status is not None:
            raise ProcessError(
                f"the command in LVCREATE_PREFIX {process.status_text(status)} without executing what it was given",
                "it must execute the command line that follows it, as `nice` does",
            )
        if time.monotonic() > deadline:
            raise ProcessError(f"the command in LVCREATE_PREFIX was not ready after {LOCK_TIMEOUT_S:g} s")


def _told(runner: socket.socket) -> bool:
    """Let what the command executes end well; return whether it was still there."""
    try:
        runner.sendall(b"0")
    except OSError:
        return False
    return True


def _ended(child: "subprocess.Popen[bytes]") -> int | None:
    """Wait for the end of the command; return its status, None if it does not end."""
    try:
        return child.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
