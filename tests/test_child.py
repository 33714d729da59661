"""Connections that are child processes end, whatever the child does."""

import os
import signal
import threading
import time

import pytest

from blockdiff.shared import process
from blockdiff.shared.errors import ConnectionLost
from blockdiff.transport.advice import Place
from blockdiff.transport.child import PIPE_SIZE, ChildConnection

#: Leaves a grandchild that holds our pipe and never reads from it, and tells its pid.
HOLDS_THE_PIPE = "exec 3<&0; sleep 600 <&3 & echo $!; wait"


def test_close_ends_although_a_grandchild_holds_the_pipe_of_a_stuck_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.2)
    lost = threading.Event()
    connection = ChildConnection(["sh", "-c", HOLDS_THE_PIPE], Place("host", "host"))
    with connection:
        told = bytearray()
        while not told.endswith(b"\n"):
            piece = bytearray(16)
            told += piece[: connection.readinto(memoryview(piece), 10)]

        def write() -> None:
            try:
                connection.write([bytes(8 * PIPE_SIZE)])
            except ConnectionLost:
                lost.set()

        threading.Thread(target=write, daemon=True).start()
        deadline = time.monotonic() + 10
        while not connection._write_lock.locked() and time.monotonic() < deadline:
            time.sleep(0.01)
        connection.close()
        assert not lost.is_set(), "the write was not stuck"
        assert connection.wait(0) is not None
        os.kill(int(told), signal.SIGKILL)
        assert lost.wait(30), "the grandchild is gone, the write must fail"


@pytest.mark.parametrize("said", ["", "word"])
def test_a_command_has_ended_when_it_has_ended(said: str) -> None:
    """What it has left behind holds its pipe, and says nothing."""
    with ChildConnection(["sh", "-c", f"sleep 600 & echo $!; printf '{said}'"], Place("host", "host")) as connection:
        told = bytearray()
        while True:
            piece = bytearray(16)
            count = connection.readinto(memoryview(piece), 300)
            if count == 0:
                break
            told += piece[:count]
        pid, _, rest = told.decode().partition("\n")
        assert rest == said
        os.kill(int(pid), 0)  # it was let be
        os.kill(int(pid), signal.SIGKILL)


def test_what_a_command_has_left_behind_may_speak_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LINGER_S", 60.0)
    with ChildConnection(["sh", "-c", "(sleep 0.3; echo late) & exit 0"], Place("host", "host")) as connection:
        assert connection.wait(30) is not None
        piece = bytearray(16)
        assert connection.readinto(memoryview(piece), 300) == 5 and bytes(piece[:5]) == b"late\n"
        assert connection.readinto(memoryview(piece), 300) == 0
