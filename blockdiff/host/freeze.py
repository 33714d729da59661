"""Run the user's commands around the moment of a run: one that stops writers, one that lets them continue.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import subprocess
from typing import List, Optional

from blockdiff.shared import process, signals, trace
from blockdiff.shared.errors import BlockdiffError, ProcessError, SourceError, printable

#: How long each of the two commands may take, in seconds.
COMMAND_TIMEOUT_S = 60.0

#: A shell that waits on its standard input and runs the second command itself if the agent dies before it says so.
_GUARD = 'read -r word; [ "$word" = done ] || exec /bin/sh -c "$1"'


class Freeze:
    """Runs `before` on entry and `after` on exit, through the shell; None for either means nothing to run.

    `after` runs once `before` was started, whatever happens: no signal cuts it short, and if the agent is killed, a
    small process that waits beside it does so. Raises `SourceError` if a command fails or is not done in time; if
    something else has failed before, that continues, and its hint mentions this.
    """

    def __init__(self, before: Optional[str], after: Optional[str]) -> None:
        self._before = before
        self._after = after
        self._guard: "Optional[subprocess.Popen[bytes]]" = None

    def __enter__(self) -> "Freeze":
        begun = False
        try:
            if self._after is not None:
                with signals.held():
                    self._guard = _start_guard(self._after)
            begun = True
            if self._before is not None:
                _run("--before", self._before, self._held_open())
        except BaseException as error:
            if begun:
                self._end(error)
            elif self._guard is not None:
                _dismiss(self._guard)
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._end(error)

    def _end(self, error: object) -> None:
        """Let the host continue; what fails then is added to the error that there is already."""
        try:
            signals.undisturbed(self._thaw)
        except SourceError as failure:
            if not isinstance(error, BlockdiffError):
                raise
            error.hint = "; ".join(part for part in (error.hint, failure.message) if part)

    def _held_open(self) -> Optional[int]:
        """Return what `before` keeps open, so that the guard waits for its end: to let go before is to let go never."""
        return None if self._guard is None or self._guard.stdin is None else self._guard.stdin.fileno()

    def _thaw(self) -> None:
        if self._after is None or self._guard is None:
            return
        guard, self._guard = self._guard, None
        try:
            _run("--after", self._after)
        finally:
            # tried once, as it would be by the guard: what fails twice within a second helps nobody
            _dismiss(guard)


def _run(option: str, command: str, held_open: Optional[int] = None) -> None:
    try:
        process.run_shell(command, COMMAND_TIMEOUT_S, held_open)
    except ProcessError as error:
        raise SourceError(
            "the command of {} failed: {}".format(option, error.message), "run it by hand on the host to see why"
        ) from error


def _start_guard(after: str) -> "subprocess.Popen[bytes]":
    """Start the guard in its own session: what is sent to the agent's process group must not end it."""
    arguments: List[str] = ["/bin/sh", "-c", _GUARD, "blockdiff-guard", after]
    try:
        guard = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise SourceError("cannot start /bin/sh: {}".format(printable(str(error)))) from error
    trace.child_began(guard)
    return guard


def _dismiss(guard: "subprocess.Popen[bytes]") -> None:
    try:
        guard.communicate(b"done\n", timeout=process.STOP_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        process.stop(guard)
    trace.child_ended(guard)
