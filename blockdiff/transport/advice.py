"""Turn what SSH says into a sentence that names the host, and a hint that helps."""

import re
import shlex

from blockdiff.address import Address
from blockdiff.errors import TransportError, printable


def unknown_host_key(address: Address) -> TransportError:
    """Return the error for a host whose key nobody has confirmed yet."""
    port = f"-p {address.port} " if address.port else ""
    scan = f"ssh-keyscan {port}{shlex.quote(address.host or '')}"
    return TransportError(
        f"the host key of {address.login} is not known",
        f"`{scan} | ssh-keygen -lf -` shows it; compare it with the host's own, then add it with "
        f"`{scan} >> ~/.ssh/known_hosts`",
    )


def changed_host_key(address: Address) -> TransportError:
    """Return the error for a host that shows another key than the one that is known."""
    name = f"[{address.host}]:{address.port}" if address.port else address.host or ""
    return TransportError(
        f"the host key of {address.login} has changed: somebody may be in between",
        f"if the host was really reinstalled, remove the old key with `ssh-keygen -R {shlex.quote(name)}`",
    )


def refused_login(address: Address, said: str) -> TransportError:
    """Return the error for a host that lets us in with none of our keys."""
    port = f"-p {address.port} " if address.port else ""
    return TransportError(
        f"{address.login} refused the login: {printable(said, 300)}",
        f"`ssh -o BatchMode=yes {port}{shlex.quote(address.login)} true` must work for this user without a password",
    )


def unreachable(address: Address, said: str) -> TransportError:
    """Return the error for a host that does not answer."""
    return TransportError(f"cannot reach {address.login}: {printable(said, 300)}", "is it up, and the name right?")


# what ssh says of a connection that was never made; one that breaks later has other words
_UNREACHABLE = re.compile(r"ssh: |(kex|ssh)_exchange_identification|.*banner exchange")


def from_ssh(address: Address, stderr: str) -> TransportError | None:
    """Return the error that OpenSSH's standard error speaks of, None where it is none of the well-known ones."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in stderr:
        return changed_host_key(address)
    if "Host key verification failed" in stderr:
        return unknown_host_key(address)
    for line in reversed(lines):
        if "Permission denied" in line or "Too many authentication failures" in line:
            return refused_login(address, line)
        if _UNREACHABLE.match(line):
            return unreachable(address, line)
    return None
