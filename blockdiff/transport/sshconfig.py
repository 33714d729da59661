"""The settings of OpenSSH's client, for the transport that cannot ask ssh: options and configuration files.

Each setting means the same as in ssh, or is refused by name. Only settings that make no difference here are ignored.
"""

import glob
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import paramiko

from blockdiff.shared.errors import BlockdiffError, TransportError, UsageError, printable
from blockdiff.transport.address import Address
from blockdiff.transport.advice import Place

#: The settings that are supported, as ssh spells them.
UNDERSTOOD = (
    *("HostName", "Port", "User", "IdentityFile", "IdentitiesOnly", "UserKnownHostsFile", "GlobalKnownHostsFile"),
    *("HostKeyAlias", "ConnectTimeout"),
)
#: How long a connection may take unless ConnectTimeout says otherwise, in seconds.
CONNECT_TIMEOUT_S = 30.0

_USER_FILE, _SYSTEM_FILE = "~/.ssh/config", "/etc/ssh/ssh_config"
_USER_KNOWN = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_SYSTEM_KNOWN = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
_OTHER_HINT = "use --transport ssh, which obeys it; it needs openssh-client"

# settings that are ignored: they change nothing for our connections, or we would give ssh our own value
_PASSED_OVER = frozenset(
    re.findall(
        r"\w+",
        """addkeystoagent batchmode challengeresponseauthentication checkhostip clearallforwardings compression
        connectionattempts controlmaster controlpath controlpersist dynamicforward enableescapecommandline
        enablesshkeysign escapechar exitonforwardfailure fingerprinthash forkafterauthentication forwardagent
        forwardx11 forwardx11timeout forwardx11trusted gatewayports gssapiauthentication
        gssapidelegatecredentials gssapikeyexchange gssapirenewalforcesrekey gssapitrustdns hashknownhosts
        hostbasedauthentication ignoreunknown ipqos kbdinteractiveauthentication localcommand localforward
        loglevel logverbose numberofpasswordprompts obscurekeystroketiming passwordauthentication
        permitlocalcommand permitremoteopen rekeylimit remotecommand remoteforward requesttty sendenv
        serveralivecountmax serveraliveinterval sessiontype setenv stdinnull streamlocalbindmask
        streamlocalbindunlink stricthostkeychecking syslogfacility tag tcpkeepalive tunnel tunneldevice
        updatehostkeys usekeychain verifyhostkeydns versionaddendum visualhostkey xauthlocation""",
    )
)
# settings that are accepted with the value that has no effect here
_ANYWAY = {
    "addressfamily": "any",
    "canonicalizehostname": "no",
    "identityagent": "ssh_auth_sock",
    "nohostauthenticationforlocalhost": "no",
    "pkcs11provider": "none",
    "proxycommand": "none",
    "proxyjump": "none",
    "pubkeyauthentication": "yes",
    "revokedhostkeys": "none",
}
# the conditions of Match, and whether a value follows
_CONDITIONS = {
    **dict.fromkeys(("all", "canonical", "final"), False),
    **dict.fromkeys(("exec", "host", "localuser", "originalhost", "user"), True),
}
_TIME = re.compile(r"([0-9]+)([smhdw]?)", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Settings:
    """The settings for a host; `timeout_s` is None for no timeout, `user` is None if no user is set."""

    place: Place
    port: int
    user: str | None
    identities: Sequence[str]
    only_identities: bool
    known_hosts: Sequence[str]
    timeout_s: float | None


def read(address: Address, options: Sequence[str]) -> Settings:
    """Return the settings for a host: the user's `options`, like ``Port=2222``, then the files.

    Raises `UsageError` for an option, and `TransportError` for a line of a file, that is not understood.
    """
    given = _given(options)
    found = _from_files(address.host or "")
    values = {name: value[0] for name, value in {**found, **given}.items()}
    port = address.port or _number(values, given)
    host = values.get("hostname", address.host or "").replace("%h", address.host or "")
    user_files = _paths(values.get("userknownhostsfile", _USER_KNOWN))
    alias = values.get("hostkeyalias")
    named = user_files[0] if "userknownhostsfile" in values and user_files else None
    identities = [*given.get("identityfile", []), *found.get("identityfile", [])]
    return Settings(
        Place(address.login, host, port, alias=alias, known_hosts=named),
        port,
        address.user or values.get("user"),
        [path for value in identities for path in _paths(shlex.quote(value.strip('"')))],
        values.get("identitiesonly", "no").lower() == "yes",
        [*user_files, *_paths(values.get("globalknownhostsfile", _SYSTEM_KNOWN))],
        _seconds(values, given),
    )


def _given(options: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of the options, by their names in lower case; ssh uses the first of several."""
    known = {name.lower() for name in UNDERSTOOD}
    found: dict[str, list[str]] = {}
    for option in options:
        match = re.fullmatch(r"\s*(\w+)(?:\s*=\s*|\s+)(.+)", option, re.DOTALL)
        name = match[1] if match is not None else option.partition("=")[0]
        if name.lower() not in known:
            raise UsageError(f"paramiko has no option {printable(name, 100)}", f"it knows {', '.join(UNDERSTOOD)}")
        if match is None:
            raise UsageError(
                f"--ssh-option {printable(option, 100)} has no value", f"write {printable(name, 100)}=VALUE"
            )
        found.setdefault(name.lower(), []).append(match[2].strip())
    return found


def _from_files(host: str) -> dict[str, list[str]]:
    """Return the settings in the user's file and the system's for a host; the first of several values counts."""
    found: dict[str, list[str]] = {}
    for path in (_USER_FILE, _SYSTEM_FILE):
        full = os.path.expanduser(path)
        if not os.path.exists(full):
            continue
        try:
            config = paramiko.SSHConfig.from_text("\n".join(_lines(full, os.path.dirname(full))))
            values = config.lookup(host)
        except (paramiko.SSHException, ImportError, ValueError, KeyError, OSError) as error:
            raise TransportError(
                f"cannot read {full}: {printable(str(error), 300)}", "correct that line, or use --transport ssh"
            ) from error
        for name, value in cast(dict[str, str | list[str] | None], values).items():
            _check(full, name, value)
            if name == "hostname" and value == host:
                continue  # set by paramiko itself
            found[name] = [*found.get(name, []), *(value if isinstance(value, list) else [str(value)])]
    return found


def _check(path: str, name: str, value: object) -> None:
    if name in _PASSED_OVER or name in {each.lower() for each in UNDERSTOOD}:
        return
    if str(value).lower() == _ANYWAY.get(name, ""):
        return
    raise TransportError(
        f"{path} sets {printable(name, 100)}, which paramiko's transport does not support", _OTHER_HINT
    )


def _lines(path: str, directory: str, depth: int = 0) -> Iterator[str]:
    """Yield the lines of a file and of the files that it includes, without comments at the end of lines."""
    if depth > 16:
        raise ValueError("Include is nested too deep")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    block = "Host *"
    for line in lines:
        line = re.sub(r"\s+#[^\"]*$", "", line)
        words = re.split(r"[\s=]+", line.strip(), maxsplit=1)
        if words[0].lower() in ("host", "match"):
            block = line
        if words[0].lower() == "match":
            _check_conditions(shlex.split(words[1] if len(words) > 1 else ""))
        if words[0].lower() != "include":
            yield line
            continue
        for pattern in shlex.split(words[1] if len(words) > 1 else ""):
            full = os.path.join(directory, os.path.expanduser(pattern))
            for included in sorted(glob.glob(full)):
                more = list(_lines(included, directory, depth + 1))
                if block.split() != ["Host", "*"] and any(re.match(r"\s*(host|match)\b", each, re.I) for each in more):
                    raise ValueError(f"Include of conditions within a condition: {included}")
                yield from more
        yield block


def _check_conditions(words: list[str]) -> None:
    """Raise `ValueError` for an unknown condition: paramiko would treat it as one that is not met."""
    while words:
        name = words.pop(0).lstrip("!").lower()
        if name not in _CONDITIONS:
            raise ValueError(f"Match {name}")
        if _CONDITIONS[name] and words:
            words.pop(0)


def _paths(value: str) -> list[str]:
    """Return the paths in a value; `none` stands for no path."""
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise UsageError(f"cannot understand the paths {printable(value, 300)}: {error}") from error
    if any("%" in word or "${" in word for word in words):
        raise UsageError(f"paramiko's transport does not know the tokens in {printable(value, 300)}", _OTHER_HINT)
    return [os.path.expanduser(word) for word in words if word != "none"]


def _number(values: dict[str, str], given: dict[str, list[str]]) -> int:
    text = values.get("port", "22")
    if text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536:
        return int(text)
    raise _unfit("Port", text, given)


def _seconds(values: dict[str, str], given: dict[str, list[str]]) -> float | None:
    text = values.get("connecttimeout", f"{CONNECT_TIMEOUT_S:g}")
    if text.lower() == "none":
        return None
    parts = _TIME.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise _unfit("ConnectTimeout", text, given)
    return float(sum(int(number) * _SECONDS[unit.lower()] for number, unit in parts)) or None


def _unfit(name: str, text: str, given: dict[str, list[str]]) -> BlockdiffError:
    kind = UsageError if name.lower() in given else TransportError
    return kind(f"{name} cannot be {printable(text, 100)}", "correct --ssh-option, or ssh's settings")
