"""Talk to a running qemu over its monitor socket (QMP)."""

import json
import re
import socket
import time
from pathlib import Path
from typing import cast


class Monitor:
    """A connection to the monitor of one qemu, as a context manager; every answer has a deadline."""

    def __init__(self, path: Path, timeout_s: float = 60) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def __enter__(self) -> "Monitor":
        self._socket = self._connected()
        self._lines = self._socket.makefile("rb")
        self._wait_for("QMP")
        self._do("qmp_capabilities")
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._socket.close()

    def reset(self) -> None:
        """Do what the reset button does; returns when it is done."""
        self._do("system_reset")
        while self._wait_for("event")["event"] != "RESET":
            pass

    def forward(self, guest_port: int) -> int:
        """Forward a port of 127.0.0.1 that the kernel chooses to one of the guest; return it."""
        self._human(f"hostfwd_add net tcp:127.0.0.1:0-:{guest_port}")
        shown = self._human("info usernet")
        found = re.findall(r"TCP\[HOST_FORWARD\] +\d+ +127\.0\.0\.1 +(\d+) +\S+ +(\d+)", shown)
        return next(int(port) for port, to in found if int(to) == guest_port)

    def _human(self, line: str) -> str:
        return str(self._do("human-monitor-command", {"command-line": line}))

    def _do(self, command: str, arguments: "dict[str, str] | None" = None) -> object:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        return self._wait_for("return")["return"]

    def _wait_for(self, key: str) -> "dict[str, object]":
        """Read up to the next message that has this key."""
        while True:
            line = self._lines.readline()
            if not line:
                raise RuntimeError("qemu has closed its monitor")
            message = cast("dict[str, object]", json.loads(line))
            if "error" in message:
                raise RuntimeError(f"qemu refuses: {message['error']}")
            if key in message:
                return message

    def _connected(self) -> socket.socket:
        deadline = time.monotonic() + self._timeout_s
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(self._timeout_s)
            try:
                sock.connect(str(self._path))
            except OSError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return sock
