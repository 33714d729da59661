"""The signals that end a run: the main thread unwinds once, and nothing more disturbs its clean-up.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import Iterator, List

from blockdiff.shared.errors import Interrupted

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

#: How often a signal is sent again until the main thread has noticed it, in seconds.
INSIST_S = 0.2


def unwind() -> None:
    """Let the signals in `ENDING` raise `Interrupted`; to be called once, in the main thread.

    nohup(1) and shells have their way: what is ignored already stays so, but for SIGTERM. Once it was raised, all are
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
