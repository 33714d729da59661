"""SSH in Python: for machines without an ssh program, or if the user chooses it.

`sshconfig` reads ssh's settings for it, `knownhosts` the known keys.
"""

import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from blockdiff.shared import pipeline, process, signals, wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost
from blockdiff.transport import advice, bundle, sshconfig
from blockdiff.transport.address import Address
from blockdiff.transport.advice import Cause, Place
from blockdiff.transport.connection import START_TIMEOUT_S, Connection, Exit, Tail
from blockdiff.transport.knownhosts import KnownKeys
from blockdiff.transport.sshconfig import Settings

#: Bytes that may be in transit. Larger windows are slower, because paramiko then copies longer buffers.
WINDOW_SIZE = 8 << 20
#: The largest packet that OpenSSH sends, in bytes.
PACKET_SIZE = 32 << 10
# Raised when the connection breaks, by everything that sends a packet. Reads do, too: they enlarge the window again.
_BREAKS = (OSError, EOFError, paramiko.SSHException)
_FAST_CIPHER = "aes128-gcm@openssh.com"
# Downloads fail if paramiko renews the keys itself (paramiko#822); the other side still renews them.
_NEVER = 1 << 60
# paramiko's messages for silence, after the greeting and before it
_SILENCE = ("No existing session", "Authentication timeout.")
_NO_GREETING = "Error reading SSH protocol banner"

# paramiko's exceptions say the same as its log; without a handler, Python would print the log to standard error.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class ParamikoConnection(Connection):
    """A command on a host, through paramiko.

    paramiko's functions are called in a separate thread: a signal's exception inside one of them could leave a lock
    taken, and `close` would wait for this lock.
    """

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        settings = sshconfig.read(address, options)
        self.place = settings.place
        self._client = paramiko.SSHClient()
        self._crew = pipeline.Crew()
        try:
            self._crew.start(1)
            self._channel = self._crew.give(lambda: self._start(settings)).result()
        except BaseException:
            self.close()
            raise
        self._tail = Tail(self._error_chunks())

    def _start(self, settings: Settings) -> paramiko.Channel:
        timeout_s = START_TIMEOUT_S if settings.timeout_s is None else settings.timeout_s
        host = _HostKey(self.place, KnownKeys(settings.known_hosts, self.place))
        try:
            self._connect(settings, host, timeout_s)
            transport = self._client.get_transport()
            assert transport is not None
            channel = transport.open_session(WINDOW_SIZE, PACKET_SIZE, timeout=timeout_s)
            self._execute(channel, timeout_s)
            return channel
        except IncompatiblePeer as error:
            raise advice.failure(Cause.INCOMPATIBLE, self.place, str(error)) from error
        except (paramiko.SSHException, EOFError) as error:
            transport = self._client.get_transport()
            there = host.accepted and transport is not None and transport.is_active()
            refused = there and not (transport is not None and transport.is_authenticated())
            cause = Cause.REFUSED if refused else Cause.UNREACHABLE
            raise advice.failure(cause, self.place, _said(error, timeout_s)) from error
        except OSError as error:
            raise advice.failure(Cause.UNREACHABLE, self.place, str(error.strerror or error)) from error
        except ValueError as error:  # from a file that is not a private key
            raise advice.failure(Cause.REFUSED, self.place, str(error)) from error

    def _execute(self, channel: paramiko.Channel, timeout_s: float) -> None:
        """Start the command. paramiko would wait for the answer without limit, so the connection is closed in time."""
        watchdog = threading.Timer(timeout_s, self._client.close)
        watchdog.start()
        try:
            channel.exec_command(bundle.remote_command())
        finally:
            watchdog.cancel()

    def _connect(self, settings: Settings, host: "_HostKey", timeout_s: float) -> None:
        self._client.set_missing_host_key_policy(host)
        identities = [path for path in settings.identities if os.access(path, os.R_OK)]
        self._client.connect(
            self.place.host,
            port=settings.port,
            username=settings.user,
            key_filename=identities,  # type: ignore[arg-type]  # accepts a list, but is typed as text
            allow_agent=not settings.only_identities,
            look_for_keys=not settings.identities,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            transport_factory=functools.partial(_transport, host.known.kinds),
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
        signals.undisturbed(lambda: self._send(parts), self._client.close)

    def _send(self, parts: Sequence[wire.Buffer]) -> None:
        try:
            for part in parts:
                self._channel.sendall(part)  # type: ignore[arg-type]  # accepts any buffer, but is typed as bytes
        except _BREAKS as error:
            raise ConnectionLost(f"cannot write: {_text(error)}") from error

    def logged_in(self) -> bool:
        """See `connection.Connection`."""
        return True

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


def _said(error: Exception, timeout_s: float) -> str:
    """Return why a connection was not made, in clearer words than paramiko's."""
    if str(error) in _SILENCE:
        return f"silent for {timeout_s:g} s during the SSH handshake"
    if str(error).startswith(_NO_GREETING):
        return "no SSH server answered"
    return str(error) or "the connection ended during the SSH handshake"


def _text(error: Exception) -> str:
    return str(error) or "the connection ended"


class _HostKey(paramiko.MissingHostKeyPolicy):
    """Checks the key that the host shows. We give paramiko no known keys, so it asks this class about each key."""

    def __init__(self, place: Place, known: KnownKeys) -> None:
        self.known = known
        self.accepted = False
        self._place = place

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        """Return if the key is a known one; raise `TransportError` if it is not."""
        if (cause := self.known.wrong(key.get_name(), key.asbytes())) is not None:
            raise advice.failure(cause, self._place)
        self.accepted = True


def _transport(
    kinds: Sequence[str],
    sock: object,
    /,
    *,
    gss_kex: bool = False,
    gss_deleg_creds: bool = True,
    disabled_algorithms: Mapping[str, Iterable[str]] | None = None,
) -> paramiko.Transport:
    """Return a transport with the fast cipher first, a large window, and no renewal of keys.

    The host is asked for a key of one of the `kinds` that are known for it, if it has one.
    """
    transport = paramiko.Transport(
        cast(socket.socket, sock), WINDOW_SIZE, PACKET_SIZE, disabled_algorithms=disabled_algorithms
    )
    options = transport.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda cipher: cipher != _FAST_CIPHER)
    known = {name for kind in kinds for name in (("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,))}
    options.key_types = sorted(options.key_types, key=lambda name: name not in known)
    transport.packetizer.REKEY_BYTES = _NEVER
    transport.packetizer.REKEY_PACKETS = _NEVER
    return transport
