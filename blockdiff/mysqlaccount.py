"""Who logs in to a database, and where: from a URL, the word ``ssh``, or the options of the original's mysqllock."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from blockdiff import mysqloptions
from blockdiff.errors import UsageError, printable

DEFAULT_PORT = 3306

#: Where distributions put the socket of the server.
SOCKETS = ("/run/mysqld/mysqld.sock", "/var/run/mysqld/mysqld.sock", "/tmp/mysql.sock")

_HOME_FILE = "~/.my.cnf"
_GROUPS = ("client", "client-server", "client-mariadb", "mysqllock")
_ENCODE = "in a URL the characters / ? # @ : % of a user or password are written %2F %3F %23 %40 %3A %25"


@dataclass(frozen=True)
class Account:
    """A login. `socket` is the path of a Unix socket, used in place of `host` and `port` where it is not None.

    With `through_ssh` the session goes through the SSH connection to the host that is backed up: to `socket` there, or,
    where that is None, to whichever of `SOCKETS` exists there.
    """

    user: str
    password: str = field(repr=False)
    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket: str | None = None
    database: str | None = None
    through_ssh: bool = False

    @property
    def place(self) -> str:
        """The server in words, for messages."""
        if self.through_ssh:
            return "the host's own database"
        if self.socket is not None:
            return f"the database at {printable(self.socket, 200)}"
        return f"the database on {printable(self.host, 200)}:{self.port}"


@dataclass(frozen=True)
class Given:
    """What a command line says of a login; None and an empty host where it says nothing."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    host: str | None = None
    port: int | None = None
    socket: str | None = None
    database: str | None = None
    defaults_file: str | None = None


def from_options(given: Given) -> Account:
    """Return the account for the options of the command ``mysqllock``.

    What is not given comes from the option file, if one is named, then from ``MYSQL_PWD`` and ``USER``, then it is root
    at localhost. Raises `UsageError` for an option file that cannot be used, or a socket of another host.
    """
    return _complete(given, {} if given.defaults_file is None else _read(given.defaults_file))


def from_url(text: str, ssh_user: str = "root") -> Account:
    """Return the account for ``mysql://[USER[:PASSWORD]@]HOST[:PORT]/[DATABASE][?socket=PATH&defaults-file=PATH]``.

    A URL without a password has the rest from the option file that it names, or else from ``~/.my.cnf``, where there is
    one. ``mysql+ssh://`` goes through the SSH connection to the host's own socket, and the word ``ssh`` does so as
    `ssh_user` (the name of the SSH login) without a password. Raises `UsageError`; no message quotes the URL.
    """
    if text == "ssh":
        return Account(ssh_user, "", through_ssh=True)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise UsageError("the URL of the database is not valid", _ENCODE) from None  # its cause quotes the URL
    if url.scheme not in ("mysql", "mysql+ssh") or not text.startswith(f"{url.scheme}://"):
        raise UsageError("the database is neither mysql://USER@HOST/ nor mysql+ssh://USER@/ nor the word ssh")
    given = _given(url, port)
    if url.scheme == "mysql":
        return _complete(given, _options_for(given))
    if given.host is not None or given.port is not None:
        raise UsageError(
            "mysql+ssh:// goes to the socket of the host that is backed up, and takes no host or port",
            "write mysql+ssh://USER@/ for it",
        )
    options = _options_for(given) if given.defaults_file is not None else {}
    user = given.user if given.user is not None else options.get("user")
    return Account(user or ssh_user, _password(given, options), socket=given.socket, through_ssh=True)


def _given(url: SplitResult, port: int | None) -> Given:
    """Return what a URL says."""
    try:
        query = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)) if url.query else {}
    except ValueError:
        query = {"": ""}
    if url.fragment or set(query) - {"socket", "defaults-file"} or "/" in url.path[1:]:
        raise UsageError("the URL of the database has more than a database name, socket= and defaults-file=", _ENCODE)
    return Given(
        user=None if url.username is None else unquote(url.username),
        password=None if url.password is None else unquote(url.password),
        host=unquote(url.hostname) if url.hostname else None,
        port=port,
        socket=query.get("socket"),
        database=unquote(url.path[1:]) or None,
        defaults_file=query.get("defaults-file"),
    )


def _options_for(given: Given) -> Mapping[str, str | None]:
    """Return the options for a URL: from the file that it names, or else, where it has no password, from the user's."""
    if given.defaults_file is not None:
        return _read(given.defaults_file)
    home = os.path.expanduser(_HOME_FILE)
    return _read(home) if given.password is None and os.path.exists(home) else {}


def _read(path: str) -> Mapping[str, str | None]:
    return mysqloptions.read(os.path.expanduser(path), _GROUPS)


def _complete(given: Given, options: Mapping[str, str | None]) -> Account:
    """Return the account where the option file and the environment fill the gaps."""
    host = given.host or options.get("host") or "localhost"
    socket = given.socket
    if host == "localhost" and given.port is None and socket is None:
        socket = options.get("socket") or next((path for path in SOCKETS if os.path.exists(path)), None)
    elif host != "localhost" and socket is not None:
        raise UsageError(f"a socket is of this machine, and not of {printable(host, 200)}", "leave one of the two out")
    return Account(
        user=given.user or options.get("user") or os.environ.get("USER") or "root",
        password=_password(given, options),
        host=host,
        port=given.port if given.port is not None else _port(options.get("port")),
        socket=socket,
        database=given.database or options.get("database"),
    )


def _password(given: Given, options: Mapping[str, str | None]) -> str:
    """Return the password: given, or of the option file, or of the environment, as with the clients; or none."""
    if given.password is not None:
        return given.password
    value = options.get("password")
    return value if value is not None else os.environ.get("MYSQL_PWD", "")


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise UsageError(f"the option file says port={printable(text, 20)!r}, which is no port")
    return int(text)
