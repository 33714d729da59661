"""SSH in Python: for machines without an ssh program, and by choice.

It reads the host's ``HostName``, ``Port``, ``User`` and ``IdentityFile`` from ``~/.ssh/config``, and known keys from
the usual places.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import paramiko

from blockdiff import bundle, pipeline, process, wire
from blockdiff.address import Address
from blockdiff.errors import BlockdiffError, ConnectionLost, TransportError, UsageError, printable
from blockdiff.transport import advice
from blockdiff.transport.advice import Cause
from blockdiff.transport.connection import Connection, Exit, Tail

CONNECT_TIMEOUT_S = 30.0
#: Bytes that may be under way. Larger windows are slower: paramiko then copies ever longer buffers.
WINDOW_SIZE = 8 << 20
#: The largest packet that OpenSSH sends, in bytes.
PACKET_SIZE = 32 << 10
# Raised by whatever sends a packet when the connection breaks, reads included, which make room for more.
_BREAKS = (OSError, EOFError, paramiko.SSHException)
_FAST_CIPHER = "aes128-gcm@openssh.com"
# Downloads fail when paramiko itself renews the keys (paramiko#822); the other side still does when it wants to.
_NEVER = 1 << 60
_OPTIONS = ("HostName", "Port", "User", "IdentityFile", "UserKnownHostsFile", "ConnectTimeout")

# What paramiko logs, its exceptions tell as well; without a handler, Python would print it to standard error.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class ParamikoConnection(Connection):
    """A command on a host, through paramiko.

    Its calls are made in a thread of their own. A signal's exception within one could leave a lock taken that `close`
    waits for.
    """

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        self.place = advice.place(address)
        self._address = address
        self._client = paramiko.SSHClient()
        self._crew = pipeline.Crew()
        try:
            self._crew.start(1)
            settings = _settings(address, options)
            self.place = replace(self.place, known_hosts=settings.get("userknownhostsfile"))
            self._channel = self._crew.give(lambda: self._start(settings)).result()
        except BaseException:
            self.close()
            raise
        self._tail = Tail(self._error_chunks())

    def _start(self, settings: dict[str, str]) -> paramiko.Channel:
        timeout_s = float(settings.get("connecttimeout", CONNECT_TIMEOUT_S))
        try:
            self._connect(settings, timeout_s)
            transport = self._client.get_transport()
            assert transport is not None
            channel = transport.open_session(WINDOW_SIZE, PACKET_SIZE, timeout=timeout_s)
            self._execute(channel, timeout_s)
            return channel
        except paramiko.BadHostKeyException as error:
            raise advice.failure(Cause.CHANGED_KEY, self.place) from error
        except paramiko.SSHException as error:
            raise self._explained(error, timeout_s) from error
        except EOFError as error:
            said = "the connection ended during the SSH handshake"
            raise advice.failure(Cause.UNREACHABLE, self.place, said) from error
        except OSError as error:
            raise advice.failure(Cause.UNREACHABLE, self.place, str(error.strerror or error)) from error

    def _explained(self, error: paramiko.SSHException, timeout_s: float) -> BlockdiffError:
        said = str(error)
        if "not found in known_hosts" in said:
            return advice.failure(Cause.UNKNOWN_KEY, self.place)
        if "No existing session" in said or "Authentication timeout" in said:  # what paramiko calls silence
            return advice.failure(Cause.UNREACHABLE, self.place, f"silent for {timeout_s:g} s during the SSH handshake")
        if "protocol banner" in said:
            return advice.failure(Cause.UNREACHABLE, self.place, "no SSH server answered")
        if isinstance(error, paramiko.AuthenticationException) and "saw EOF" not in said:
            return advice.failure(Cause.REFUSED, self.place, said)
        return advice.failure(Cause.UNREACHABLE, self.place, said)

    def _execute(self, channel: paramiko.Channel, timeout_s: float) -> None:
        """Start the command. paramiko would wait for the answer for ever; it wakes up when the connection closes."""
        watchdog = threading.Timer(timeout_s, self._client.close)
        watchdog.start()
        try:
            channel.exec_command(bundle.remote_command())
        finally:
            watchdog.cancel()

    def _connect(self, settings: dict[str, str], timeout_s: float) -> None:
        self._client.load_system_host_keys()
        if "userknownhostsfile" in settings:
            self._client.load_host_keys(os.path.expanduser(settings["userknownhostsfile"]))
        self._client.set_missing_host_key_policy(paramiko.RejectPolicy())
        self._client.connect(
            settings.get("hostname", self._address.host or ""),
            port=self._address.port or int(settings.get("port", 22)),
            username=self._address.user or settings.get("user"),
            key_filename=os.path.expanduser(settings["identityfile"]) if "identityfile" in settings else None,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            transport_factory=_transport,
        )

    def _error_chunks(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._channel.recv_stderr(4096)
            except TimeoutError:
                continue
            except _BREAKS:
                return
            if not chunk:
                return
            yield chunk

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        """See `connection.Connection`."""
        data = self._crew.give(lambda: self._receive(len(view), timeout_s)).result()
        view[: len(data)] = data
        return len(data)

    def _receive(self, limit: int, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        ended = False
        while True:
            self._channel.settimeout(max(0.01, min(process.LINGER_S, deadline - time.monotonic())))
            try:
                return self._channel.recv(limit)
            except TimeoutError as error:
                if ended:
                    return b""
                if time.monotonic() >= deadline:
                    raise ConnectionLost(f"silent for {timeout_s:g} s", silent=True) from error
                ended = self._channel.exit_status_ready()
            except _BREAKS as error:
                raise ConnectionLost(f"cannot read: {_text(error)}") from error

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        """See `connection.Connection`."""
        process.undisturbed(lambda: self._send(parts), self._client.close)

    def _send(self, parts: Sequence[wire.Buffer]) -> None:
        try:
            for part in parts:
                self._channel.sendall(part)  # type: ignore[arg-type]  # takes any buffer, says bytes
        except _BREAKS as error:
            raise ConnectionLost(f"cannot write: {_text(error)}") from error

    def wait(self, timeout_s: float) -> Exit | None:
        """See `connection.Connection`."""
        if not self._crew.give(lambda: self._channel.status_event.wait(timeout_s)).result():
            return None
        status = self._channel.exit_status
        return Exit(None if status < 0 else status)

    def close(self) -> None:
        """See `connection.Connection`."""
        self._client.close()
        self._crew.dismiss()

    def stderr(self) -> str:
        """See `connection.Connection`."""
        return self._tail.text(1.0)

    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """See `connection.Connection`."""
        return advice.lost(self.place, error, said=advice.last_words(self.stderr().splitlines()))


def _text(error: Exception) -> str:
    return str(error) or "the connection ended"


def _transport(
    sock: object,
    /,
    *,
    gss_kex: bool = False,
    gss_deleg_creds: bool = True,
    disabled_algorithms: Mapping[str, Iterable[str]] | None = None,
) -> paramiko.Transport:
    """Return a transport with the fast cipher first, a large window, and no wish to renew keys by itself."""
    transport = paramiko.Transport(
        cast(socket.socket, sock), WINDOW_SIZE, PACKET_SIZE, disabled_algorithms=disabled_algorithms
    )
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda cipher: cipher != _FAST_CIPHER)
    transport.packetizer.REKEY_BYTES = _NEVER
    transport.packetizer.REKEY_PACKETS = _NEVER
    return transport


def _settings(address: Address, options: Sequence[str]) -> dict[str, str]:
    """Return the settings for the host, in lower case: the user's options, then ``~/.ssh/config``."""
    config = paramiko.SSHConfig()
    path = os.path.expanduser("~/.ssh/config")
    if os.path.exists(path):
        try:
            config = paramiko.SSHConfig.from_path(path)
        except (OSError, paramiko.SSHException) as error:
            raise TransportError(f"cannot read {path}: {printable(str(error), 300)}") from error
    found = dict(config.lookup(address.host or ""))
    settings = {name: value for name, value in found.items() if name in {o.lower() for o in _OPTIONS}}
    if isinstance(settings.get("identityfile"), list):
        settings["identityfile"] = settings["identityfile"][0]
    for option in options:
        name, _, value = option.partition("=")
        known = {o.lower() for o in _OPTIONS}
        if name.lower() not in known:
            raise UsageError(f"paramiko has no option {printable(name, 100)}", f"it knows {', '.join(_OPTIONS)}")
        settings[name.lower()] = value
    return settings
