"""Find processes by a mark in their environment, which all processes that they start inherit."""

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blockdiff.shared.errors import Interrupted

if TYPE_CHECKING:
    import pytest  # the demo, which uses this module, needs no test tools


def new_mark() -> str:
    """Return a variable for the environment of a process, as ``NAME=value``."""
    return f"BLOCKDIFF_TEST_{secrets.token_hex(8)}=1"


def environment(mark: str) -> dict[str, str]:
    """Return the mark as a dictionary to add to an environment."""
    name, _, value = mark.partition("=")
    return {name: value}


def marked(mark: str) -> dict[int, str]:
    """Return the pids of the processes with the mark, with their command lines."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if mark.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found[int(name)] = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            pass  # the process has ended, or is a zombie or another user's
    return found


def wait_until_gone(mark: str, timeout_s: float = 20.0) -> None:
    """Wait until no process has the mark; fails after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while left := marked(mark):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.01)


@contextmanager
def leaving_none(monkeypatch: "pytest.MonkeyPatch") -> Iterator[str]:
    """Mark all processes that the test starts, and check that they end with the test; yields the mark."""
    mark = new_mark()
    for name, value in environment(mark).items():
        monkeypatch.setenv(name, value)
    try:
        yield mark
        wait_until_gone(mark)
    finally:
        end(mark)


@contextmanager
def interrupting(number: int) -> Iterator[None]:
    """Let a signal raise `Interrupted` in the main thread, once, as `blockdiff.shared.signals` does."""

    def handler(_number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted("told to stop")

    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupt_main_thread(number: int, timeout_s: float = 20.0) -> None:
    """Send the signal to this process until its handler has run; the handler then lets the signal be ignored.

    One signal may not be enough: if it comes just before a system call, it does not interrupt the call.
    """
    deadline = time.monotonic() + timeout_s
    while signal.getsignal(number) != signal.SIG_IGN:
        assert time.monotonic() < deadline, "the signal was not taken"
        os.kill(os.getpid(), number)
        time.sleep(0.02)


def peak_rss(pid: int) -> int:
    """Return the most memory that a running process has used so far, in bytes; 0 if it has ended."""
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")]
    return sizes[0] if sizes else 0


def end(mark: str) -> None:
    """Kill all processes that still have the mark."""
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    wait_until_gone(mark)
