"""Who logs in to a database and where: URLs, options, option files, environment."""

import traceback
from pathlib import Path

import pytest

from blockdiff.database import accounts
from blockdiff.database.accounts import Account, LoginOptions, Tls, from_options, from_url
from blockdiff.shared.errors import UsageError


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No environment, no sockets, and an empty home: returned."""
    monkeypatch.delenv("MYSQL_PWD", raising=False)
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(accounts, "SOCKETS", (str(tmp_path / "first.sock"), str(tmp_path / "second.sock")))
    return tmp_path


def option_file(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("url", "account"),
    [
        ("mysql://backup@db00/", Account("backup", "", "db00")),
        ("mysql://backup@db00:3307", Account("backup", "", "db00", 3307)),
        ("mysql://backup:@db00/shop", Account("backup", "", "db00", database="shop")),
        ("mysql://p%23%2F%3F%40%3A%25%20%22'@[::1]/d%2Fb", Account("p#/?@:% \"'", "", "::1", database="d/b")),
        ("mysql://p%C3%A9@h/", Account("pé", "", "h")),
        ("mysql://u@localhost/?socket=/run/db.sock", Account("u", "", socket="/run/db.sock")),
        ("mysql://u@/?socket=/run/a%20b.sock", Account("u", "", socket="/run/a b.sock")),
        ("mysql://u@localhost/", Account("u", "")),
        ("mysql:///", Account("me", "")),
        ("ssh", Account("", "", through_ssh=True)),
        ("mysql+ssh://backup@/", Account("backup", "", through_ssh=True)),
        ("mysql+ssh:///?socket=/run/db.sock", Account("", "", socket="/run/db.sock", through_ssh=True)),
        ("mysql://u@h/?ssl-ca=/ca.pem", Account("u", "", "h", tls=Tls("/ca.pem"))),
        ("mysql://u@h/?ssl-mode=required", Account("u", "", "h", tls=Tls())),
        (
            "mysql://u@h/?ssl-ca=/ca.pem&ssl-cert=/c.pem&ssl-key=/k.pem&ssl-mode=VERIFY_CA",
            Account("u", "", "h", tls=Tls("/ca.pem", cert="/c.pem", key="/k.pem", checks_name=False)),
        ),
        ("mysql://u@h/?ssl-mode=PREFERRED", Account("u", "", "h")),
        ("mysql://u@h/?server-public-key-path=/key.pem", Account("u", "", "h", public_key="/key.pem")),
        ("mysql://u@localhost/?socket=/s&ssl-ca=/ca.pem", Account("u", "", socket="/s")),
    ],
)
def test_a_url_says_who_and_where(url: str, account: Account) -> None:
    assert from_url(url) == account


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:hush#et@h/", "more than a database name|not valid"),
        ("mysql://u:hush?et@h/", "more than a database name|not valid"),
        ("mysql://u:hush/et@h/", "more than a database name|not valid"),
        ("mysql://u:hushed@h:x/", "not valid"),
        ("mysql://u:hushed@h:99999/", "not valid"),
        ("mysql://u:hushed@[h/", "not valid"),
        ("mysql://u:hushed@h/?password=hushed", "more than a database name"),
        ("mysql://u:hushed@h/a/b", "more than a database name"),
        ("postgres://u:hushed@h/", "must be mysql://"),
        ("mysql:u:hushed@h", "must be mysql://"),
        ("hushed", "must be mysql://"),
        ("mysql://u@h/?socket=/x", "a socket is on this machine, not on h"),
        ("mysql://u:hushed@h/", "contains a password, which others can see in the list of processes"),
        ("mysql://u:hushed@/?socket=/run/db.sock", "contains a password"),
        ("mysql+ssh://u:hushed@/", "contains a password"),
        ("mysql+ssh://u@h/", "takes no host, port or TLS"),
        ("mysql+ssh://u@/?ssl-ca=/ca.pem", "takes no host, port or TLS"),
        ("mysql://u@h/?ssl-mode=odd", "ssl-mode=ODD is unknown"),
        ("mysql://u@h/?ssl-mode=VERIFY_CA", "needs your own authority"),
        ("mysql://u@h/?ssl-crl=/crl", "more than a database name"),
    ],
)
def test_a_wrong_url_is_told_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_url(url)
    told = "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)
    assert "hush" not in told


def test_an_account_does_not_show_its_password() -> None:
    assert "secret" not in repr(from_options(LoginOptions(password="secret"))) + repr(LoginOptions(password="secret"))


def test_the_hint_says_where_a_password_goes() -> None:
    with pytest.raises(UsageError) as caught:
        from_url("mysql://u:hushed@h/")
    assert "MYSQL_PWD" in str(caught.value.hint) and "?defaults-file=PATH" in str(caught.value.hint)


def test_a_url_without_a_password_has_the_rest_from_the_option_file_at_home(bare: Path) -> None:
    option_file(bare / ".my.cnf", "[client]\nuser=file\npassword='p # w'\nport=3333\n[mysqllock]\nhost=db01\n")
    assert from_url("mysql://backup@db00/") == Account("backup", "p # w", "db00", 3333)
    assert from_url("mysql:///") == Account("file", "p # w", "db01", 3333)
    assert from_url("mysql://backup:@db00/") == Account("backup", "", "db00")
    assert from_url("ssh") == Account("", "", through_ssh=True)


def test_a_url_can_name_an_option_file(bare: Path) -> None:
    option_file(bare / ".my.cnf", "[client]\npassword=home\n")
    path = option_file(bare / "other.cnf", "[client-server]\npassword=other\nsocket=/run/file.sock\n")
    assert from_url(f"mysql://u@db00/?defaults-file={path}") == Account("u", "other", "db00")
    assert from_url(f"mysql:///?defaults-file={path}") == Account("me", "other", socket="/run/file.sock")
    assert from_url(f"mysql+ssh://u@/?defaults-file={path}") == Account("u", "other", through_ssh=True)


def test_the_options_of_the_original_have_its_defaults(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option_file(bare / ".my.cnf", "[client]\npassword=not read\n")
    assert from_options(LoginOptions()) == Account("me", "", "localhost", 3306)
    monkeypatch.delenv("USER")
    assert from_options(LoginOptions(host="db00", password="pw")) == Account("root", "pw", "db00", 3306)


def test_what_is_given_goes_before_the_file_and_the_file_before_the_environment(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYSQL_PWD", "environment")
    path = option_file(bare / "my.cnf", "[client]\nuser=file\npassword=file\n")
    assert from_options(LoginOptions()).password == "environment"
    assert from_options(LoginOptions(defaults_file=path)) == Account("file", "file")
    assert from_options(LoginOptions(defaults_file=path, user="u", password="")) == Account("u", "")
    option_file(bare / "my.cnf", "[client]\npassword\n")
    assert from_options(LoginOptions(defaults_file=path)).password == "environment"


def test_localhost_is_the_socket_where_there_is_one_and_no_port_is_given(bare: Path) -> None:
    second = bare / "second.sock"
    second.touch()
    assert from_options(LoginOptions()).socket == str(second)
    assert from_options(LoginOptions(host="localhost")).socket == str(second)
    assert from_options(LoginOptions(port=3306)).socket is None
    assert from_options(LoginOptions(host="127.0.0.1")).socket is None
    assert from_options(LoginOptions(socket="/own.sock")).socket == "/own.sock"
    path = option_file(bare / "my.cnf", "[client]\nport=3306\n")
    assert from_options(LoginOptions(defaults_file=path)).socket == str(second)


@pytest.mark.parametrize("port", ["0", "65536", "x", "", "²"])
def test_a_port_in_an_option_file_that_is_none_is_an_error(bare: Path, port: str) -> None:
    path = option_file(bare / "my.cnf", f"[client]\nport={port}\n")
    with pytest.raises(UsageError, match="which is not a port"):
        from_options(LoginOptions(defaults_file=path))


@pytest.mark.parametrize(
    ("account", "place"),
    [
        (Account("u", ""), "the database on localhost:3306"),
        (Account("u", "", socket="/s"), "the database at /s"),
        (Account("u", "", through_ssh=True), "the host's own database"),
    ],
)
def test_an_account_says_where_it_is(account: Account, place: str) -> None:
    assert account.place == place


# --- TLS in option files


@pytest.mark.parametrize(
    ("options", "tls"),
    [
        ("", None),
        ("ssl-ca=/ca.pem", Tls("/ca.pem")),
        ("ssl_ca = '/ca.pem'\nssl_mode=VERIFY_CA", Tls("/ca.pem", checks_name=False)),
        ("ssl-capath=/cas\nloose-ssl-cert=/c.pem\nssl-key=/k.pem", Tls(None, "/cas", "/c.pem", "/k.pem")),
        ("ssl", Tls()),
        ("ssl-verify-server-cert", Tls()),
        ("ssl-mode=VERIFY_IDENTITY", Tls()),
        ("ssl=0", None),
        ("ssl-ca=/ca.pem\nssl-mode=disabled", None),
        ("ssl-ca=/ca.pem\nskip-ssl", None),
    ],
)
def test_option_files_say_how_to_encrypt(bare: Path, options: str, tls: Tls | None) -> None:
    path = option_file(bare / "my.cnf", f"[client]\nhost=db00\n{options}\n")
    assert from_options(LoginOptions(defaults_file=path)).tls == tls
    assert from_url(f"mysql://u@db00/?defaults-file={path}").tls == tls
    assert from_options(LoginOptions(defaults_file=path, host="localhost", socket="/s")).tls is None
    assert from_url(f"mysql+ssh://u@/?defaults-file={path}").tls is None


def test_a_url_goes_before_the_option_file(bare: Path) -> None:
    path = option_file(bare / "my.cnf", "[client]\nssl-ca=/ca.pem\n")
    assert from_url(f"mysql://u@h/?defaults-file={path}&ssl-ca=/own.pem").tls == Tls("/own.pem")
    assert from_url(f"mysql://u@h/?defaults-file={path}&ssl-mode=DISABLED").tls is None


@pytest.mark.parametrize(
    "option", ["ssl-crl=/crl", "ssl-fp=ab:cd", "ssl-verify-server-cert=0", "disable-ssl-verify-server-cert"]
)
def test_what_is_not_done_of_the_clients_options_is_refused_by_name(bare: Path, option: str) -> None:
    path = option_file(bare / "my.cnf", f"[client]\nhost=db00\n{option}\n")
    with pytest.raises(UsageError, match=f"{option.partition('=')[0]} is not supported: .* is always checked"):
        from_options(LoginOptions(defaults_file=path))


def test_a_file_that_is_not_the_servers_key_is_refused(bare: Path) -> None:
    path = option_file(bare / "key.pem", "-----BEGIN PRIVATE KEY-----")
    with pytest.raises(UsageError, match=r"key\.pem is not a public key"):
        Account("u", "", public_key=path).server_key()
    with pytest.raises(UsageError, match=r"cannot read the server's public key .*No such file"):
        Account("u", "", public_key=path + ".none").server_key()


def test_what_is_of_a_network(bare: Path) -> None:
    assert Account("u", "", "db00").is_of_network
    assert not Account("u", "", socket="/s").is_of_network and not Account("u", "", through_ssh=True).is_of_network
