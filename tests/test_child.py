"""Connections that are child processes end, whatever the child does."""

import os
import signal
import threading
import time

import pytest

from blockdiff import process
from blockdiff.errors import ConnectionLost
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
