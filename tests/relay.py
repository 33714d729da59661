"""A TCP relay on loopback, which can cut its connections or stop passing bytes."""

import select
import socket
import threading
from collections.abc import Callable

#: What `Relay.act` does: close both sockets, or keep them open and pass nothing.
CUT, SILENCE = "cut", "silence"


class Relay:
    """Accepts connections on its own `port`, and passes them to `port` of `host`. A context manager.

    `limit_up` and `limit_down` are numbers of bytes, from the client and to it. When one is reached, `act` happens to
    every connection. `on_bytes` is called with the totals (up, down) after bytes have passed, by the relay's thread.
    """

    def __init__(
        self,
        port: int,
        limit_up: int | None = None,
        limit_down: int | None = None,
        act: str = CUT,
        on_bytes: Callable[[int, int], object] = lambda up, down: None,
        host: str = "127.0.0.1",
    ) -> None:
        self._target = (host, port)
        self._limits = [limit_up, limit_down]
        self._act = act
        self._on_bytes = on_bytes
        self.passed = [0, 0]
        self.acted = threading.Event()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "Relay":
        self._acceptor.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._acceptor.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def act(self) -> None:
        """Cut the connections, or stop passing bytes, now."""
        self.acted.set()

    def reset(self) -> None:
        """Wait until all connections have ended, set the totals to 0, and pass new connections."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.passed = [0, 0]
        self.acted.clear()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._pass_on, args=(client,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _pass_on(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        with client, server:
            ways = {client: (0, server), server: (1, client)}
            while ways and not self._closing.is_set():
                if self.acted.is_set():
                    if self._act == CUT:
                        return
                    self._closing.wait()
                    return
                for readable in select.select(list(ways), [], [], 0.02)[0]:
                    way, other = ways[readable]
                    try:
                        if not self._pass_some(readable, way, other):
                            return
                    except OSError:
                        return

    def _pass_some(self, source: socket.socket, way: int, target: socket.socket) -> bool:
        """Pass the bytes that have arrived, up to the limit; return False if the connection has ended."""
        limit = self._limits[way]
        room = (1 << 16) if limit is None else max(0, min(1 << 16, limit - self.passed[way]))
        data = source.recv(room) if room else b""
        if room and not data:
            return False
        target.sendall(data)
        self.passed[way] += len(data)
        if limit is not None and self.passed[way] >= limit:
            self.act()
        self._on_bytes(self.passed[0], self.passed[1])
        return True
