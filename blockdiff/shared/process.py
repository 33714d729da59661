"""Run and stop child processes, always with a deadline, and through a shell only for a command line of the user's.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import math
import os
import selectors
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import IO, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

from blockdiff.shared import signals, trace
from blockdiff.shared.errors import ProcessError, printable

Argument = Union[str, bytes]

#: How long a child may take to end, after it was asked to, before it is killed, in seconds.
STOP_TIMEOUT_S = 5.0
#: How long to wait for a killed child, in seconds. It ends at once, unless it is stuck in a read or write of a disk.
_KILL_TIMEOUT_S = 30.0
#: How long a child that is never killed may take to end after each signal that asks it to, in seconds.
GENTLE_TIMEOUT_S = 10.0

#: Children that we no longer wait for, and that cannot or must not be killed. The list keeps their pipes open.
LEFT_ALONE: "List[subprocess.Popen[bytes]]" = []

#: Pipes of children that have ended. We keep them open because processes that the children left running use them.
_LEFT_OPEN: "List[IO[bytes]]" = []

#: How long to read, after a child's end, the output of the processes that it left running, in seconds.
LINGER_S = 1.0
_CHUNK = 1 << 16
#: How often to check whether a command is to be stopped, in seconds.
_LOOK_S = 0.1


class Completed(NamedTuple):
    """What a child process printed, and how it ended: `returncode` is negative if it died of a signal."""

    stdout: bytes
    stderr: bytes
    returncode: int


class DeadlineError(ProcessError):
    """A child process did not end in time. `more` says so if it is still running."""

    def __init__(self, arguments: Sequence[Argument], timeout_s: float, more: str = "") -> None:
        super().__init__("{} did not end within {:g} s{}".format(shown(arguments), timeout_s, more))
        self.more = more


def shown(arguments: Sequence[Argument]) -> str:
    """Return a command line for a message."""
    words = [word.decode("utf-8", "replace") if isinstance(word, bytes) else word for word in arguments]
    return printable(" ".join(words), 300)


def status_text(returncode: int) -> str:
    """Return how a process ended, in words: ``exited with status 3`` or ``died of signal 9 (SIGKILL)``."""
    if returncode >= 0:
        return "exited with status {}".format(returncode)
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "unknown"
    return "died of signal {} ({})".format(-returncode, name)


class Output:
    """What a child writes to its pipes, read until the child has ended.

    Only the child's own end counts. Processes that it started may keep its pipes open: the pipes are then read for
    `linger_s` more, and stay open until we end, because a write to a closed pipe would kill those processes. Standard
    output goes to `consume`, if given, as it arrives.
    """

    def __init__(self, child: "subprocess.Popen[bytes]", consume: Optional[Callable[[bytes], object]] = None) -> None:
        self._child = child
        self._stdout: List[bytes] = []
        self._stderr: List[bytes] = []
        self._selector = selectors.PollSelector()
        self._until: Optional[float] = None
        #: How long to read pipes that others keep open after the child's end, in seconds.
        self.linger_s = LINGER_S
        #: Whether others kept the pipes open.
        self.is_held = False
        takers = (consume or self._stdout.append, self._stderr.append if consume is None else self._keep_last)
        for pipe, take in zip((child.stdout, child.stderr), takers):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ, take)

    def wait(self, timeout_s: float) -> bool:
        """Read until the child has ended, for `timeout_s` seconds at most; return whether it has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended, now = self._child.poll() is not None, time.monotonic()
            if ended and self._until is None:
                self._until = now + self.linger_s
            if ended and not self._selector.get_map():
                return True
            if self._until is not None and now > self._until:
                for _ in ("what is there", "its end"):  # we may have been suspended, and not have read since then
                    self._collect(0.0)
                if self._selector.get_map():
                    self._let_be()
                return True
            if now > deadline:
                return False
            self._collect(min(_LOOK_S, max(0.0, deadline - now)))

    def _collect(self, timeout_s: float) -> None:
        if not self._selector.get_map():
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
        for key, _ in self._selector.select(timeout_s) if self._selector.get_map() else ():
            data = os.read(key.fd, _CHUNK)
            if data:
                key.data(data)
            else:
                self._selector.unregister(key.fileobj)

    def _keep_last(self, data: bytes) -> None:
        """Keep only the end of standard error if standard output is streamed: it may be of any length."""
        self._stderr[:] = [(b"".join(self._stderr) + data)[-_CHUNK:]]

    def _let_be(self) -> None:
        self.is_held = True
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe is not None:
                _LEFT_OPEN.append(pipe)
        self._child.stdout = self._child.stderr = None

    def completed(self) -> Completed:
        """Return what the child printed, and how it ended."""
        return Completed(b"".join(self._stdout), b"".join(self._stderr), self._child.returncode)


def run(
    arguments: Sequence[Argument],
    timeout_s: float,
    env: Optional[Dict[str, str]] = None,
    check: bool = True,
) -> Completed:
    """Run a command to its end and return what it printed.

    Raises `ProcessError` if it cannot be started, or if it fails and `check` is true; the message then has its last
    line of standard error. Raises `DeadlineError` if it has not ended after `timeout_s` seconds; it is stopped first.
    """
    with started(lambda: _start(arguments, env)) as child:
        output = Output(child)
        if not output.wait(timeout_s):
            raise DeadlineError(arguments, timeout_s)
    completed = output.completed()
    return checked(arguments, completed) if check else completed


def run_shell(command: str, timeout_s: float, held: Optional[int] = None) -> Completed:
    """Run a shell command line like `run`, in its own session; if it is not done in time, the session is stopped.

    `held` is a descriptor that stays open as long as the shell runs; processes that the command leaves running do not
    have it. A signal that ends the caller also stops the command, even a signal that arrives while it is being
    started. We may not stop processes that now belong to another user, as through sudo: we wait for them without a
    limit, because the caller must not continue as if they were done.
    """
    arguments = ["/bin/sh", "-c", command]
    # an outer shell has the descriptor; the `exit` after the command keeps it from replacing itself by the command
    around = arguments if held is None else ["/bin/sh", "-c", '/bin/sh -c "$1" </dev/null; exit "$?"', "sh", command]
    stdin = subprocess.DEVNULL if held is None else held
    cancelled: List[bool] = []

    def work() -> Completed:
        deadline = time.monotonic() + timeout_s
        stopped = False
        with started(lambda: _start(around, None, start_new_session=True, stdin=stdin), stop_session) as child:
            output = Output(child)
            while not output.wait(_LOOK_S):
                if not stopped and (cancelled or time.monotonic() > deadline):
                    stopped = True
                    if stop_session(child):
                        break
                    output.linger_s = math.inf  # until the processes that we could not stop close the pipes
        if stopped:
            raise DeadlineError(arguments, timeout_s)
        return output.completed()

    return checked(arguments, signals.undisturbed(work, lambda: cancelled.append(True)))


def checked(arguments: Sequence[Argument], completed: Completed) -> Completed:
    """Return `completed`; raises `ProcessError` with the last line of standard error unless the status is 0."""
    if completed.returncode != 0:
        lines: List[str] = completed.stderr.decode("utf-8", "replace").strip().splitlines()
        said = ": " + printable(lines[-1].strip(), 500) if lines else ""
        raise ProcessError("{} {}{}".format(shown(arguments), status_text(completed.returncode), said))
    return completed


def run_gently(
    arguments: Sequence[Argument], timeout_s: float, env: Optional[Dict[str, str]] = None, check: bool = True
) -> Completed:
    """Run a command that must not be killed in the middle of its work; otherwise like `run`.

    It has its own session: no signal to our process group or terminal reaches it. After `timeout_s` seconds it gets
    SIGINT (LVM then stops waiting for a lock, and finishes what it has begun). `GENTLE_TIMEOUT_S` later it gets
    SIGTERM, and after the same time again it is left alone; `DeadlineError` says so. A signal that ends the caller does
    not end the command: see `signals.undisturbed`.
    """
    completed = signals.undisturbed(lambda: _run_gently(arguments, timeout_s, env))
    return checked(arguments, completed) if check else completed


def _run_gently(arguments: Sequence[Argument], timeout_s: float, env: Optional[Dict[str, str]]) -> Completed:
    # ignored signals stay ignored: when we end, the pipes of a child that is left alone close; SIGPIPE must not kill it
    child = _start(arguments, env, start_new_session=True, restore_signals=False)
    trace.child_began(child)
    output, late = Output(child), False
    for patience_s, number in (
        (timeout_s, signal.SIGINT),
        (GENTLE_TIMEOUT_S, signal.SIGTERM),
        (GENTLE_TIMEOUT_S, None),
    ):
        if output.wait(patience_s):
            _close_pipes(child)
            trace.child_ended(child)
            if late and child.returncode != 0:
                raise DeadlineError(arguments, timeout_s)
            return output.completed()
        late = True
        if number is not None:
            child.send_signal(number)
    LEFT_ALONE.append(child)
    trace.child_ended(child)
    raise DeadlineError(arguments, timeout_s, ", and process {} is still running".format(child.pid))


def feed(
    arguments: Sequence[Argument],
    timeout_s: float,
    consume: Callable[[bytes], None],
    stopped: Callable[[], bool],
    env: Optional[Dict[str, str]] = None,
) -> Completed:
    """Run a command, pass its standard output to `consume` as it arrives, and return how it ended.

    Raises `ProcessError` if it cannot be started, and `DeadlineError` if it has not ended after `timeout_s` seconds or
    as soon as `stopped()` is true. Exceptions of `consume` are raised, too. The command is stopped first.
    """
    deadline = time.monotonic() + timeout_s
    with started(lambda: _start(arguments, env)) as child:
        output = Output(child, consume)
        while not output.wait(_LOOK_S):
            if stopped() or time.monotonic() > deadline:
                raise DeadlineError(arguments, timeout_s)
    return output.completed()


def _start(
    arguments: Sequence[Argument],
    env: Optional[Dict[str, str]],
    start_new_session: bool = False,
    restore_signals: bool = True,
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            list(arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=start_new_session,
            restore_signals=restore_signals,
        )
    except OSError as error:
        raise ProcessError("cannot start {}: {}".format(shown(arguments), error.strerror or error)) from error


def stop(child: "subprocess.Popen[bytes]", timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a child: SIGTERM, then SIGKILL if it has not ended after `timeout_s` seconds.

    Afterwards it has ended, unless it now belongs to another user, as through sudo, or is stuck in a read or write of a
    disk.
    """
    for end, patience_s in ((child.terminate, timeout_s), (child.kill, _KILL_TIMEOUT_S)):
        if child.poll() is not None:
            return
        try:
            end()
            child.wait(timeout=patience_s)
        except PermissionError:
            return
        except subprocess.TimeoutExpired:
            pass


def stop_session(child: "subprocess.Popen[bytes]") -> bool:
    """End a child that has its own session, and the processes that it started, unless these have left the session.

    They get SIGTERM, and those that still run after `STOP_TIMEOUT_S` get SIGKILL. Returns False if we have no
    permission, because they now belong to another user, as through sudo: then they may still run.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    number: int = signal.SIGTERM
    patience_s, permitted = _KILL_TIMEOUT_S, True
    while True:
        try:
            os.killpg(child.pid, number)
        except PermissionError:
            patience_s, permitted = STOP_TIMEOUT_S, False
            break
        except OSError:  # no process is left
            break
        if number == signal.SIGKILL:
            break
        child.poll()  # until it is waited for, it counts as a process of the group
        time.sleep(0.01)
        number = signal.SIGKILL if time.monotonic() > deadline else 0
    try:
        child.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        pass
    return permitted


@contextmanager
def started(
    start: Callable[[], "subprocess.Popen[bytes]"], end: Callable[["subprocess.Popen[bytes]"], object] = stop
) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield the child that `start()` starts; at the end, `end` ends it in any case, and its pipes are closed.

    A child that `end` cannot end is left alone, and its pipes stay open. No signal's exception is raised between the
    start of the child and the moment when we know about it.
    """
    child = None
    try:
        with signals.held():
            child = start()
        trace.child_began(child)
        yield child
    finally:
        if child is not None:
            if child.poll() is None:
                end(child)
            if child.poll() is None:
                LEFT_ALONE.append(child)
            else:
                _close_pipes(child)
            trace.child_ended(child)


def _close_pipes(child: "subprocess.Popen[bytes]") -> None:
    """Close our ends of the pipes of a child that has ended."""
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
