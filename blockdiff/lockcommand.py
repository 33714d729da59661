"""LVCREATE_PREFIX: run a command of the user's around the making of a snapshot.

The command is given another to execute, which makes the snapshot; it takes its lock, executes that, and lets go. Any
lock script of the original's days will do.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from blockdiff import process
from blockdiff.errors import ProcessError

#: How long the command may take until it executes what it was given, and to end after that, in seconds.
LOCK_TIMEOUT_S = 540.0
END_TIMEOUT_S = 60.0

_POLL_S = 0.05

# What the command is to execute: tells us that it runs, and ends when we say so, or are gone.
_RUNNER = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.exit(s.recv(1)!=b'0')"


def around(command: str, take: Callable[[], float]) -> tuple[float, float]:
    """Run `command`, a line for the shell, so that it executes `take`; return what that returned, and seconds held.

    Raises `ProcessError` where the command fails, does not execute what it is given, or is not done in time, and what
    `take` raises; whatever was taken is worth nothing then. What the command prints goes to standard error.
    """
    with tempfile.TemporaryDirectory(prefix="blockdiff-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "go")
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(_POLL_S)
        with _started(command, path) as child:
            with _accepted(listener, child) as runner:
                begun = time.monotonic()
                took_s = take()
                runner.sendall(b"0")
            try:
                status = child.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise ProcessError(
                    f"the command in LVCREATE_PREFIX did not end within {END_TIMEOUT_S:g} s of the snapshot"
                ) from error
            if status != 0:
                raise ProcessError(
                    f"the command in LVCREATE_PREFIX {process.status_text(status)}: "
                    "whether it held its lock while the snapshot was made is not known"
                )
            return took_s, time.monotonic() - begun


@contextmanager
def _started(command: str, path: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield the running command; ends it with all that it started. Its words are never shown: they may be secret."""
    runner = [sys.executable, "-I", "-S", "-c", _RUNNER, path]
    child = subprocess.Popen(
        ["/bin/sh", "-c", command + ' "$@"', "sh", *runner],
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,  # so that it can be ended as a whole
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            process.stop(child)


@contextmanager
def _accepted(listener: socket.socket, child: "subprocess.Popen[bytes]") -> Iterator[socket.socket]:
    """Yield the connection of what the command executes."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection, _address = listener.accept()
            break
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
    listener.close()  # once is enough
    with connection:
        yield connection
