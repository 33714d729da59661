"""Run a command and log what it says, so that cron mails the log of a run that failed, and nothing else."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime
from typing import BinaryIO

from blockdiff import process
from blockdiff.errors import ProcessError, StorageError, printable

_RULE = b"-" * 78
_COPY_SIZE = 1 << 16

#: The exit status for a command that died of a signal, as with the original.
SIGNALLED = 255


class _Log:
    """An open log file. `stamped` puts the time in front of each line."""

    def __init__(self, file: BinaryIO, stamped: bool) -> None:
        self._file = file
        self._stamped = stamped
        self._start = file.seek(0, os.SEEK_END)

    def line(self, text: bytes) -> None:
        """Append a line, by one write: two runs with one log do not mix their lines. Raises `StorageError`."""
        stamp = datetime.now().strftime("[%a %b %e %H:%M:%S %Y] ").encode("ascii") if self._stamped else b""
        try:
            self._file.write(stamp + text + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write the log: {error.strerror}", "is the disk full?") from error

    def copy_to(self, output: BinaryIO) -> None:
        """Write what was appended since the log was opened to `output`."""
        self._file.seek(self._start)
        while data := self._file.read(_COPY_SIZE):
            output.write(data)
        output.flush()


def _open(path: str | None) -> BinaryIO:
    try:
        return tempfile.TemporaryFile("w+b", buffering=0) if path is None else open(path, "a+b", buffering=0)
    except OSError as error:
        raise StorageError(f"cannot open the log {printable(path or 'file')}: {error.strerror}") from error


def run_logged(command: Sequence[str], path: str | None, stamped: bool, print_always: bool, output: BinaryIO) -> int:
    """Run `command` to its end, append what it says to the log at `path`, and return its exit status.

    The command may take as long as it likes. Where it failed, or always if asked to, this run's part of the log goes to
    `output`. Without `path` the log is kept only for that. Raises `ProcessError` where the command cannot be
    started, and `StorageError` where the log cannot be written.
    """
    with _open(path) as file:
        log = _Log(file, stamped)
        status = SIGNALLED
        try:
            status = _run(command, log)
        finally:
            if status != 0 or print_always:
                log.copy_to(output)
    return status


def _run(command: Sequence[str], log: _Log) -> int:
    log.line(_RULE)
    log.line(os.fsencode(f"{socket.gethostname()} starting: {printable(' '.join(command), 4000)}"))

    def start() -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            log.line(os.fsencode(f"failed to execute {printable(command[0])}: {error.strerror}"))
            raise ProcessError(f"cannot run {printable(command[0])}: {error.strerror}", "is it on the PATH?") from error

    with process.started(start) as child:
        assert child.stdout is not None
        for text in child.stdout:
            log.line(text[:-1] if text.endswith(b"\n") else text)
        status = child.wait()
    if status < 0:
        log.line(b"command died with signal:%d" % -status)
        return SIGNALLED
    log.line(b"command exited with code:%d" % status)
    return status
