"""`blockdiff authorize --key`: exactly one public key is restricted; whatever else the file holds is refused unseen."""

import subprocess
from pathlib import Path

import pytest

from tests import commands
from tests.conftest import require_program


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a key pair of each kind: ed25519, rsa, and two certificates of keys signed by rsa."""
    keygen, place = require_program("ssh-keygen"), tmp_path_factory.mktemp("keys")
    for kind in ("ed25519", "rsa", "ecdsa"):
        make: list[str | Path] = [
            keygen,
            "-q",
            "-t",
            kind,
            "-N",
            "",
            "-C",
            f"the {kind} key of \u20ac",
            "-f",
            place / kind,
        ]
        subprocess.run(make, check=True, timeout=60)
    sign: list[str | Path] = [keygen, "-q", "-s", place / "rsa", "-I", "id", place / "ed25519.pub"]
    subprocess.run(sign, check=True, timeout=60)
    for form in ("RFC4716", "PKCS8", "PEM"):
        other: list[str | Path] = [keygen, "-e", "-m", form, "-f", place / "rsa.pub"]
        (place / form).write_bytes(subprocess.run(other, check=True, capture_output=True, timeout=60).stdout)
    return place


def public(keys: Path, kind: str = "ed25519") -> bytes:
    return (keys / f"{kind}.pub").read_bytes()


def authorized(path: Path) -> bytes:
    """Return what follows the options in the line that is printed."""
    line = commands.done("blockdiff", "authorize", "--key", path, "/dev/vg/lv")
    assert line.startswith(b'restrict,command="') and line.count(b"\n") == 1
    return line.rpartition(b'" ')[2]


def refused(path: Path | str, stdin: bytes = b"") -> str:
    """Return what is said of a key file that is refused; nothing is printed on standard output."""
    result = commands.run("blockdiff", "authorize", "--key", path, "/dev/vg/lv", stdin=stdin)
    assert (result.returncode, result.stdout) == (2, b""), result
    return result.stderr.decode()


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_a_public_key_of_each_kind_is_taken_with_its_comment(keys: Path, kind: str) -> None:
    assert authorized(keys / f"{kind}.pub") == public(keys, kind)


@pytest.mark.parametrize(
    "around",
    [b"%s", b"\n\n  %s\n\n", b"# a comment\r\n\t%s\r\n \t# another\r\n", b"#ssh-rsa AAAA\n%s"],
)
def test_blank_lines_comments_and_carriage_returns_are_left_out(keys: Path, tmp_path: Path, around: bytes) -> None:
    path = tmp_path / "key.pub"
    path.write_bytes(around % public(keys).strip())
    assert authorized(path) == public(keys)


def test_a_key_without_a_comment_and_one_on_standard_input(keys: Path, tmp_path: Path) -> None:
    bare = b" ".join(public(keys).split()[:2])
    path = tmp_path / "key.pub"
    path.write_bytes(bare + b"\r\n")
    assert authorized(path) == bare + b"\n"
    result = commands.run("blockdiff", "authorize", "--key", "-", "/dev/vg/lv", stdin=bare)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.endswith(b'" ' + bare + b"\n")


def test_a_private_key_is_never_printed_and_the_public_one_named(keys: Path, tmp_path: Path) -> None:
    secret = (keys / "ed25519").read_bytes()
    said = refused(keys / "ed25519")
    assert said.splitlines() == [
        f"blockdiff: {keys}/ed25519 is a private key: it must stay on this machine",
        f"  name the public one: --key {keys}/ed25519.pub",
    ]
    alone = tmp_path / "alone"
    alone.write_bytes(b"# a comment\n" + secret + public(keys))
    assert f"ssh-keygen -y -f {alone} > {alone}.pub" in refused(alone)
    assert not any(line.decode() in refused("-", secret) for line in secret.splitlines()[1:-1])
    for first in (b"PuTTY-User-Key-File-3: ssh-rsa", b"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----"):
        (tmp_path / "other").write_bytes(first + b"\r\n")
        assert "is a private key" in refused(tmp_path / "other")


def test_two_keys_are_refused_because_a_line_restricts_one(keys: Path, tmp_path: Path) -> None:
    """The second would get a shell."""
    path = tmp_path / "two.pub"
    path.write_bytes(public(keys) + public(keys, "rsa"))
    assert f"{path} holds 2 public keys, and a line of authorized_keys restricts one" in refused(path)


@pytest.mark.parametrize(
    "options", [b'command="a \\" b",no-pty ', b"restrict\t", b'from="192.0.2.1" ', b"cert-authority  "]
)
def test_options_in_front_are_refused(keys: Path, tmp_path: Path, options: bytes) -> None:
    path = tmp_path / "key.pub"
    path.write_bytes(b"\n" + options + public(keys))
    assert f"line 2 of {path} has options in front of the key" in refused(path)


@pytest.mark.parametrize(
    ("form", "command"),
    [
        ("RFC4716", "ssh-keygen -i -f"),
        ("PKCS8", "ssh-keygen -i -m PKCS8 -f"),
        ("PEM", "ssh-keygen -i -m PEM -f"),
    ],
)
def test_other_forms_are_named_with_what_converts_them(keys: Path, tmp_path: Path, form: str, command: str) -> None:
    said = refused(keys / form)
    assert "is a public key in the form of " in said and f"{command} {keys}/{form} > {keys}/{form}.pub" in said
    converted = subprocess.run([*command.split(), keys / form], check=True, capture_output=True, timeout=60).stdout
    path = tmp_path / "key.pub"
    path.write_bytes(converted)
    assert authorized(path).split() == public(keys, "rsa").split()[:2]


def test_a_certificate_is_refused(keys: Path) -> None:
    assert "is a certificate" in refused(keys / "ed25519-cert.pub")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no public key"),
        (b"\n \n# only a comment\r\n", "holds no public key"),
        (b"root:x:0:0:root:/root:/bin/bash\n", "is not a public key"),
        (b"ssh-ed25519\n", "is not a public key"),
        (b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHrR\n", "is not a public key"),
        (b"ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIHrRmsdBkJpJxybvBclk0WSnIijZzu6AWIeZNtkpEmMk x\n", "is not a public key"),
        (b"ssh-dss AAAAB3NzaC1kc3MAAACBAP x\n", "is a DSA key, which sshd no longer accepts"),
        (b"\x7fELF\xff\xfe\0", "is not text"),
        (b"ssh-ed25519 \0\n", "is not a public key: it holds control characters"),
        (b"ssh-ed25519 A\rssh-rsa B\n", "is not a public key: it holds control characters"),
        (b"x" * 70000, "is too long"),
    ],
)
def test_what_is_not_a_public_key_is_refused_and_not_shown(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    said = refused(path)
    assert words in said and "root:x" not in said and len(said) < 1000
    (tmp_path / "key.pub").touch()
    assert f"name the public one: --key {path}.pub" in refused(path)


def test_a_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert f"cannot read the public key {tmp_path}: Is a directory" in refused(tmp_path)
    assert "No such file or directory" in refused(tmp_path / "none")
