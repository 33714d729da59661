"""The system's ssh: with it, the user's ``~/.ssh/config``, jump hosts, agents and hardware keys work.

ssh writes its own messages to a separate pipe (``-E``), so they are not mixed with the host's messages.
"""

import os
import re
from collections.abc import Sequence

from blockdiff.shared import process
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, UsageError, printable
from blockdiff.transport import advice, bundle
from blockdiff.transport.address import Address
from blockdiff.transport.advice import Cause, Place, UnreachedError
from blockdiff.transport.child import ChildConnection, chunks
from blockdiff.transport.connection import Exit, Tail

#: Settings that override ``~/.ssh/config``, unless the user gives the same setting with --ssh-option. With this
#: LogLevel, the log shows whether the login worked.
_SETTINGS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=30",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "ControlMaster=no",
    "RequestTTY=no",
    "EscapeChar=none",
    "LogLevel=VERBOSE",
)

# settings that could prevent the start of the agent, each with the value that does not; older versions of ssh do not
# know all of them, so they are set only if necessary
_NEEDED = {"RemoteCommand": "none", "SessionType": "default", "StdinNull": "no", "ForkAfterAuthentication": "no"}

# the fastest cipher by far if the CPU has AES
_FAST_CIPHER = "aes128-gcm@openssh.com"

# the exit status of ssh itself
_SSH_FAILED = 255
#: How long ssh may take to read its settings, in seconds: these may make it run other programs.
_SETTINGS_TIMEOUT_S = 30.0
# one jump host, as ProxyJump has it
_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@,]+)@)?(?P<host>\[[^\]]+\]|[^:,\[\]]+)(?::(?P<port>[0-9]+))?")
# ssh's messages if everything works
_LOGGED_IN = "Authenticated to "
_BORING = (_LOGGED_IN, "Transferred: ", "Bytes per second: ")


class SshConnection(ChildConnection):
    """A command on a host, through ssh as a child process. ssh does not end before the connection ends.

    Raises `UsageError` if ssh does not accept an option, `TransportError` if ssh cannot use its configuration.
    """

    tells_end = False

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        settings = effective(address, options)
        self._jump = settings.get("proxyjump")
        log_from, self._log_to = os.pipe()
        # a thread reads it all the time: with --ssh-option LogLevel=DEBUG3, a long run logs more than a pipe holds
        self._log = Tail(chunks(os.fdopen(log_from, "rb", buffering=0)))
        try:
            # a path, because ssh closes all descriptors that it inherits
            log = ["-E", f"/proc/{os.getpid()}/fd/{self._log_to}"]
            super().__init__(["ssh", *log, *arguments(address, options, settings)[1:]], _place(address, settings))
        except BaseException:
            self._close_log()
            raise

    def logged_in(self) -> bool:
        """See `connection.Connection`."""
        return any(line.startswith(_LOGGED_IN) for line in self._own_words())

    def wait(self, timeout_s: float) -> Exit | None:
        """See `connection.Connection`."""
        ended = super().wait(timeout_s)
        return Exit(None) if ended == (_SSH_FAILED,) else ended

    def close(self) -> None:
        """See `connection.Connection`."""
        super().close()
        self._close_log()

    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """Return why the connection was lost; if ssh itself failed, from its messages."""
        own, theirs = self._own_words(), self.stderr().splitlines()
        if self.wait(0) == (None,) and not self.logged_in():
            known = advice.from_ssh(self.place, own)
            if isinstance(known, UnreachedError) and self.place.proxy is not None:
                return _proxy_failed(self.place, self._jump, theirs)  # only the proxy can have written this
            if known is not None:
                return known
        said = advice.last_words([*theirs, *(line for line in own if not line.startswith(_BORING))])
        return advice.lost(self.place, error, self.ended(), said)

    def _own_words(self) -> list[str]:
        """Return the last lines that ssh has logged; if it has ended, wait until all of them have arrived."""
        if self.wait(0) is None:
            return self._log.text().splitlines()
        self._close_log()
        return self._log.text(self._patience_s()).splitlines()

    def _close_log(self) -> None:
        """Close our end of the log's pipe, so that the thread that reads it ends when ssh has ended."""
        if self._log_to >= 0:
            fd, self._log_to = self._log_to, -1
            os.close(fd)


def arguments(address: Address, options: Sequence[str], settings: dict[str, str]) -> list[str]:
    """Return ssh's argument list; it is never interpreted by a shell on this machine.

    `options` are the user's, each like ``Port=2222``; they come first, because ssh uses the first of several values.
    `settings` are those that `effective` returns.
    """
    needed = [f"{name}={value}" for name, value in _NEEDED.items() if settings.get(name.lower(), value) != value]
    ciphers = settings.get("ciphers", "").split(",")
    if _FAST_CIPHER in ciphers:  # only the ciphers that the user and the system allow
        first = sorted(ciphers, key=lambda cipher: cipher != _FAST_CIPHER)
        needed.append("Ciphers=" + ",".join(first))
    return [*_login(address, (*options, *_SETTINGS, *needed)), bundle.remote_command()]


def effective(address: Address, options: Sequence[str]) -> dict[str, str]:
    """Return the settings that ssh would use, by their names in lower case; raises the errors of `SshConnection`."""
    for option in options:
        name = option.replace("=", " ").split(" ")[0]
        if name.lower() in (needed.lower() for needed in _NEEDED):
            raise UsageError(f"--ssh-option {name} cannot be used with the agent", "omit it")
    asked = process.run(["ssh", "-G", *_login(address, options)[1:]], _SETTINGS_TIMEOUT_S, check=False)
    if asked.returncode == 0:
        lines = asked.stdout.decode("utf-8", "surrogateescape").splitlines()
        return {name: value for name, _, value in (line.partition(" ") for line in lines)}
    said = advice.last_words(asked.stderr.decode("utf-8", "replace").splitlines())
    alone = process.run(["ssh", "-F", "none", "-G", *_login(address, options)[1:]], _SETTINGS_TIMEOUT_S, check=False)
    cause = Cause.BAD_CONFIG if alone.returncode == 0 else Cause.BAD_OPTION
    raise advice.failure(cause, advice.place(address), said)


def _login(address: Address, options: Sequence[str]) -> list[str]:
    words = ["ssh"]
    for option in options:
        words += ("-o", option)
    if address.port is not None:
        words += ("-p", str(address.port))
    if address.user is not None:
        words += ("-l", address.user)
    return [*words, "-T", "--", address.host or ""]


def _place(address: Address, settings: dict[str, str], is_jump: bool = False) -> Place:
    proxy = "its ProxyCommand" if "proxycommand" in settings else None
    if "proxyjump" in settings:
        proxy = f"the jump host {printable(settings['proxyjump'], 200)}"
    known_hosts = settings.get("userknownhostsfile", "").split()
    return Place(
        f"the jump host {address.login}" if is_jump else address.login,
        settings.get("hostname", address.host or ""),
        int(settings.get("port", address.port or 22)),
        address.login,
        settings.get("hostkeyalias"),
        known_hosts[0] if known_hosts else None,
        proxy,
    )


def _proxy_failed(where: Place, jump: str | None, said: Sequence[str]) -> BlockdiffError:
    """Return the error for a connection that failed before the host was reached; `said` is the proxy's output."""
    match = _JUMP.fullmatch(jump or "")
    if match is not None:
        first = Address(match["host"].strip("[]"), "", match["user"], int(match["port"]) if match["port"] else None)
        known = advice.from_ssh(_place(first, effective(first, ()), is_jump=True), said)
        if known is not None:
            return known
    return advice.failure(Cause.PROXY, where, advice.last_words(said))
