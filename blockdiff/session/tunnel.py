"""A socket that is connected through the session to a socket of the host (`blockdiff.host.relay` is the other end)."""

import queue
import socket
import threading
from collections.abc import Callable, Sequence

from blockdiff.host import relay
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, ProtocolError
from blockdiff.shared.process import STOP_TIMEOUT_S

Control = tuple[int, dict[str, object]]

#: How many control frames may wait in the queue. An agent that follows the protocol sends at most one at a time.
_MAX_WAITING = 4


class Tunnel:
    """While it is open, a thread receives all frames; `control` returns the control frames among them.

    `explain` turns the fields of an error frame into an error. `failure` is that error, or the one that broke the
    connection to the agent, if this happened while the tunnel was open: then the socket is at its end.
    """

    def __init__(self, link: wire.Link, explain: Callable[[dict[str, object]], BlockdiffError]) -> None:
        self._link = link
        self._explain = explain
        self._controls: queue.Queue[Control | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)
        self.failure: BlockdiffError | None = None

    def open(self, sockets: Sequence[str], port: int) -> socket.socket:
        """Return this end of the socket; raises the agent's error, `ConnectionLost` or `ProtocolError`."""
        self._link.send_json(wire.OPEN, {"sockets": list(sockets), "port": port})
        frame = self._link.receive()
        fields = self._link.read_json(frame)
        if frame.kind != wire.OPEN:
            raise ProtocolError(f"sent a frame of kind {wire.kind_name(frame.kind)} in place of OPEN")
        if fields:
            raise self._explain(fields)
        ours, theirs = socket.socketpair()
        self._relay = relay.Relay(self._link, ours, wire.CLOSE)
        self._relay.start()
        self._thread.start()
        return theirs

    def control(self) -> Control:
        """Return kind and fields of the next control frame; raises `failure` if there are no more."""
        found = self._controls.get()
        if found is None:
            self._controls.put(None)  # for the next call
            raise self.failure or ProtocolError("closed the tunnel in place of an answer")
        return found

    def close(self) -> None:
        """Wait until both sides have closed; the socket that `open` returned must be closed first. Raises `failure`."""
        self._thread.join(self._link.silence_s)
        self._relay.join(STOP_TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        if self._thread.is_alive():
            raise ConnectionLost("the tunnel did not close", silent=True)

    def _run(self) -> None:
        try:
            while True:
                frame = self._link.receive()
                if frame.kind == wire.BYTES:
                    self._relay.feed(self._link.read_bytes(frame, wire.MAX_PAYLOAD))
                elif frame.kind == wire.CLOSE and not frame.length:
                    break
                elif frame.kind == wire.ERROR:
                    raise self._explain(self._link.read_json(frame))
                elif frame.kind in (wire.READY, wire.TAKEN):
                    if self._controls.qsize() >= _MAX_WAITING:
                        raise ProtocolError("sent more answers than it was asked for")
                    self._controls.put((frame.kind, self._link.read_json(frame)))
                else:
                    raise ProtocolError(f"sent an unexpected frame of kind {wire.kind_name(frame.kind)}")
        except BlockdiffError as error:
            self.failure = error
        finally:
            self._relay.close()
            self._controls.put(None)
