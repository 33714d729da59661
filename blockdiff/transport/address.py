"""SOURCE on the command line: a path, ``[user@]host:/path`` or ``ssh://[user@]host[:port]/path``; and NAME."""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from blockdiff.shared.errors import UsageError, printable

_FORMS = "use /path, [user@]host:/path or ssh://[user@]host[:port]/path"
_HOST = re.compile(r"(?:(?P<user>[^@/:]+)@)?(?P<host>\[[0-9A-Fa-f:.]+(?:%[^]/@:\s]+)?\]|[^@/:\[\]]+)")


_REMOTE = re.compile(r"(?P<login>" + _HOST.pattern + r"):(?P<path>.*)", re.DOTALL)
_ORDER = "NAME comes first: blockdiff backup NAME SOURCE"


@dataclass(frozen=True)
class Address:
    """Where a source is. `host` is None for this machine, `user` and `port` are None if SSH's settings decide."""

    host: str | None
    path: str
    user: str | None = None
    port: int | None = None

    @property
    def machine(self) -> str | None:
        """``host`` or ``host:port``, so machines with the same name are distinguished; None for this machine."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def login(self) -> str:
        """``user@host``, ``host``, or ``localhost``: the machine's name in messages."""
        host = printable(self.host or "localhost", 300)
        return host if self.user is None else f"{printable(self.user, 100)}@{host}"


def parse(text: str) -> Address:
    """Return the address that `text` names; raises `UsageError` if it names none.

    As for scp, a colon before any slash ends the name of a host. Other text without a leading slash is the path of a
    file on this machine, which must exist: it is made absolute.
    """
    if "\0" in text:
        raise UsageError("a source cannot contain a NUL character")
    if text.startswith("/"):
        return Address(None, text)
    if text.startswith("ssh://"):
        return _parse_url(text)
    match = _REMOTE.fullmatch(text)
    if match is None and text:
        return Address(None, _absolute(text))
    if match is None or match["path"].startswith("//"):  # http://host/x does not name a host "http"
        raise UsageError(f"cannot understand the source {printable(text, 300)}", _FORMS)
    if not match["path"].startswith("/"):
        raise UsageError(
            f"the path on the host must begin with /: {printable(text, 300)}",
            f"write {match['login']}:/PATH" if match["path"] else _FORMS,
        )
    return _address(match, match["path"], None, text)


def _absolute(text: str) -> str:
    """Return the absolute path of a file on this machine: always the same, whatever relative path names it."""
    if not os.path.lexists(text):
        raise UsageError(f"cannot understand the source {printable(text, 300)}: there is no such file here", _FORMS)
    directory, name = os.path.split(text)
    return os.path.join(os.path.realpath(directory), name)


def check_name(name: str) -> None:
    """Raise `UsageError` if the NAME of a chain that is to be written is probably a source, or is a directory.

    A directory with the same name as an existing chain is allowed.
    """
    if name.startswith("ssh://") or ((match := _REMOTE.fullmatch(name)) is not None and match["path"].startswith("/")):
        raise UsageError(f"{printable(name, 300)} is in the place of NAME, but is a source", _ORDER)
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISBLK(mode):
        raise UsageError(f"{printable(name, 300)} is in the place of NAME, but is a device", _ORDER)
    if stat.S_ISDIR(mode) and not os.path.lexists(name.rstrip("/") + ".ver"):
        inside = os.path.join(name, "web1-disk")
        raise UsageError(
            f"{printable(name, 300)} is a directory, not the NAME of a chain",
            f"NAME is what the files of the chain begin with, such as {printable(inside, 300)}",
        )


def parse_login(text: str) -> Address:
    """Return the address of ``[user@]host`` without a path, as the original's commands accept it."""
    match = _HOST.fullmatch(text)
    if match is None:
        raise UsageError(f"cannot understand the host {printable(text, 300)}", "use [user@]host")
    return _address(match, "", None, text)


def _parse_url(text: str) -> Address:
    login, slash, path = text[len("ssh://") :].partition("/")
    login, port = _split_port(login, text)
    match = _HOST.fullmatch(login)
    if not slash or match is None or "%00" in text:
        raise UsageError(f"cannot understand the source {printable(text, 300)}", _FORMS)
    return _address(match, "/" + _decoded(path), port, text, _decoded)


def _decoded(text: str) -> str:
    """Decode the percent-encoding of a URL: a blank is %20 there."""
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _split_port(login: str, text: str) -> tuple[str, int | None]:
    head, colon, digits = login.rpartition(":")
    if not colon or digits.endswith("]"):
        return login, None
    if not digits.isascii() or not digits.isdigit() or len(digits) > 9 or not 0 < int(digits) < 65536:
        raise UsageError(f"{printable(text, 300)} has no port between 1 and 65535 after its last colon", _FORMS)
    return head, int(digits)


def _address(
    match: "re.Match[str]", path: str, port: int | None, text: str, decode: Callable[[str], str] = str
) -> Address:
    host, user = match["host"].strip("[]"), match["user"] and decode(match["user"])
    if "%25" in host and decode is not str:  # RFC 6874; a % without the 25 is accepted as well
        host = host.replace("%25", "%", 1)
    if host.startswith("-") or (user or "").startswith("-"):
        raise UsageError(f"a host or user cannot begin with a dash: {printable(text, 300)}", _FORMS)
    return Address(host, path, user, port)
