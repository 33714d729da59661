"""The exceptions of blockdiff, each with the exit status that a command then has.

Shipped to the host: standard library only, Python 3.6 or newer.

The message of an error names the thing and the place, in lower case; ``hint`` says what to do about it. Errors are sent
over the connection as data (`to_wire`, `from_wire`), so the agent's errors arrive at the server with their type.
"""

import errno
import os
from typing import Dict, Optional, Type

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_WARNING = 3
EXIT_BUSY = 4
EXIT_DAMAGED = 5

#: Longest message or hint that is accepted from the other side, in characters.
MESSAGE_LIMIT = 2000


def printable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return `text` in a form that is safe for a terminal: line ends and control characters become visible escapes.

    Text from a host is never trusted: a terminal escape in a file name or in a login banner must not reach the
    operator's terminal. At most `limit` characters are kept.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class BlockdiffError(Exception):
    """An error that ends the command: the message says what and where, `hint` says what to do."""

    exit_status = EXIT_FAILED

    def __init__(self, message: str, hint: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(BlockdiffError):
    """The command line asks for something impossible."""

    exit_status = EXIT_USAGE


class SourceError(BlockdiffError):
    """The source is missing, unsuitable or unreadable, or its size changed while it was read."""


class ProcessError(BlockdiffError):
    """A child process could not be started, failed, or missed its deadline."""


class ProtocolError(BlockdiffError):
    """The other side broke the protocol of the connection."""


class ConnectionLost(BlockdiffError):  # noqa: N818
    """The other side has ended, or is `silent`: it may still run, but nothing arrives."""

    def __init__(self, message: str, hint: Optional[str] = None, silent: bool = False) -> None:
        super().__init__(message, hint)
        self.silent = silent


class Interrupted(BaseException):  # noqa: N818
    """A signal asked the process to stop. The signal's handler raises this, wherever the main thread is at that moment.

    Like `KeyboardInterrupt` it is not an `Exception`: code that handles those, as the standard library does, must not
    mistake it for a failure of its own work. `number` is the number of the signal; the exit status is then the one that
    shells use for a command that this signal ended.
    """

    def __init__(self, message: str = "", number: int = 0) -> None:
        super().__init__(message)
        self.exit_status = 128 + number if number else EXIT_FAILED


class TransportError(BlockdiffError):
    """The connection to the host could not be made, or the agent could not be started there."""


class ChainError(BlockdiffError):
    """The chain, as it is, does not allow this operation."""


class BusyError(BlockdiffError):
    """Another run has locked the chain."""

    exit_status = EXIT_BUSY


class DamagedError(BlockdiffError):
    """Backup data is missing, or is not the data that was written."""

    exit_status = EXIT_DAMAGED


class TargetError(BlockdiffError):
    """The target of a restore must not be, or could not be, written."""


class StorageError(BlockdiffError):
    """The backup directory could not be read or written."""


class DatabaseError(BlockdiffError):
    """The database refused the login or the lock, or the lock was lost."""


def of_system(error: BaseException) -> Optional[BlockdiffError]:
    """Return an error to report for `error` if the system refused something or memory ran out; None for any other.

    This is the last resort, for errors that no other code has turned into one that names the place: the message has
    the path if the system gave one. Python reports a lack of memory in three ways: one for objects, one for system
    calls, and one for threads.
    """
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't start new thread" in str(error))
    ):
        return BlockdiffError(
            "there is not enough memory", "run fewer backups at the same time, or raise the limit (ulimit -v)"
        )
    if not isinstance(error, OSError):
        return None
    paths = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, (str, bytes))]
    reason = error.strerror or str(error) or type(error).__name__
    if not paths and isinstance(error, FileNotFoundError) and not _is_somewhere():
        return BlockdiffError("the current directory no longer exists", "change to one that exists")
    return BlockdiffError(
        "{}: {}".format(printable(" and ".join(paths)), reason) if paths else "the system refused: {}".format(reason),
        _SYSTEM_HINTS.get(error.errno or 0),
    )


def _is_somewhere() -> bool:
    """Return whether the current directory still exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


_SYSTEM_HINTS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "raise the quota",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has too many files open",
}


_BY_NAME: Dict[str, Type[BlockdiffError]] = {
    kind.__name__: kind for kind in (UsageError, SourceError, ProcessError, ProtocolError, ConnectionLost)
}


def to_wire(error: BlockdiffError) -> Dict[str, object]:
    """Return `error` as a JSON object for the other side."""
    return {"type": type(error).__name__, "message": error.message, "hint": error.hint}


def from_wire(fields: Dict[str, object], where: str) -> BlockdiffError:
    """Return the error that the other side sent, with `where` (the host) in front of its message.

    Unknown types become a plain `BlockdiffError`; text is made printable and cut to `MESSAGE_LIMIT`.
    """
    kind = _BY_NAME.get(str(fields.get("type")), BlockdiffError)
    hint = fields.get("hint")
    return kind(
        where + ": " + printable(str(fields.get("message"))), printable(hint) if isinstance(hint, str) else None
    )
