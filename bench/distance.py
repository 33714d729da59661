"""A long way between two ends of loopback: a relay whose bytes arrive late, however many are under way."""

import queue
import socket
import threading
import time
from contextlib import ExitStack, suppress

_CHUNK = 256 << 10


class Distance:
    """Passes connections to `port` of 127.0.0.1 on, from a `port` of its own, each way `delay_s` late.

    Nothing but the delay is simulated: no limit of bandwidth, no losses. A context manager.
    """

    def __init__(self, port: int, delay_s: float) -> None:
        self._target = port
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = ExitStack()

    def __enter__(self) -> "Distance":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()
        self._sockets.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                near = self._sockets.enter_context(self._listener.accept()[0])
                far = self._sockets.enter_context(socket.create_connection(("127.0.0.1", self._target)))
                for source, sink in ((near, far), (far, near)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(source, under_way), daemon=True).start()
                    threading.Thread(target=self._hand_on, args=(under_way, sink), daemon=True).start()

    def _take(self, source: socket.socket, under_way: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + self._delay_s, data))

    @staticmethod
    def _hand_on(under_way: "queue.SimpleQueue[tuple[float, bytes]]", sink: socket.socket) -> None:
        with suppress(OSError):  # the other end has gone
            while True:
                due, data = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
