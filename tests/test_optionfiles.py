"""Option files of MySQL and MariaDB: their own rules, proved against their own reader."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff.database import optionfiles
from blockdiff.shared.errors import UsageError
from tests.conftest import require_program

GROUPS = ("client", "mysqllock")


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(mode)
    return str(path)


def options(tmp_path: Path, text: str) -> dict[str, str | None]:
    return optionfiles.read(write(tmp_path / "my.cnf", text), GROUPS)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("password=plain", "plain"),
        ("  password  =  white around  \r", "white around"),
        ("password=cut # off", "cut"),
        ("password=cut#off", "cut"),
        ('password="with # inside"', "with # inside"),
        ("password='with # inside'  # and behind", "with # inside"),
        ("password=not;cut ; at all", "not;cut ; at all"),
        ("password=it's # kept", "it's # kept"),
        ("""password='other " quote'""", 'other " quote'),
        (r'''password="an escaped \" # quote"''', 'an escaped " # quote'),
        (r"password=a\sb\tc\nd\re\bf\\g\'h", "a b\tc\nd\re\bf\\g'h"),
        (r"password=out\'side # kept", "out'side # kept"),
        (r"password=\a\%\_", r"\a\%\_"),
        ("password=ends with \\", "ends with \\"),
        ("password=a=b==c", "a=b==c"),
        ('password=""', ""),
        ("password=", ""),
        ('password="', '"'),
        ("password=''quotes''", "'quotes'"),
        ("password", None),
        ("password # only a comment", None),
        ("password=žluťoučký 密码", "žluťoučký 密码"),
        ("loose-password=x", "x"),
        ("loose_password=x", "x"),
    ],
)
def test_a_line_means_what_it_means_to_the_clients(tmp_path: Path, line: str, value: str | None) -> None:
    assert options(tmp_path, f"[client]\n{line}\n") == {"password": value}


def test_dashes_and_underscores_in_names_are_one(tmp_path: Path) -> None:
    assert options(tmp_path, "[client]\ndefault-character_set=a-b_c") == {"default_character_set": "a-b_c"}


def test_only_the_groups_asked_for_are_read_and_the_later_line_wins(tmp_path: Path) -> None:
    text = "# c\n; c\n\n[mysqllock]\nuser=a\n[mysqld]\nuser=no\n[ client]\nuser=no\n[client ] junk\nuser=b\nport=1\n"
    assert options(tmp_path, text) == {"user": "b", "port": "1"}


def test_files_include_others_where_they_say_so(tmp_path: Path) -> None:
    directory = tmp_path / "conf.d"
    directory.mkdir()
    write(directory / "b.cnf", "[client]\nuser=b\nhost=b\n")
    write(directory / "a.cnf", "[client]\nuser=a\nport=1\n")
    write(directory / "c.cnf.bak", "[client]\nuser=no\n")
    write(tmp_path / "one", "[client]\nhost=one\n")
    text = f"[client]\nuser=first\n!includedir {directory}\n!include {tmp_path / 'one'}\n!include {tmp_path / 'none'}\n"
    assert options(tmp_path, text) == {"user": "b", "host": "one", "port": "1"}
    assert options(tmp_path, text + "user=last") == {"user": "last", "host": "one", "port": "1"}


def test_files_that_include_each_other_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"my.cnf, line 1: files include each other more than 10 deep"):
        options(tmp_path, f"!include {tmp_path / 'my.cnf'}")


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: cannot read the directory .*missing: No such file"):
        options(tmp_path, f"!includedir {tmp_path / 'missing'}")


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the option file .*missing: No such file"):
        optionfiles.read(str(tmp_path / "missing"), GROUPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[client\npassword=secret", "line 1: a group without"),
        ("password=secret", "line 1: an option before the first"),
    ],
)
def test_a_fault_in_a_file_is_told_without_a_secret(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        options(tmp_path, text)
    assert "secret" not in repr(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_password_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "my.cnf", "[client]\npassword=secret\n", mode)
    with pytest.raises(UsageError, match="contains a password and can be read by others") as caught:
        optionfiles.read(path, GROUPS)
    assert caught.value.hint == f"chmod 600 {path}"


def test_an_included_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    included = write(tmp_path / "one.cnf", "[client]\npassword=secret\n", 0o644)
    with pytest.raises(UsageError, match=r"one.cnf contains a password"):
        options(tmp_path, f"!include {included}")


@pytest.mark.parametrize("text", ["[client]\nuser=x\n", "[client]\npassword\n", "[other]\npassword=x\n"])
def test_a_file_without_a_password_of_ours_may_be_read_by_others(tmp_path: Path, text: str) -> None:
    optionfiles.read(write(tmp_path / "my.cnf", text, 0o644), GROUPS)


def quoted(value: str) -> str:
    """Return a value as one would write it into an option file by the manual."""
    names = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b"}
    return '"' + "".join(names.get(character, character) for character in value) + '"'


_SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@_SHARED
@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_any_password_survives_being_written_by_the_manual(tmp_path: Path, password: str) -> None:
    assert options(tmp_path, f"[client]\npassword={quoted(password)}\n") == {"password": password}


@settings(_SHARED, max_examples=150)
@given(st.text("ab #;'\"\\=-_\tn", max_size=12))
def test_a_line_is_read_as_by_mariadb_itself(tmp_path: Path, line: str) -> None:
    reader = require_program("my_print_defaults")
    path = write(tmp_path / "my.cnf", f"[client]\nx{line}\n")
    printed = subprocess.run(
        [reader, f"--defaults-file={path}", "client"], capture_output=True, timeout=30, check=True
    ).stdout.decode()
    ((name, value),) = optionfiles.read(path, GROUPS).items()
    theirs, equals, their_value = printed.removeprefix("--").removesuffix("\n").partition("=")
    assert name == theirs.replace("-", "_")
    assert value == (their_value if equals else None)


def test_the_file_s_encoding_is_kept(tmp_path: Path) -> None:
    raw = "\udcff\udcfe"
    assert os.fsencode(str(options(tmp_path, f"[client]\npassword={raw}")["password"])) == b"\xff\xfe"
