"""Signals end a run, even those that Python loses."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from blockdiff.shared import signals
from blockdiff.shared.errors import Interrupted, ProcessError
from tests import processes

TIMEOUT_S = 30.0

BEGIN = """
import os, signal, time
from blockdiff.shared import signals
from blockdiff.shared.errors import Interrupted

def wait():
    time.sleep(600)

signals.unwind()
try:
"""

END = """
except Interrupted as error:
    os.kill(os.getpid(), signal.SIGINT)  # disturbs nobody any more
    print(error)
"""


def told(*lines: str, before: str = "") -> str:
    """Run lines under `signals.unwind`, and return what they print, or the signal that ended them."""
    body = "".join(f"    {line}\n" for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", before + BEGIN + body + END], capture_output=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stderr == b""
    return done.stdout.decode().strip()


def test_a_signal_unwinds_once() -> None:
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
        assert told(f"os.kill(os.getpid(), signal.{number.name})", "wait()") == f"stopped by {number.name}"


def test_a_signal_that_is_ignored_stays_so_but_sigterm() -> None:
    before = "import signal\nfor each in signal.SIGTERM, signal.SIGHUP: signal.signal(each, signal.SIG_IGN)\n"
    lines = "os.kill(os.getpid(), signal.SIGHUP)", "print('there')", "os.kill(os.getpid(), signal.SIGTERM)", "wait()"
    assert told(*lines, before=before) == "there\nstopped by SIGTERM"


def test_a_signal_that_the_wait_did_not_notice_is_sent_again() -> None:
    """Python hears of it and runs no handler: here only what wakes the thread that insists is written."""
    lines = "woken = signal.set_wakeup_fd(-1)", "signal.set_wakeup_fd(woken)", "os.write(woken, b'\\x0f')", "wait()"
    assert told(*lines) == "stopped by SIGTERM"


def test_a_signal_whose_exception_got_lost_in_a_destructor_is_sent_again() -> None:
    lines = (
        "signals.INSIST_S = 2",  # long enough for what comes before the second one
        "class Last:",
        "    def __del__(self):",
        "        os.kill(os.getpid(), signal.SIGTERM)",
        "        time.sleep(0)",
        "        print('not here')",
        "Last()",
        "print('lost')",
        "wait()",
    )
    assert told(*lines) == "lost\nstopped by SIGTERM"


def test_other_exceptions_in_destructors_are_reported_as_ever() -> None:
    script = (
        "from blockdiff.shared import signals\nclass Last:\n    def __del__(self): 1 / 0\nsignals.unwind()\nLast()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT_S, check=True)
    assert b"Exception ignored in" in done.stderr and b"ZeroDivisionError" in done.stderr


def test_ignored_signals_raise_nothing() -> None:
    assert told("signals.ignore()", "os.kill(os.getpid(), signal.SIGTERM)", "print('there')") == "there"


def test_a_signal_that_is_held_comes_once_what_was_begun_is_known() -> None:
    lines = (
        "with signals.held():",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    time.sleep(0)",
        "    print('known')",
        "print('not here')",
    )
    assert told(*lines) == "known\nstopped by SIGTERM"


def test_a_signal_that_is_ignored_or_comes_to_nobody_is_not_held() -> None:
    lines = (
        "signals.ignore()",
        "with signals.held(): os.kill(os.getpid(), signal.SIGTERM)",
        "print('ignored')",
    )
    assert told(*lines) == "ignored"


def test_in_another_thread_there_is_nothing_to_hold() -> None:
    lines = (
        "import threading",
        "def work():",
        "    with signals.held(): print('there')",
        "thread = threading.Thread(target=work)",
        "thread.start()",
        "thread.join()",
    )
    assert told(*lines) == "there"


def test_a_child_that_is_being_started_when_a_signal_comes_is_ended() -> None:
    """As Python itself does not: what is raised while it waits for the new program leaves the child alone."""
    lines = (
        "import subprocess",
        "from blockdiff.shared import process",
        "children = []",
        "def start():",
        "    children.append(subprocess.Popen(['sleep', '600']))",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    time.sleep(0)",
        "    return children[0]",
        "try:",
        "    with process.started(start): print('not here')",
        "finally: print(children[0].returncode)",
    )
    assert told(*lines) == "-15\nstopped by SIGTERM"


def test_whenever_a_signal_comes_undisturbed_work_is_done_or_was_not_begun() -> None:
    """Signals at 300 moments of a call of about half a millisecond."""
    armed: list[bool] = []

    def raise_it(_number: int, _frame: object) -> None:
        if armed:  # an interpreter with several threads may take a signal late, when its moment is over
            armed.clear()
            raise Interrupted("told to stop")

    interrupted = 0
    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        for moment in range(300):
            begun: list[int] = []
            done: list[int] = []

            def work(begun: list[int] = begun, done: list[int] = done) -> str:
                begun.append(1)
                time.sleep(0.0003)
                done.append(1)
                return "result"

            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, 0.00002 + moment * 0.000003)
                assert signals.undisturbed(work) == "result"
                armed.clear()
            except Interrupted:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert begun == done
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


def test_undisturbed_work_is_told_of_a_signal_and_waited_for() -> None:
    cancelled, ended = threading.Event(), threading.Event()

    def work() -> None:
        processes.interrupt_main_thread(signal.SIGUSR1)
        assert cancelled.wait(TIMEOUT_S)
        ended.set()

    with processes.interrupting(signal.SIGUSR1), pytest.raises(Interrupted):
        signals.undisturbed(work, cancelled.set)
    assert ended.is_set()


def test_what_undisturbed_work_raises_is_raised() -> None:
    def work() -> None:
        raise ProcessError("it failed", "a hint")

    with pytest.raises(ProcessError, match="it failed") as caught:
        signals.undisturbed(work)
    assert caught.value.hint == "a hint"
