"""Run the user's commands before and after the moment of a run: one stops writers, the other lets them continue.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import subprocess
from typing import List, Optional

from blockdiff.shared import process, signals, trace
from blockdiff.shared.errors import BlockdiffError, ProcessError, SourceError, printable

#: How long each of the two commands may take, in seconds.
COMMAND_TIMEOUT_S = 60.0

#: A shell that reads its standard input. If the agent dies before it has written "done", the shell runs the second
#: command.
_GUARD = 'read -r word; [ "$word" = done ] || exec /bin/sh -c "$1"'


class Freeze:
    """Runs `before` on entry and `after` on exit, through the shell; None for either means that nothing is run.

    If `before` was started, `after` runs in any case: no signal interrupts it, and if the agent is killed, a small
    process that waits for this (the guard) runs it. Raises `SourceError` if a command fails or is not done in time. If
    another error is already being raised, that error continues, and its hint mentions the failed command.
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
        """Run `after`; if it fails, add that to the hint of `error`, if there is one."""
        try:
            signals.undisturbed(self._thaw)
        except SourceError as failure:
            if not isinstance(error, BlockdiffError):
                raise
            error.hint = "; ".join(part for part in (error.hint, failure.message) if part)

    def _held_open(self) -> Optional[int]:
        """Return the descriptor that `before` keeps open, or None: the guard's standard input.

        So if the agent dies, the guard waits until `before` has ended, and runs `after` only then. Otherwise `before`
        could stop the writers after `after` had run, and they would never continue.
        """
        return None if self._guard is None or self._guard.stdin is None else self._guard.stdin.fileno()

    def _thaw(self) -> None:
        if self._after is None or self._guard is None:
            return
        guard, self._guard = self._guard, None
        try:
            _run("--after", self._after)
        finally:
            # tried once, as the guard would: a second try within a second would fail, too
            _dismiss(guard)


def _run(option: str, command: str, held_open: Optional[int] = None) -> None:
    try:
        process.run_shell(command, COMMAND_TIMEOUT_S, held_open)
    except ProcessError as error:
        raise SourceError(
            "the command of {} failed: {}".format(option, error.message), "run it by hand on the host to see why"
        ) from error


def _start_guard(after: str) -> "subprocess.Popen[bytes]":
    """Start the guard in its own session: a signal to the agent's process group must not end it."""
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
