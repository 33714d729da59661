"""The login of a database, and its server: from a URL, the word ``ssh``, or the options of the original's mysqllock."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from blockdiff.database import optionfiles
from blockdiff.shared.errors import UsageError, printable

DEFAULT_PORT = 3306

#: The paths of the server's socket in the common distributions.
SOCKETS = ("/run/mysqld/mysqld.sock", "/var/run/mysqld/mysqld.sock", "/tmp/mysql.sock")

_KEY_LIMIT = 1 << 16
_HOME_FILE = "~/.my.cnf"
_GROUPS = ("client", "client-server", "client-mariadb", "mysqllock")
_ENCODE = "in a URL the characters / ? # @ : % of a user or path are written %2F %3F %23 %40 %3A %25"

#: The parameters of a URL that are about the network, by their names in option files.
_IN_URLS = ("ssl-ca", "ssl-capath", "ssl-cert", "ssl-key", "ssl-mode", "server-public-key-path")
_ENCRYPTED = ("REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_MODES = ("", "PREFERRED", "DISABLED", *_ENCRYPTED)
#: Options that change how the server's certificate is checked. They are refused, because ignoring them could mislead.
_REFUSED = (
    *("skip_ssl_verify_server_cert", "disable_ssl_verify_server_cert"),
    *("ssl_crl", "ssl_crlpath", "ssl_fp", "ssl_fplist"),
)


@dataclass(frozen=True)
class Tls:
    """How a connection over a network is encrypted. The server's certificate is always checked.

    `ca` and `capath` are the file and the directory of the trusted authorities; if both are None, those of this machine
    are trusted. `cert` and `key` are the files of the client's certificate. With `checks_name`, the server's
    certificate must be for the name of the host.
    """

    ca: str | None = None
    capath: str | None = None
    cert: str | None = None
    key: str | None = None
    checks_name: bool = True


@dataclass(frozen=True)
class Account:
    """A login. `socket` is the path of a Unix socket, used instead of `host` and `port` if it is not None.

    With `through_ssh` the session goes through the SSH connection to the host that is backed up: to `socket` there, or,
    if that is None, to the first of `SOCKETS` that exists there. `tls` and `public_key` (a file with the server's key
    for caching_sha2_password) are only for networks, and may be None.
    """

    user: str
    password: str = field(repr=False)
    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket: str | None = None
    database: str | None = None
    through_ssh: bool = False
    tls: Tls | None = None
    public_key: str | None = None

    @property
    def is_of_network(self) -> bool:
        """Whether this machine connects to the server by TCP."""
        return self.socket is None and not self.through_ssh

    def server_key(self) -> bytes | None:
        """Return the server's public key, None if none is given; raises `UsageError` if it cannot be read."""
        if self.public_key is None:
            return None
        try:
            with open(self.public_key, "rb") as file:
                content = file.read(_KEY_LIMIT)
        except OSError as error:
            raise UsageError(
                f"cannot read the server's public key {printable(self.public_key, 200)}: {error.strerror}"
            ) from error
        if b"-----BEGIN PUBLIC KEY-----" not in content:
            raise UsageError(
                f"{printable(self.public_key, 200)} is not a public key", "the server has it as public_key.pem"
            )
        return content

    @property
    def place(self) -> str:
        """A phrase for the server, for messages."""
        if self.through_ssh:
            return "the host's own database"
        if self.socket is not None:
            return f"the database at {printable(self.socket, 200)}"
        return f"the database on {printable(self.host, 200)}:{self.port}"


@dataclass(frozen=True)
class LoginOptions:
    """What a command line says of a login. What it does not say is None; `host` may also be empty.

    `network` has options for TLS and the server's key, by their names in an option file.
    """

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    host: str | None = None
    port: int | None = None
    socket: str | None = None
    database: str | None = None
    defaults_file: str | None = None
    network: Mapping[str, str | None] = field(default_factory=dict)


def from_options(given: LoginOptions) -> Account:
    """Return the account for the options of the command ``mysqllock``.

    What is not given comes from the option file, if there is one, then from ``MYSQL_PWD`` and ``USER``; the defaults
    are root and localhost. Raises `UsageError` if the option file cannot be used, or a socket is given with the name of
    another host.
    """
    return _complete(given, {} if given.defaults_file is None else _read(given.defaults_file))


def from_url(text: str) -> Account:
    """Return the account for ``mysql://[USER@]HOST[:PORT]/[DATABASE][?socket=PATH&defaults-file=PATH]``.

    Other parameters are ``ssl-ca``, ``ssl-capath``, ``ssl-cert``, ``ssl-key``, ``ssl-mode`` and
    ``server-public-key-path``. A password in the URL is refused, because other users can see it in the list of
    processes; ``USER:@`` means an empty password. What the URL does not say comes from the option file that it names,
    or else, unless it has ``USER:@``, from ``~/.my.cnf`` if that exists. ``mysql+ssh://`` goes through the SSH
    connection to the socket on the host, with the option file only if it names one. The word ``ssh`` means the same
    without a password. An empty user is that of the SSH login. Raises `UsageError`; no message quotes the URL.
    """
    if text == "ssh":
        return Account("", "", through_ssh=True)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise UsageError("the URL of the database is not valid", _ENCODE) from None  # its cause quotes the URL
    if url.scheme not in ("mysql", "mysql+ssh") or not text.startswith(f"{url.scheme}://"):
        raise UsageError("the database must be mysql://USER@HOST/, mysql+ssh://USER@/ or the word ssh")
    given = _given(url, port)
    if url.scheme == "mysql":
        return _complete(given, _options_for(given))
    if given.host is not None or given.port is not None or given.network:
        raise UsageError(
            "mysql+ssh:// goes to the socket of the host that is backed up, and takes no host, port or TLS",
            "write mysql+ssh://USER@/ for it",
        )
    options = _options_for(given) if given.defaults_file is not None else {}
    user = given.user if given.user is not None else options.get("user")
    return Account(user or "", _password(given, options), socket=given.socket, through_ssh=True)


def _given(url: SplitResult, port: int | None) -> LoginOptions:
    """Return the options in a URL."""
    try:
        query = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)) if url.query else {}
    except ValueError:
        query = {"": ""}
    network = {name.replace("-", "_"): query.pop(name) for name in _IN_URLS if name in query}
    if url.fragment or set(query) - {"socket", "defaults-file"} or "/" in url.path[1:]:
        known = ", ".join(f"{name}=" for name in ("socket", "defaults-file", *_IN_URLS))
        raise UsageError(f"the URL of the database has more than a database name and {known}", _ENCODE)
    if url.password:
        raise UsageError(
            "the URL of the database contains a password, which others can see in the list of processes",
            "put it in MYSQL_PWD or in an option file of mode 0600 (?defaults-file=PATH)",
        )
    return LoginOptions(
        user=None if url.username is None else unquote(url.username),
        password=None if url.password is None else unquote(url.password),
        host=unquote(url.hostname) if url.hostname else None,
        port=port,
        socket=query.get("socket"),
        database=unquote(url.path[1:]) or None,
        defaults_file=query.get("defaults-file"),
        network=network,
    )


def _options_for(given: LoginOptions) -> Mapping[str, str | None]:
    """Return the options from the file that a URL names, or else, if it has no password, from the user's file."""
    if given.defaults_file is not None:
        return _read(given.defaults_file)
    home = os.path.expanduser(_HOME_FILE)
    return _read(home) if given.password is None and os.path.exists(home) else {}


def _read(path: str) -> Mapping[str, str | None]:
    return optionfiles.read(os.path.expanduser(path), _GROUPS)


def _complete(given: LoginOptions, options: Mapping[str, str | None]) -> Account:
    """Return the account; what is not given comes from the option file and the environment."""
    host = given.host or options.get("host") or "localhost"
    socket = given.socket
    if host == "localhost" and given.port is None and socket is None:
        socket = options.get("socket") or next((path for path in SOCKETS if os.path.exists(path)), None)
    elif host != "localhost" and socket is not None:
        raise UsageError(f"a socket is on this machine, not on {printable(host, 200)}", "give one of the two")
    network = {**options, **given.network}
    return Account(
        user=given.user or options.get("user") or os.environ.get("USER") or "root",
        password=_password(given, options),
        host=host,
        port=given.port if given.port is not None else _port(options.get("port")),
        socket=socket,
        database=given.database or options.get("database"),
        tls=_tls(network) if socket is None else None,
        public_key=_path(network.get("server_public_key_path")) if socket is None else None,
    )


def _tls(options: Mapping[str, str | None]) -> Tls | None:
    """Return how to encrypt, from the options of the clients; None if they do not ask for encryption, or forbid it."""
    for name in options:
        if name in _REFUSED or (name == "ssl_verify_server_cert" and _is_off(options[name])):
            raise UsageError(
                f"{name.replace('_', '-')} is not supported: the server's certificate is always checked",
                "ssl-ca=FILE names the authority of a certificate that this machine does not trust",
            )
    mode = (options.get("ssl_mode") or "").upper()
    if mode not in _MODES:
        raise UsageError(f"ssl-mode={printable(mode, 40)} is unknown", "it is VERIFY_IDENTITY, VERIFY_CA or DISABLED")
    files = {name: _path(options.get(f"ssl_{name}")) for name in ("ca", "capath", "cert", "key")}
    off = mode == "DISABLED" or "skip_ssl" in options or "disable_ssl" in options or _is_off(options.get("ssl", "1"))
    wanted = any(files.values()) or mode in _ENCRYPTED or "ssl" in options or "ssl_verify_server_cert" in options
    if off or not wanted:
        return None
    if mode == "VERIFY_CA" and not (files["ca"] or files["capath"]):
        raise UsageError("ssl-mode=VERIFY_CA needs your own authority", "name its certificate: ssl-ca=FILE")
    return Tls(**files, checks_name=mode != "VERIFY_CA")


def _path(text: str | None) -> str | None:
    return os.path.expanduser(text) if text else None


def _is_off(value: str | None) -> bool:
    """Return whether the value of an option means off. An option without a value is on."""
    return value is not None and value.lower() in ("0", "off", "false")


def _password(given: LoginOptions, options: Mapping[str, str | None]) -> str:
    """Return the given password, or that of the option file, or of the environment, as the clients do; else ""."""
    if given.password is not None:
        return given.password
    value = options.get("password")
    return value if value is not None else os.environ.get("MYSQL_PWD", "")


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise UsageError(f"the option file says port={printable(text, 20)!r}, which is not a port")
    return int(text)
