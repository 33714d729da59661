"""Run and stop child processes, always with a deadline, and through a shell only if the user gave a line for it.

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

#: How long a child that was asked to end may take before it is killed, in seconds.
STOP_TIMEOUT_S = 5.0
#: SIGKILL takes no time, unless a process is stuck in its disk: it is waited for no longer than this, in seconds.
_KILL_TIMEOUT_S = 30.0
#: How long a child that is never killed may take to end after each signal that asks it to, in seconds.
GENTLE_TIMEOUT_S = 10.0

#: Children that could be waited for no longer and cannot or must not be killed. While here, their pipes stay open.
LEFT_ALONE: "List[subprocess.Popen[bytes]]" = []

#: Pipes of children that have ended, held open by what they left behind.
_LEFT_OPEN: "List[IO[bytes]]" = []

#: How long the output of what a child left running is read, in seconds.
LINGER_S = 1.0
_CHUNK = 1 << 16
#: How often it is looked whether a command is to be stopped, in seconds.
_LOOK_S = 0.1


class Completed(NamedTuple):
    """What a child process printed, and how it ended: `returncode` is negative if it died of a signal."""

    stdout: bytes
    stderr: bytes
    returncode: int


class DeadlineError(ProcessError):
    """A child process was not done in time. `more` says that it is still there, if it is."""

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
    """What a child says on its pipes, taken until it has ended.

    It has ended when it has ended: what others, whom it started, still hold open then is read for a moment more, and
    left open for as long as we live, so that they are not ended for what they say. Standard output goes to `consume`,
    if it is given, as it comes.
    """

    def __init__(self, child: "subprocess.Popen[bytes]", consume: Optional[Callable[[bytes], object]] = None) -> None:
        self._child = child
        self._stdout: List[bytes] = []
        self._stderr: List[bytes] = []
        self._selector = selectors.PollSelector()
        self._until: Optional[float] = None
        #: How long what others hold open is read after the child's end, in seconds.
        self.linger_s = LINGER_S
        #: Whether others held it open.
        self.is_held = False
        takers = (consume or self._stdout.append, self._stderr.append if consume is None else self._keep_last)
        for pipe, take in zip((child.stdout, child.stderr), takers):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ, take)

    def wait(self, timeout_s: float) -> bool:
        """Take what comes until the child has ended, for `timeout_s` seconds at most; return whether it has."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended, now = self._child.poll() is not None, time.monotonic()
            if ended and self._until is None:
                self._until = now + self.linger_s
            if ended and not self._selector.get_map():
                return True
            if self._until is not None and now > self._until:
                for _ in ("what is there", "its end"):  # we may have been stopped, and not have looked since it ended
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
        """Keep the end of standard error beside a stream, whose length nobody knows."""
        self._stderr[:] = [(b"".join(self._stderr) + data)[-_CHUNK:]]

    def _let_be(self) -> None:
        self.is_held = True
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe is not None:
                _LEFT_OPEN.append(pipe)
        self._child.stdout = self._child.stderr = None

    def completed(self) -> Completed:
        """Return what was said, and how the child ended."""
        return Completed(b"".join(self._stdout), b"".join(self._stderr), self._child.returncode)


def run(
    arguments: Sequence[Argument],
    timeout_s: float,
    env: Optional[Dict[str, str]] = None,
    check: bool = True,
) -> Completed:
    """Run a command to its end and return what it printed.

    Raises `ProcessError` when it cannot be started, or fails (its last line of standard error is in the message; not
    without `check`), and `DeadlineError` when it is not done after `timeout_s` seconds; it is then stopped first.
    """
    with started(lambda: _start(arguments, env)) as child:
        output = Output(child)
        if not output.wait(timeout_s):
            raise DeadlineError(arguments, timeout_s)
    completed = output.completed()
    return checked(arguments, completed) if check else completed


def run_shell(command: str, timeout_s: float, held: Optional[int] = None) -> Completed:
    """Run a line for the shell like `run`, in its own session; what is not done in time is stopped as a whole.

    `held` is a descriptor that is open as long as the shell runs; what it leaves behind does not have it. A signal that
    ends the caller stops it as well, even one that comes while it is being started. What is another user's by now, as
    through sudo, we may not stop: it is waited for, however long, because nobody may continue as if it were done.
    """
    arguments = ["/bin/sh", "-c", command]
    # a shell around it has the descriptor; it does not put the command in its own place while it has more to do
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
                    output.linger_s = math.inf  # until what we could not stop lets go of it
        if stopped:
            raise DeadlineError(arguments, timeout_s)
        return output.completed()

    return checked(arguments, signals.undisturbed(work, lambda: cancelled.append(True)))


def checked(arguments: Sequence[Argument], completed: Completed) -> Completed:
    """Return `completed`; raises `ProcessError` with the last line of standard error unless its status is 0."""
    if completed.returncode != 0:
        lines: List[str] = completed.stderr.decode("utf-8", "replace").strip().splitlines()
        said = ": " + printable(lines[-1].strip(), 500) if lines else ""
        raise ProcessError("{} {}{}".format(shown(arguments), status_text(completed.returncode), said))
    return completed


def run_gently(
    arguments: Sequence[Argument], timeout_s: float, env: Optional[Dict[str, str]] = None, check: bool = True
) -> Completed:
    """Run a command that must not be killed in the middle of its work; otherwise like `run`.

    It has its own session: no signal to our process group or terminal reaches it. After `timeout_s` seconds it
    gets SIGINT (LVM then gives up waiting for a lock, and finishes what it began), `GENTLE_TIMEOUT_S` later SIGTERM,
    and after as long again it is left alone; `DeadlineError` says so. A signal that ends the caller does not end the
    command: see `signals.undisturbed`.
    """
    completed = signals.undisturbed(lambda: _run_gently(arguments, timeout_s, env))
    return checked(arguments, completed) if check else completed


def _run_gently(arguments: Sequence[Argument], timeout_s: float, env: Optional[Dict[str, str]]) -> Completed:
    # ignored signals stay ignored: SIGPIPE must not kill a child that is left alone when we end, and its pipes close
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
    """Run a command, give `consume` what it prints, as it comes, and return how it ended, without that.

    Raises `ProcessError` when it cannot be started, `DeadlineError` when it is not done after `timeout_s` seconds or as
    soon as `stopped()` is true, and what `consume` raises; it is then stopped first.
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
    """End a child: SIGTERM, then SIGKILL if `timeout_s` seconds did not do.

    It has ended then, unless it is another user's by now, as through sudo, or stuck in its disk.
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
    """End a child that has its own session, with all that it started, unless that has left the session.

    SIGTERM, then SIGKILL for what is still there after `STOP_TIMEOUT_S`. Returns False if some of it is another
    user's by now, as through sudo, and so still there.
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
        except OSError:  # nothing is there any more
            break
        if number == signal.SIGKILL:
            break
        child.poll()  # as long as nobody has waited for it, it is there
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
    """Yield the child that `start()` starts; in any case, `end` makes sure that it has ended, with its pipes.

    One that `end` cannot end is left alone, and keeps them.
    No signal's exception comes between the start of the child and our knowledge of it.
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
