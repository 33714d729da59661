"""SOURCE and [user@]host on the command line."""

from pathlib import Path

import pytest

from blockdiff.shared.errors import UsageError
from blockdiff.transport.address import Address, check_name, parse, parse_login


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/dev/vg/lv", Address(None, "/dev/vg/lv")),
        ("/a:/b", Address(None, "/a:/b")),
        ("/user@host:/b", Address(None, "/user@host:/b")),
        ("/ssh://x", Address(None, "/ssh://x")),
        ("web1:/srv/x.img", Address("web1", "/srv/x.img")),
        ("root@web1:/srv/x.img", Address("web1", "/srv/x.img", "root")),
        ("web1.example.org:/x", Address("web1.example.org", "/x")),
        ("web1:/with space:and@odd/$(x)\n'\"", Address("web1", "/with space:and@odd/$(x)\n'\"")),
        ("web1:/%20", Address("web1", "/%20")),
        ("web1:/", Address("web1", "/")),
        ("[::1]:/x", Address("::1", "/x")),
        ("root@[fe80::1%eth0]:/x", Address("fe80::1%eth0", "/x", "root")),
        ("a b:/x", Address("a b", "/x")),
        ("ssh:/x", Address("ssh", "/x")),
        ("ssh://web1/x", Address("web1", "/x")),
        ("ssh://root@web1:2222/srv/x.img", Address("web1", "/srv/x.img", "root", 2222)),
        ("ssh://web1:1//dev/sda", Address("web1", "//dev/sda", None, 1)),
        ("ssh://web1:65535/x", Address("web1", "/x", None, 65535)),
        ("ssh://[::1]/x", Address("::1", "/x")),
        ("ssh://root@[::1]:22/x", Address("::1", "/x", "root", 22)),
        ("ssh://web1/a%20b%25%ff", Address("web1", "/a b%\udcff")),
        ("ssh://web1/caf\udce9", Address("web1", "/caf\udce9")),
        ("[fe80::1%eth0.100]:/x", Address("fe80::1%eth0.100", "/x")),
        ("root@[fe80::1%br-lan]:/x", Address("fe80::1%br-lan", "/x", "root")),
        ("ssh://[fe80::1%25eth0.100]:22/x", Address("fe80::1%eth0.100", "/x", None, 22)),
        ("ssh://[fe80::1%eth0.100]/x", Address("fe80::1%eth0.100", "/x")),
        ("ssh://me%40example.org@web1/x", Address("web1", "/x", "me@example.org")),
        ("ssh://CORP%5Cme@web1/x", Address("web1", "/x", "CORP\\me")),
        ("CORP\\me@web1:/x", Address("web1", "/x", "CORP\\me")),
    ],
)
def test_sources(text: str, expected: Address) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relative/path",
        "./x",
        "host",
        "host:",
        ":/x",
        "@host:/x",
        "user@:/x",
        "a@b@c:/x",
        "::1:/x",
        "[::1:/x",
        "user@host/x:/y",
        "ssh://",
        "ssh://host",
        "ssh:///x",
        "ssh://user@/x",
        "ssh://::1/x",
        "ssh://host/x%00",
        "ssh://us%00er@host/x",
        "http://host/x",
    ],
)
def test_what_is_no_source_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert text[:10] in caught.value.message
    assert caught.value.hint == "use /path, [user@]host:/path or ssh://[user@]host[:port]/path"
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(("text", "hint"), [("host:images/x", "write host:/PATH"), ("me@h:x", "write me@h:/PATH")])
def test_a_path_on_a_host_must_begin_with_a_slash(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="the path on the host must begin with /") as caught:
        parse(text)
    assert caught.value.hint == hint


@pytest.mark.parametrize("text", ["disk.img", "./disk.img", "sub/../disk.img", "sub//../disk.img"])
def test_a_file_of_this_machine_gets_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(text) == Address(None, str(tmp_path.resolve() / "disk.img"))


def test_a_path_through_a_link_means_what_it_means_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "sub").mkdir(parents=True)
    (tmp_path / "far" / "disk.img").touch()
    (tmp_path / "link").symlink_to("far/sub")
    monkeypatch.chdir(tmp_path)
    assert parse("link/../disk.img") == Address(None, str(tmp_path.resolve() / "far" / "disk.img"))


@pytest.mark.parametrize("name", ["web1:/dev/vg/lv", "root@web1:/x", "ssh://web1/x", "[::1]:/x"])
def test_a_name_that_is_a_source_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is in the place of NAME, but is a source") as caught:
        check_name(name)
    assert caught.value.hint == "NAME comes first: blockdiff backup NAME SOURCE"


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_name_that_is_a_directory_is_refused(tmp_path: Path, slash: str) -> None:
    with pytest.raises(UsageError, match="is a directory, not the NAME of a chain") as caught:
        check_name(f"{tmp_path}{slash}")
    assert caught.value.hint == f"NAME is what the files of the chain begin with, such as {tmp_path}/web1-disk"
    Path(f"{tmp_path}.ver").touch()  # a chain beside a directory of its name
    check_name(f"{tmp_path}{slash}")


@pytest.mark.parametrize("name", ["/var/backup/web1", "web1", "x:y", "a/b:/c"])
def test_a_name_that_is_one_is_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "", "٣", "1e3", "99999999999999999999"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match="no port between 1 and 65535"):
        parse(f"ssh://host:{port}/x")


@pytest.mark.parametrize(
    "text", ["-oProxyCommand=x:/y", "root@-x:/y", "-l@host:/y", "ssh://-x/y", "ssh://-u@host:22/y"]
)
def test_a_host_or_user_that_would_be_an_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a host or user cannot begin with a dash"):
        parse(text)


@pytest.mark.parametrize("text", ["/x\0", "host:/x\0y", "ho\0st:/x", "ssh://host/x\0"])
def test_a_nul_character_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NUL"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web1", Address("web1", "")),
        ("root@web1", Address("web1", "", "root")),
        ("root@[::1]", Address("::1", "", "root")),
    ],
)
def test_logins(text: str, expected: Address) -> None:
    assert parse_login(text) == expected


@pytest.mark.parametrize("text", ["", "host:22", "host:/x", "a@b@c", "user@", "/x"])
def test_what_is_no_login_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot understand the host") as caught:
        parse_login(text)
    assert caught.value.hint == "use [user@]host"


@pytest.mark.parametrize("text", ["-x", "-x@host", "user@-x"])
def test_a_login_that_would_be_an_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot begin with a dash"):
        parse_login(text)


def test_a_login_is_shown_without_control_characters() -> None:
    assert Address(None, "/x").login == "localhost"
    assert Address("web1", "/x").login == "web1"
    assert Address("web1", "/x", "root").login == "root@web1"
    assert Address("we\x1b[2Jb", "/x", "ro\not").login == "ro\\not@we\\x1b[2Jb"


def test_an_error_shows_no_control_characters() -> None:
    with pytest.raises(UsageError) as caught:
        parse("rel\x1b[2J\n")
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message
