"""Why there is no agent: a table with a message and a hint for each cause, and how a cause is recognised.

A cause is recognised by ssh's own messages (see `openssh`), by the exit status of the command that should have become
the agent, or by paramiko's exceptions; never by words that the host could have printed.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from blockdiff.host import loader
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, TransportError, UsageError, printable
from blockdiff.transport.address import Address

DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts"


class UnreachedError(TransportError):
    """The host was not reached, or ended the connection before the login: a later try may succeed."""


class Cause(Enum):
    """Why there is no agent: a message and a hint. `failure` fills in the fields in braces."""

    UNKNOWN_KEY = (
        "the host key of {login} is not known",
        "`{scan} | ssh-keygen -lf -` shows it; compare it with the host's own, then add it with `{scan} >> {known}`",
    )
    CHANGED_KEY = (
        "the host key of {login} has changed: the connection may be intercepted",
        "if the host was really reinstalled, remove the old key with `{remove}`",
    )
    REVOKED_KEY = (
        "the host key of {login} is revoked in {known}",
        "the host needs another key: somebody else may have this one",
    )
    REFUSED = ("{login} refused the login: {said}", "`{try}` must work for this user without a password")
    UNREACHABLE = ("cannot reach {login}: {said}", "is it running, and is the name right?")
    DROPPED = (
        "cannot reach {login}: {said}",
        "it closed the connection before the login: too many at a time (MaxStartups in sshd_config), or a firewall",
    )
    NO_COMMON = (
        "ssh and {login} have no {what} in common; it offers {offer}",
        "update the host's sshd, or allow one of these with --ssh-option {option}=+NAME",
    )
    INCOMPATIBLE = ("paramiko and {login} have nothing in common: {said}", "use --transport ssh, or update its sshd")
    PROXY = ("cannot reach {login} through {proxy}: {said}", "`{try}` must work without a password")
    BAD_OPTION = (
        "ssh does not accept the command line: {said}",
        "correct --ssh-option or SOURCE; `man ssh_config` has all options",
    )
    BAD_CONFIG = ("ssh cannot use its settings: {said}", "correct that file; `ssh -G {login}` reads it as well")
    NO_PYTHON = ("{login} has no python3", "install python3 (3.6 or newer) there; nothing else is needed")
    TOO_OLD = ("{login} has no python3 of version 3.6 or newer", "install a newer python3 there")
    NO_MODULE = (
        "python3 on {login} is not complete: {said}",
        "install the package python3 there: python3-minimal is not enough",
    )
    DAMAGED = (
        "the agent arrived damaged at {login}",
        "run again; if it happens again, suspect the network, or what reads input in the shell's start files there",
    )
    OTHER_AGENT = (
        "the key for {login} accepts only the agent of another version of blockdiff",
        "make the line for its authorized_keys, or the script there, again: blockdiff authorize",
    )
    NO_PREFIX = ("{login} cannot run the agent with SSH_BLOCKDIFF_PREFIX: {said}", "correct the command")
    PREFIX_FAILED = (
        "`{prefix}`, from SSH_BLOCKDIFF_PREFIX, {ended} on {login} before the agent began: {said}",
        "it must need neither a password nor a terminal; for sudo: NOPASSWD, and no requiretty, in its sudoers",
    )
    OTHER_SHELL = (
        "the login shell on {login} was replaced by another one, which did not run the agent",
        "look there for an `exec` in the shell's start files; put it after a test for interactive shells",
    )
    NOT_BEGUN = (
        "the command on {login} {ended} before the agent began: {said}",
        "`{try}` must work: look at the account, its login shell and the shell's start files there",
    )
    NOT_IN_TIME = (
        "no agent began on {login} in time ({why}): {said}",
        "`{try}` must end without input: look at the login shell and its start files there",
    )
    LOST = ("lost the agent on {login}: {why}{if_ended}{if_said}", "nothing of this run was kept; run again")


@dataclass(frozen=True)
class Place:
    """Where SSH connects to: `login` is its name in messages, `name` its name for ssh, if that is another.

    Its key is known under `alias`, or else under `host` and `port`; `known_hosts` is the file to add the key to. The
    connection goes through `proxy`, which is a description in words.
    """

    login: str
    host: str
    port: int | None = None
    name: str | None = None
    alias: str | None = None
    known_hosts: str | None = None
    proxy: str | None = None

    @property
    def key_name(self) -> str:
        """The name under which known_hosts has the key."""
        if self.alias is not None:
            return self.alias
        return self.host if self.port in (None, 22) else f"[{self.host}]:{self.port}"

    def fields(self) -> dict[str, str]:
        """Return the fields for messages and hints; commands are quoted for a shell."""
        port = f"-p {self.port} " if self.port not in (None, 22) else ""
        known = DEFAULT_KNOWN_HOSTS if self.known_hosts is None else shlex.quote(self.known_hosts)
        renamed = " | sed " + shlex.quote(f"s/^[^ ]*/{self.alias}/") if self.alias is not None else ""
        removed = "" if self.known_hosts is None else f" -f {known}"
        return {
            "login": self.login,
            "scan": f"ssh-keyscan {port}{shlex.quote(self.host)}{renamed}",
            "remove": f"ssh-keygen -R {shlex.quote(self.key_name)}{removed}",
            "known": known,
            "try": f"ssh -o BatchMode=yes {port}{shlex.quote(self.name or self.login)} true",
            "proxy": self.proxy or "",
        }


def place(address: Address) -> Place:
    """Return the place of `address`, without any of ssh's settings."""
    return Place(address.login, address.host or "localhost", address.port)


def failure(cause: Cause, where: Place, said: str = "", **fields: str) -> BlockdiffError:
    """Return the error for a cause. `said` and `fields` are made printable here."""
    last = printable(said, 500)
    known = {**where.fields(), "said": last or "it said nothing", "if_said": f": {last}" if last else ""}
    known.update((name, printable(text, 500)) for name, text in fields.items())
    kinds = {Cause.UNREACHABLE: UnreachedError, Cause.DROPPED: UnreachedError, Cause.BAD_OPTION: UsageError}
    sentence, hint = cause.value
    return kinds.get(cause, TransportError)(sentence.format_map(known), hint.format_map(known))


#: The cause for each exit status of the command that should have become the agent.
STATUSES = {
    loader.NO_PYTHON: Cause.NO_PYTHON,
    loader.TOO_OLD: Cause.TOO_OLD,
    loader.NO_MODULE: Cause.NO_MODULE,
    loader.DAMAGED: Cause.DAMAGED,
    loader.OTHER_AGENT: Cause.OTHER_AGENT,
    loader.NO_PREFIX: Cause.NO_PREFIX,
    loader.OTHER_SHELL: Cause.OTHER_SHELL,
}

# ssh's messages for each cause, before the login. The first row that matches any line counts.
_SAYS = (
    (Cause.CHANGED_KEY, re.compile(r"@\s+WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED")),
    (Cause.REVOKED_KEY, re.compile(r"@\s+WARNING: REVOKED HOST KEY")),
    (Cause.UNKNOWN_KEY, re.compile(r"Host key verification failed")),
    (
        Cause.NO_COMMON,
        re.compile(r"Unable to negotiate with .*: no matching (?P<what>.+) found\. Their offer: (?P<offer>.+)"),
    ),
    (Cause.REFUSED, re.compile(r"(.+: )?Permission denied \(|.*Too many authentication failures")),
    (Cause.UNREACHABLE, re.compile(r"ssh: |.*banner exchange|Connection to .* timed out")),
    (Cause.DROPPED, re.compile(r"(kex|ssh)_exchange_identification|(Connection|Received disconnect) .*")),
)

# the option that allows more algorithms, by the kind of algorithm that both sides must have in common
_OPTIONS = {"cipher": "Ciphers", "MAC": "MACs", "key exchange method": "KexAlgorithms"}


def from_ssh(where: Place, lines: Sequence[str]) -> BlockdiffError | None:
    """Return the error that ssh's own messages before the login report; None if they are not in the table."""
    for cause, pattern in _SAYS:
        for line in lines:
            if (match := pattern.match(line)) is None:
                continue
            fields = match.groupdict()
            option = _OPTIONS.get(fields.get("what") or "", "HostKeyAlgorithms")
            return failure(cause, where, last_words(lines), option=option, **fields)
    return None


def lost(where: Place, error: ConnectionLost, ended: str = "", said: str = "") -> BlockdiffError:
    """Return the error for a connection that broke for another reason; `ended` is how the command ended."""
    return failure(Cause.LOST, where, said, why=error.message, if_ended=f" ({ended})" if ended else "")


def last_words(lines: Iterable[str], count: int = 3) -> str:
    """Return the last lines that are not empty, for a message, without the lines of ``@`` around ssh's headings."""
    said = [line.strip() for line in lines if line.strip() and not line.startswith("@@")]
    return "; ".join(said[-count:])
