"""SOURCE on the command line: ``/path``, ``[user@]host:/path`` or ``ssh://[user@]host[:port]/path``."""

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from blockdiff.errors import UsageError, printable

_FORMS = "use /path, [user@]host:/path or ssh://[user@]host[:port]/path"
_HOST = re.compile(r"(?:(?P<user>[^@/:]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@/:\[\]]+)")


@dataclass(frozen=True)
class Address:
    """Where a source is. `host` is None for this machine, `user` and `port` where SSH's settings decide."""

    host: str | None
    path: str
    user: str | None = None
    port: int | None = None

    @property
    def machine(self) -> str | None:
        """``host`` or ``host:port``, which tells machines behind one name apart; None for this machine."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def login(self) -> str:
        """``user@host``, ``host``, or ``localhost``: how messages call the machine."""
        host = printable(self.host or "localhost", 300)
        return host if self.user is None else f"{printable(self.user, 100)}@{host}"


def parse(text: str) -> Address:
    """Return the address that `text` names; raises `UsageError` where it names none."""
    if "\0" in text:
        raise UsageError("a source cannot contain a NUL character")
    if text.startswith("/"):
        return Address(None, text)
    if text.startswith("ssh://"):
        return _parse_url(text)
    login, colon, path = text.partition(":/")
    match = _HOST.fullmatch(login)
    if not colon or match is None or path.startswith("/"):  # http://host/x names no host called http
        raise UsageError(f"cannot make out the source {printable(text, 300)}", _FORMS)
    return _address(match, "/" + path, None, text)


def parse_login(text: str) -> Address:
    """Return the address of ``[user@]host`` without a path, as the original's commands take it."""
    match = _HOST.fullmatch(text)
    if match is None:
        raise UsageError(f"cannot make out the host {printable(text, 300)}", "use [user@]host")
    return _address(match, "", None, text)


def _parse_url(text: str) -> Address:
    login, slash, path = text[len("ssh://") :].partition("/")
    login, port = _split_port(login, text)
    match = _HOST.fullmatch(login)
    if not slash or match is None or "%00" in path:
        raise UsageError(f"cannot make out the source {printable(text, 300)}", _FORMS)
    # in a URL, a path is percent-encoded: a blank is %20
    decoded = unquote_to_bytes(path.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    return _address(match, "/" + decoded, port, text)


def _split_port(login: str, text: str) -> tuple[str, int | None]:
    head, colon, digits = login.rpartition(":")
    if not colon or digits.endswith("]"):
        return login, None
    if not digits.isascii() or not digits.isdigit() or len(digits) > 9 or not 0 < int(digits) < 65536:
        raise UsageError(f"{printable(text, 300)} has no port between 1 and 65535 behind its last colon", _FORMS)
    return head, int(digits)


def _address(match: "re.Match[str]", path: str, port: int | None, text: str) -> Address:
    host, user = match["host"].strip("[]"), match["user"]
    if host.startswith("-") or (user or "").startswith("-"):
        raise UsageError(f"a host or user cannot begin with a dash: {printable(text, 300)}", _FORMS)
    return Address(host, path, user, port)
