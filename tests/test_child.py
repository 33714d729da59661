"""Connections that are child processes end, whatever the child does."""

import threading
import time

import pytest

from blockdiff import process
from blockdiff.errors import ConnectionLost
from blockdiff.transport.child import ChildConnection


def test_close_ends_although_a_grandchild_holds_the_pipe_of_a_stuck_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.2)
    connection = ChildConnection(["sh", "-c", "sleep 3; :"], "host")
    begun = threading.Event()

    def write() -> None:
        begun.set()
        try:
            connection.write([bytes(8 << 20)])
        except ConnectionLost:
            pass

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert begun.wait(10)
    start = time.monotonic()
    connection.close()
    assert time.monotonic() - start < 2.5 and thread.is_alive()
    assert connection.wait(0) is not None
    thread.join(30)  # the grandchild ends, and the write fails
    connection.close()
