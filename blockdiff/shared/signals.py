"""The signals that end a run: the main thread unwinds once, and nothing more disturbs its clean-up.

**What we want.** SIGTERM, SIGHUP or SIGINT ends a run wherever it is: in a read of a disk that hangs, in a wait for the
lock of a database, inside a library. Then its clean-up runs to the end: children end, snapshots are removed, the host
is thawed, the files of an unfinished generation are removed. And a process that was asked to end does end.

**What we do.** The handler raises `Interrupted` in the main thread, at whatever bytecode that is, and from then on all
signals are ignored. So no clean-up needs protection. What needs it is the moment between doing something and knowing
that it was done:

| if you | use | because |
| --- | --- | --- |
| start a child | `process.started`, `process.run` | an exception while `Popen` waits for exec(2) leaves a child alone |
| make something that must be undone | `held` around the making and the noting | else it is made, and nobody knows |
| run a command that must not be killed (LVM's) | `process.run_gently` | it has its own session and its own thread |
| call what must not be cut short (a library's locks) | `undisturbed` | no handler runs in its thread |
| need threads | `pipeline` | the Python code of `threading` may raise just after it took a lock |
| write what can be undone twice | nothing | do that: `commit` looks at what is there |
| write a clean-up, or code of another thread | nothing | nothing is raised there |

**Why not a flag,** which the handler sets, and which is looked at where the program waits, as trio does? Python begins
a system call again that a signal cut short, unless the handler raises (PEP 475). So each wait has to be known, and has
to end when it is asked to. Server and agent have about 120: pipes, sockets, locks and children, but also opening a
FIFO, writing to a terminal that is stopped, looking up a name, and all that PyMySQL and paramiko do inside. If one is
forgotten, the process does not end, and no test can list what was forgotten. If a protection is forgotten here,
something is left if a signal comes within the same microsecond; the tests raise at every bytecode of the places that
matter. We prefer the second mistake.

**What can still fail.** Python can lose the exception: in a destructor, in a callback, or if the signal comes just
before a system call, which then waits. So the signal is sent again until the exception has arrived. A signal just
before `--before` starts runs `--after` as well, once too often. Code that catches `BaseException` must
raise it again.

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

    A signal that is ignored already, as by nohup(1), stays ignored, except SIGTERM. Once it was raised, all are
    ignored.

    Python can lose a signal, which must not end in a wait without limit: one that comes just before a system call does
    not end it, and what is raised in a destructor or a callback is only reported (since 3.8 to a hook). So it is sent
    again until `Interrupted` is raised, and again when that was lost.
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
    """Let nothing raise `Interrupted` any more."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Let the signals in `ENDING` come after the `with` statement, which must be short.

    So a child can be started that is known before anything is raised. Signals that are ignored stay so; in a thread
    other than the main thread, where none raises anything, there is nothing to do.
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
    """Do `work` in a thread, where no signal handler can cut it short, and return or raise what it does.

    If a signal's exception arises in the caller in that time, `cancel` (if any) is called, `work` is waited for, and
    only then does the exception continue. `work` must have its own deadline.
    """
    results: List[T] = []
    errors: List[BaseException] = []
    allowed: List[bool] = []
    # nothing of `threading`: an exception in its Python code can leave a lock taken, or get lost in a callback
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
            gate.release()  # the thread may still stand at it
        if cancel is not None:
            cancel()
        while allowed and not results and not errors:
            finished.acquire(timeout=0.1)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _insist() -> None:
    """Start a thread that sends the first signal that comes again, for as long as it is not ignored."""
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
