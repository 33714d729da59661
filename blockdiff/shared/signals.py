"""The signals that end a run: the main thread unwinds once, and no further signal disturbs its clean-up.

**What we want.** SIGTERM, SIGHUP or SIGINT ends a run wherever it is: in a read of a disk that hangs, in a wait for the
lock of a database, inside a library. Then its clean-up runs to the end: children end, snapshots are removed, the host
is thawed, the files of an unfinished generation are removed. A process that was asked to end does end.

**What we do.** The handler raises `Interrupted` in the main thread, at any bytecode, and from then on these signals are
ignored. So no clean-up needs protection. Only the moment between an action and the note that it was done needs it:

| if you | use | because |
| --- | --- | --- |
| start a child | `process.started`, `process.run` | an exception inside `Popen` may leave the child running |
| make something that must be undone | `held` around making and noting it | otherwise it may exist without a note |
| run a command that must not be killed (LVM's) | `process.run_gently` | it has its own session and its own thread |
| call what must not be interrupted (a library's locks) | `undisturbed` | no handler runs in its thread |
| need threads | `pipeline` | the Python code of `threading` may raise just after it took a lock |
| write code that can safely be undone twice | nothing | prefer this: `commit` checks which files exist |
| write a clean-up, or code of another thread | nothing | nothing is raised there |

**Why not a flag,** which the handler sets, and which the program checks where it waits, as trio does? If a signal
interrupts a system call, Python begins the call again, unless the handler raises (PEP 475). So we would have to know
each wait, and be able to end it. Server and agent have about 120: pipes, sockets, locks and children, but also opening
a FIFO, writing to a terminal that is stopped, looking up a name, and all waits inside PyMySQL and paramiko. If we
forgot one, the process would not end, and no test can list what was forgotten. If we forget a protection here,
something is left only if a signal arrives within the same microsecond; the tests raise at every bytecode of the places
that matter. We prefer the second mistake.

**What can still fail.** Python can lose the exception in a destructor or in a callback. If the signal arrives just
before a system call, Python begins that call first, and it may wait. So the signal is sent again until the exception
has arrived. If a signal arrives just before `--before` starts, `--after` runs although it was not needed. Code that
catches `BaseException` must raise it again.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import _thread
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator, List, Optional, TypeVar

from blockdiff.shared.errors import Interrupted

T = TypeVar("T")

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

#: How often a signal is sent again until the main thread has noticed it, in seconds.
INSIST_S = 0.2


def unwind() -> None:
    """Let the signals in `ENDING` raise `Interrupted`; to be called once, in the main thread.

    A signal that is ignored already, as by nohup(1), stays ignored, except SIGTERM. After `Interrupted` was raised, all
    are ignored.

    Python can lose a signal, and the run must not wait without limit because of that: a signal that arrives just before
    a system call does not end the call, and an exception in a destructor or a callback is only reported (since 3.8 to a
    hook). So the signal is sent again until `Interrupted` is raised, and again if that exception was lost.
    """
    caught = [each for each in ENDING if each == signal.SIGTERM or signal.getsignal(each) != signal.SIG_IGN]

    def interrupt(number: int, _frame: object) -> None:
        ignore()
        raise Interrupted("stopped by {}".format(signal.Signals(number).name), number)

    def arm() -> None:
        for number in caught:
            signal.signal(number, interrupt)

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            arm()
        else:
            sys.__unraisablehook__(unraisable)

    if hasattr(sys, "unraisablehook"):
        sys.unraisablehook = report
    _insist()
    arm()


def ignore() -> None:
    """Ignore the signals in `ENDING` from now on, so that `Interrupted` is not raised any more."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Delay the signals in `ENDING` until after the `with` statement, which must be short.

    For example, a child is started and noted before anything is raised. Signals that are ignored stay ignored. In a
    thread other than the main thread there is nothing to do: no signal raises anything there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: List[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    if came:
        signal.pthread_kill(threading.get_ident(), came[0])


def undisturbed(work: Callable[[], T], cancel: Optional[Callable[[], None]] = None) -> T:
    """Do `work` in a thread, where no signal handler can interrupt it, and return its result or raise its exception.

    If a signal's exception is raised in the caller while `work` runs, this calls `cancel` (if given), waits for `work`,
    and only then lets the exception continue. `work` must have its own deadline.
    """
    results: List[T] = []
    errors: List[BaseException] = []
    allowed: List[bool] = []
    # `threading` is not used: an exception in its Python code can leave a lock taken, or get lost in a callback
    gate, finished = _thread.allocate_lock(), _thread.allocate_lock()
    gate.acquire()
    finished.acquire()

    def run_it() -> None:
        gate.acquire()
        if not allowed:
            return
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below, in the thread that asked for it
            errors.append(error)
        finished.release()

    try:
        _thread.start_new_thread(run_it, ())
        allowed.append(True)
        gate.release()
        finished.acquire()
    except BaseException:
        if gate.locked():
            gate.release()  # the thread may still wait for it
        if cancel is not None:
            cancel()
        while allowed and not results and not errors:
            finished.acquire(timeout=0.1)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _insist() -> None:
    """Start a thread that sends the first signal that arrives again and again, as long as it is not ignored."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)

    def nudge() -> None:
        number = os.read(woken, 1)[0]
        main = threading.main_thread().ident
        while main is not None:
            time.sleep(INSIST_S)
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.pthread_kill(main, number)

    threading.Thread(target=nudge, name="insist", daemon=True).start()
