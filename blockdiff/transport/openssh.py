"""The system's ssh: it brings the user's ``~/.ssh/config``, jump hosts, agents and hardware keys.

What ssh says itself goes into its own pipe (``-E``), and so comes apart from what the host says through it.
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

#: Settings that hold whatever ``~/.ssh/config`` says, unless the user gave the same with --ssh-option. What is logged
#: at this level says whether there was a login.
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

# what would keep the agent from being started or reached, with the value that does not; older versions of ssh do not
# know all of them, so they are set only if they are needed
_NEEDED = {"RemoteCommand": "none", "SessionType": "default", "StdinNull": "no", "ForkAfterAuthentication": "no"}

# the fastest cipher by far if the CPU has AES
_FAST_CIPHER = "aes128-gcm@openssh.com"

# the exit status of ssh itself
_SSH_FAILED = 255
#: How long ssh may take to read its settings, in seconds: they may say that it asks other programs.
_SETTINGS_TIMEOUT_S = 30.0
# one jump host, as ProxyJump has it
_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@,]+)@)?(?P<host>\[[^\]]+\]|[^:,\[\]]+)(?::(?P<port>[0-9]+))?")
# what ssh says if all is well
_LOGGED_IN = "Authenticated to "
_BORING = (_LOGGED_IN, "Transferred: ", "Bytes per second: ")


class SshConnection(ChildConnection):
    """A command on a host, through a child process that is ssh, which ends no sooner than the connection.

    Raises `UsageError` if ssh does not take an option, `TransportError` if it cannot be used as it is set up.
    """

    tells_end = False

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        settings = effective(address, options)
        self._jump = settings.get("proxyjump")
        log_from, self._log_to = os.pipe()
        # read all the time: with --ssh-option LogLevel=DEBUG3 a long run says more than a pipe takes
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
        """Return what ssh said of its failure, if it failed itself."""
        own, theirs = self._own_words(), self.stderr().splitlines()
        if self.wait(0) == (None,) and not self.logged_in():
            known = advice.from_ssh(self.place, own)
            if isinstance(known, UnreachedError) and self.place.proxy is not None:
                return _proxy_failed(self.place, self._jump, theirs)  # nobody else could say anything yet
            if known is not None:
                return known
        said = advice.last_words([*theirs, *(line for line in own if not line.startswith(_BORING))])
        return advice.lost(self.place, error, self.ended(), said)

    def _own_words(self) -> list[str]:
        """Return the last lines that ssh has logged; all of them are there once it has ended."""
        if self.wait(0) is None:
            return self._log.text().splitlines()
        self._close_log()
        return self._log.text(self._patience_s()).splitlines()

    def _close_log(self) -> None:
        """Close our end, so that what reads the log comes to its end with ssh."""
        if self._log_to >= 0:
            fd, self._log_to = self._log_to, -1
            os.close(fd)


def arguments(address: Address, options: Sequence[str], settings: dict[str, str]) -> list[str]:
    """Return ssh's argument list: nothing of it is ever read by a shell on this side.

    `options` are the user's, each like ``Port=2222``; ssh takes the first value that it meets, so they come first.
    `settings` are those of `effective`.
    """
    needed = [f"{name}={value}" for name, value in _NEEDED.items() if settings.get(name.lower(), value) != value]
    ciphers = settings.get("ciphers", "").split(",")
    if _FAST_CIPHER in ciphers:  # of those that the user and the system allow
        first = sorted(ciphers, key=lambda cipher: cipher != _FAST_CIPHER)
        needed.append("Ciphers=" + ",".join(first))
    return [*_login(address, (*options, *_SETTINGS, *needed)), bundle.remote_command()]


def effective(address: Address, options: Sequence[str]) -> dict[str, str]:
    """Return the settings that ssh would use, by their names in lower case; raises what `SshConnection` does."""
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
    """Return what went wrong before the host was reached: `said` is what came from there."""
    match = _JUMP.fullmatch(jump or "")
    if match is not None:
        first = Address(match["host"].strip("[]"), "", match["user"], int(match["port"]) if match["port"] else None)
        known = advice.from_ssh(_place(first, effective(first, ()), is_jump=True), said)
        if known is not None:
            return known
    return advice.failure(Cause.PROXY, where, advice.last_words(said))
