"""Logins to the database of a host: every way in, what each refusal says, and that no password shows anywhere."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from tests import commands
from tests.lab.shop import Shop

pytestmark = pytest.mark.timeout(900)  # a few seconds for each on a machine that has nothing else to do

PASSWORD = 'it\'s #1 "b\\ack" é@/:%?'
_README = (Path(__file__).parents[2] / "README.md").read_text()
_GRANT = re.search(r"^GRANT ([A-Z ,]+) ON \*\.\* TO backup@\.\.\.; +-- MariaDB$", _README, re.MULTILINE)
assert _GRANT is not None, "README.md has no GRANT line for MariaDB"
PRIVILEGES = _GRANT[1].split(", ")
USER = "od d"
_SECRETS = [PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), "b\\ack", "b%5Cack", "b\\\\ack"]


class Login(NamedTuple):
    """What follows ``--mysql``, and the environment for it."""

    url: str
    env: "dict[str, str]"


@pytest.fixture(scope="module")
def shop(open_shop: Shop) -> Shop:
    """The shop, where the user may do exactly what README.md says, through the network and the socket."""
    open_shop.database.run(
        *_user(USER, "%", PRIVILEGES), *_user(USER, "localhost", PRIVILEGES), *_user("lacking", "%", [])
    )
    return open_shop


def _user(name: str, host: str, privileges: list[str]) -> list[str]:
    account = f"'{name}'@'{host}'"
    literal = PASSWORD.replace("\\", "\\\\").replace("'", "''")
    grants = [f"GRANT {', '.join(privileges)} ON *.* TO {account}"] if privileges else []
    return [f"CREATE USER {account} IDENTIFIED BY '{literal}'", *grants]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain to which every login that works adds a generation."""
    return tmp_path_factory.mktemp("backup") / "shop"


def option_file(path: Path, user: str = USER) -> None:
    """Write an option file as one would by hand: quotes around the password, and backslashes where they must be."""
    password = PASSWORD.replace("\\", "\\\\").replace('"', '\\"')
    path.write_text(f'[client]\nuser = "{user}"\npassword = "{password}" # of the shop\n')
    path.chmod(0o600)


def login(how: str, shop: Shop, home: Path) -> Login:
    """Return one of the ways to log in; `home` is a directory for its files."""
    env = {"HOME": str(home)}
    user, port = quote(USER), shop.database.port
    if how == "unix_socket":
        return Login("ssh", env)
    if how == "MYSQL_PWD":
        return Login(f"mysql://{user}@127.0.0.1:{port}/", {**env, "MYSQL_PWD": PASSWORD})
    if how == "MYSQL_PWD through SSH":
        return Login(f"mysql+ssh://{user}@/", {**env, "MYSQL_PWD": PASSWORD})
    if how == "~/.my.cnf":
        option_file(home / ".my.cnf")
        return Login(f"mysql://127.0.0.1:{port}/", env)
    (home / "conf.d").mkdir()
    option_file(home / "conf.d" / "login.cnf")
    (home / "main.cnf").write_text(f"[client]\nuser=somebody\n!includedir {home}/conf.d\n")
    return Login(f"mysql://127.0.0.1:{port}/?defaults-file={quote(str(home / 'main.cnf'))}", env)


WAYS = ["unix_socket", "MYSQL_PWD", "MYSQL_PWD through SSH", "~/.my.cnf", "!includedir"]


class Run(NamedTuple):
    """A run that has ended, and the command lines of all processes that were there meanwhile, its own left out."""

    status: int
    printed: str
    said: str
    seen: "set[str]"


def run(shop: Shop, name: Path, way: Login, *words: str) -> Run:
    arguments = [shop.guest.url(shop.volume), *shop.arguments("--mysql", way.url, *words)]
    seen: set[str] = set()
    with commands.started("blockdiff", "backup", name, *arguments, env=way.env) as process:
        while process.poll() is None:
            seen |= command_lines(process.pid)
            time.sleep(0.05)
        printed, said = process.communicate(timeout=60)
    return Run(process.returncode, printed.decode(), said.decode(), seen)


def command_lines(but: int) -> "set[str]":
    """Return the command lines of all processes of this machine, but for one and ourselves."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if int(path.parent.name) not in (but, os.getpid()):
            try:
                found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # it has ended
    return found


def assert_no_secret(texts: "list[str]", directory: Path) -> None:
    """No password in these texts, nor in what is written about the chain."""
    texts = texts + [path.read_text() for path in directory.iterdir() if path.suffix in (".json", ".ver")]
    for text in texts:
        assert not [secret for secret in _SECRETS if secret in text], text


def assert_refused(shop: Shop, name: Path, way: Login, *words: str) -> str:
    """A run is refused before anything is made anywhere; return what it says."""
    before = shop.changes()
    ended = run(shop, name, way)
    assert (ended.status, ended.printed) == (1, ""), ended.said
    for word in words:
        assert word in ended.said
    assert shop.changes() == before, "something was made in the volume group"
    assert [path.name for path in name.parent.iterdir() if not path.name.endswith(".lock")] == []
    assert_no_secret([ended.said, *ended.seen], name.parent)
    return ended.said


@pytest.mark.parametrize("how", WAYS)
def test_a_login_works_and_no_secret_shows(shop: Shop, name: Path, tmp_path: Path, how: str) -> None:
    ended = run(shop, name, login(how, shop, tmp_path))
    assert (ended.status, ended.said) == (0, "")
    assert '"by": "mysql"' in ended.printed and '"consistency": "quiesced"' in ended.printed
    assert any("blockdiff-agent" in line for line in ended.seen), "no process was seen"
    assert_no_secret([ended.printed, *ended.seen], name.parent)


def test_on_the_host_no_secret_shows_either(shop: Shop, name: Path, tmp_path: Path) -> None:
    look = "while :; do cat /proc/[0-9]*/cmdline; sleep 0.1; done 2>/dev/null | tr '\\0' ' ' >/run/seen"
    with shop.guest.started(look), slow_lvcreate(shop):
        ended = run(shop, name, login("MYSQL_PWD through SSH", shop, tmp_path))
        assert (ended.status, ended.said) == (0, "")
    seen = shop.guest.get("/run/seen").decode(errors="replace")
    assert "blockdiff-agent" in seen and "lvcreate" in seen
    assert_no_secret([seen], name.parent)
    journal = shop.guest.output("journalctl --no-pager -o cat; cat /var/log/auth.log 2>/dev/null || true")
    assert_no_secret([journal], name.parent)


@contextmanager
def slow_lvcreate(shop: Shop) -> Iterator[None]:
    """Let lvcreate be there for long enough to be seen."""
    wrapper = "/usr/local/bin/lvcreate"
    shop.guest.put(wrapper, b'#!/bin/sh\nsleep 2\nexec /usr/sbin/lvcreate "$@"\n')
    shop.guest.run(f"chmod 755 {wrapper}")
    try:
        yield
    finally:
        shop.guest.run(f"rm {wrapper}")


@pytest.mark.parametrize("missing", PRIVILEGES)
def test_a_missing_privilege_names_itself_before_anything_is_made(shop: Shop, tmp_path: Path, missing: str) -> None:
    rest = ", ".join(privilege for privilege in PRIVILEGES if privilege != missing)
    shop.database.run("REVOKE ALL PRIVILEGES, GRANT OPTION FROM lacking@'%'", f"GRANT {rest} ON *.* TO lacking@'%'")
    way = Login(shop.url("lacking"), {"MYSQL_PWD": PASSWORD, "HOME": str(tmp_path)})
    grant = f"GRANT {missing} ON *.* TO `lacking`@`%`"
    assert_refused(shop, tmp_path / "shop", way, f"lacking lacks the privilege {missing}", grant)
    shop.database.run(grant)  # the hint, as it is


@pytest.mark.parametrize("through_ssh", [False, True], ids=["tcp", "ssh"])
@pytest.mark.parametrize("user", [USER, "no body"])
def test_a_login_that_fails_names_itself_before_anything_is_made(
    shop: Shop, tmp_path: Path, user: str, through_ssh: bool
) -> None:
    place = "the host's own database" if through_ssh else f"the database on 127.0.0.1:{shop.database.port}"
    url = f"mysql+ssh://{quote(user)}@/" if through_ssh else shop.url(quote(user))
    way = Login(url, {"MYSQL_PWD": PASSWORD + "!", "HOME": str(tmp_path)})
    assert_refused(
        shop,
        tmp_path / "shop",
        way,
        f"cannot log in to {place} as {user}: ",
        "Access denied",
        "check user and password",
    )


def test_an_option_file_that_others_can_read_is_refused(shop: Shop, tmp_path: Path) -> None:
    way = login("!includedir", shop, tmp_path)
    (tmp_path / "conf.d" / "login.cnf").chmod(0o644)
    (tmp_path / "backup").mkdir()
    ended = run(shop, tmp_path / "backup" / "shop", way)
    assert ended.status == 2
    assert f"the option file {tmp_path}/conf.d/login.cnf contains a password and can be read by others" in ended.said
    assert_no_secret([ended.said], tmp_path / "backup")


# the original's way


def original(shop: Shop, directory: Path) -> "dict[str, str]":
    """Return an environment in which `ssh` finds the guest: the old commands know no port."""
    options = " ".join(f"-o '{option}'" for option in [*shop.guest.options, f"Port={shop.guest.port}"])
    (directory / "path").mkdir()
    wrapper = directory / "path" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o700)
    return {"PATH": f"{wrapper.parent}:{commands.PATH}", "SNAPSHOT_SIZE": "60M", "HOME": str(directory)}


@pytest.mark.parametrize("given", ["MYSQL_PWD", "--password"])
def test_mysqllock_holds_the_lock_for_the_old_commands(shop: Shop, tmp_path: Path, given: str) -> None:
    (tmp_path / "backup").mkdir()
    name = tmp_path / "backup" / "shop"
    prefix = f"mysqllock --host=127.0.0.1 --port={shop.database.port} --user='{USER}'"
    env = original(shop, tmp_path)
    if given == "MYSQL_PWD":
        env["MYSQL_PWD"] = PASSWORD
    else:
        prefix += " --password=" + shlex.quote(PASSWORD)
    env["LVCREATE_PREFIX"] = prefix
    words = ("ssh_lvm_dump", "--gzip", shop.guest.login, shop.volume)
    result = commands.run("blockdiff_backup", name, *words, env=env, timeout_s=240)
    said = result.stderr.decode()
    assert (result.returncode, result.stdout) == (0, b""), said
    lines = [line for line in said.splitlines() if line.startswith(("issuing", "backup"))]
    assert lines == [
        "issuing lock statement: BACKUP STAGE START",
        "issuing lock statement: BACKUP STAGE BLOCK_COMMIT",
        "issuing unlock statement: BACKUP STAGE END",
        "backup completed successfully",
    ]
    files = [f"shop.{end}" for end in ("1.gz", "1.json", "1.md5", "ver")]
    assert sorted(path.name for path in name.parent.glob("shop*")) == files
    shop.assert_no_snapshot()
    assert_no_secret([said], name.parent)


def test_mysqllock_with_a_wrong_password_means_no_snapshot_and_no_generation(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    name, before = tmp_path / "backup" / "shop", shop.changes()
    prefix = f"mysqllock --host=127.0.0.1 --port={shop.database.port} --user='{USER}'"
    env = {**original(shop, tmp_path), "LVCREATE_PREFIX": prefix, "MYSQL_PWD": PASSWORD + "!"}
    words = ("ssh_lvm_dump", "--gzip", shop.guest.login, shop.volume)
    result = commands.run("blockdiff_backup", name, *words, env=env, timeout_s=240)
    said = result.stderr.decode()
    assert result.returncode == 1
    assert f"cannot log in to the database on 127.0.0.1:{shop.database.port} as {USER}: " in said
    assert "the command in LVCREATE_PREFIX exited with status 1 without executing what it was given" in said
    assert "issuing" not in said
    assert shop.changes() == before
    assert not list(name.parent.glob("shop*"))
    assert_no_secret([said], name.parent)
