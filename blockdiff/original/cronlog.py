"""Run a command and log what it says, so that cron mails the log of a run that failed, and nothing else.

What is to be mailed is kept apart from the log, which may be cut in between, as `logrotate` does with ``copytruncate``,
be full, or not be a file at all. The command comes first: it is neither kept from running nor ended because of its log.
"""

import errno
import io
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from typing import BinaryIO

from blockdiff.chain import temporary
from blockdiff.original.pipes import patiently
from blockdiff.shared import process
from blockdiff.shared.errors import BlockdiffError, ProcessError, StorageError, printable

_RULE = b"-" * 78
#: How much of what is to be mailed is kept in memory, in bytes, before it needs a temporary file.
_IN_MEMORY = 1 << 20
#: How long a log that is a pipe may accept nothing before it is given up, in seconds.
_PATIENCE_S = 10.0
#: What keeps a log from being opened, and is not a mistake of the user.
_NOT_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENXIO, errno.EAGAIN)
#: Names that are opened as our own stream, whatever that is.
_STREAMS = {"/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}


class _LogFile:
    """The log that is kept for later. After its first failure, `failure`, nothing more is written."""

    def __init__(self, path: str | None) -> None:
        self.failure: BlockdiffError | None = None
        self._path = path
        self._fd: int | None = None
        if path is None:
            return
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            self._fd = os.dup(_STREAMS[path]) if path in _STREAMS else os.open(path, flags, 0o666)
        except OSError as error:
            self.failure = StorageError(f"cannot open the log {printable(path)}: {error.strerror}")
            if error.errno not in _NOT_NOW:
                raise self.failure from error

    def write(self, data: bytes) -> None:
        """Append a line, by one write: two runs with one log do not mix their lines."""
        if self._fd is None:
            return
        view = memoryview(data)
        try:
            while view:
                write = partial(os.write, self._fd, view)
                view = view[patiently(write, writable=[self._fd], patience_s=_PATIENCE_S) :]
        except OSError as error:
            self.failure = StorageError(
                f"cannot write the log {printable(self._path or '')}: {error.strerror}",
                "what this run said from there on is not in it",
            )
            self.close()

    def is_standard_output(self) -> bool:
        """Whether the log is what standard output is: what goes there was printed."""
        try:
            return self._fd is not None and os.path.sameopenfile(self._fd, 1)
        except OSError:
            return False

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


class _Mail:
    """What may be mailed: in memory, and what is longer in a temporary file. `failure` says why its end is missing."""

    def __init__(self) -> None:
        self.failure: BlockdiffError | None = None
        self._file: io.BytesIO | temporary.UnnamedFile = io.BytesIO()

    def write(self, data: bytes) -> None:
        """Append `data`."""
        if self.failure is not None:
            return
        try:
            if isinstance(self._file, io.BytesIO) and self._file.tell() + len(data) > _IN_MEMORY:
                file = temporary.UnnamedFile()
                file.write(self._file.getvalue())
                self._file = file
            self._file.write(data)
        except BlockdiffError as error:
            self.failure = error

    def copy_to(self, output: BinaryIO) -> None:
        """Write everything to `output`."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, output)
        output.flush()

    def close(self) -> None:
        self._file.close()


class _Log:
    """The log of one run, in both places. `stamped` puts the time in front of each line."""

    def __init__(self, file: _LogFile, mail: _Mail, stamped: bool) -> None:
        self._file = file
        self._mail = mail
        self._stamped = stamped
        self._rest = bytearray()
        file.write(_RULE + b"\n")  # as with the original it has no time, and is not mailed

    def line(self, text: bytes) -> None:
        """Append a line."""
        stamp = datetime.now().strftime("[%a %b %e %H:%M:%S %Y] ").encode("ascii") if self._stamped else b""
        data = stamp + text + b"\n"
        self._mail.write(data)
        self._file.write(data)

    def write(self, data: bytes) -> None:
        """Append what the command said, line by line."""
        self._rest += data
        if b"\n" in data:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for text in lines:
                self.line(text)

    def end(self) -> None:
        """Append the last line of the command if it had no end."""
        if self._rest:
            self.write(b"\n")


def run_logged(
    command: Sequence[str],
    path: str | None,
    stamped: bool,
    print_always: bool,
    output: BinaryIO,
    warn: Callable[[BlockdiffError], None],
) -> int:
    """Run `command` to its end, append what it says to the log at `path`, and return its exit status.

    That is 128+N if signal N ended it. The command may take as long as it likes; what it leaves behind is not waited
    for. If it failed, or the log did, or always if asked to, this run's log goes to `output`, unless that is the
    log. Without `path` it is kept only for that. `warn` gets what could not be logged or kept. Raises `ProcessError`
    if the command cannot be started, and `StorageError`, before it is, if `path` cannot be that of a log.
    """
    with ExitStack() as stack:
        file, mail = _LogFile(path), _Mail()
        stack.callback(file.close)
        stack.callback(mail.close)
        is_printed = file.is_standard_output()
        status: int | None = None
        try:
            status = _run(command, _Log(file, mail, stamped))
        finally:
            if file.failure is not None:
                warn(file.failure)
            if (status != 0 or print_always or file.failure is not None) and not is_printed:
                mail.copy_to(output)
                if mail.failure is not None:
                    warn(mail.failure)
    return status


def _run(command: Sequence[str], log: _Log) -> int:
    log.line(os.fsencode(f"{socket.gethostname()} starting: {printable(' '.join(command), 4000)}"))

    def start() -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            log.line(os.fsencode(f"failed to execute {printable(command[0])}: {error.strerror}"))
            raise ProcessError(f"cannot run {printable(command[0])}: {error.strerror}", "is it on the PATH?") from error

    with process.started(start) as child:
        said = process.Output(child, log.write)
        while not said.wait(_PATIENCE_S):
            pass
        status = child.returncode
    log.end()
    if said.is_held:
        log.line(b"what the command left running still has its output open; it is no longer logged")
    if status < 0:
        log.line(b"command died with signal:%d" % -status)
        return 128 - status
    log.line(b"command exited with code:%d" % status)
    return status
