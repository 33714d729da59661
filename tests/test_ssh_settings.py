"""Settings of ssh and known_hosts mean the same over both transports, or paramiko's refuses them by name."""

import shutil
import subprocess
from pathlib import Path

import pytest

from blockdiff import transport as transports
from blockdiff.shared.errors import BlockdiffError, TransportError, UsageError
from blockdiff.transport import NAMES, address, connection, sshconfig
from blockdiff.transport.address import Address
from tests.sshd import Sshd


@pytest.fixture(params=NAMES)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reach(sshd: Sshd, transport: str, *options: str, source: str | None = None) -> BlockdiffError | None:
    """Start the agent, and return why that was not possible."""
    try:
        with transports.connect(address.parse(source or sshd.url("/x")), transport, options) as made:
            connection.push_agent(made)
    except BlockdiffError as error:
        return error
    return None


ACCEPTED = "accepted"
UNKNOWN = "is not known"
CHANGED = "has changed: the connection may be intercepted"
REVOKED = "is revoked"


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ("{name} {key}", ACCEPTED),
        ("{name} {key} a comment\r\n", ACCEPTED),
        ("other,{name},*.example.org {key}", ACCEPTED),
        ("[127.0.?.*]:{port} {key}", ACCEPTED),
        ("* {key}", ACCEPTED),
        ("*,!{name},!127.0.0.1 {key}", UNKNOWN),
        ("127.0.0.1 {key}", ACCEPTED),  # without the port
        ("127.0.0.1 {other}", UNKNOWN),
        ("{name} {other}", CHANGED),
        ("{name} {other}\n127.0.0.1 {key}", CHANGED),
        ("{name} {other}\n{name} {key}", ACCEPTED),
        ("@revoked {name} {key}", REVOKED),
        ("{name} {key}\n@revoked * {key}", REVOKED),
        ("@revoked * {other}\n{name} {key}", ACCEPTED),
        ("# {name} {key}", UNKNOWN),
        ("", UNKNOWN),
        (
            "garbage\n{name} ssh-ed25519\n{name} ssh-ed25519 %%%\n{name} what AAAA\n|1|x|y {key}\n\n{name} {key}",
            ACCEPTED,
        ),
        ("# caf\udce9\nh\udce9te {key}\n{name} {key}", ACCEPTED),
    ],
)
def test_known_hosts_means_the_same_over_both_transports(
    sshd: Sshd, transport: str, tmp_path: Path, lines: str, verdict: str
) -> None:
    keys = {
        "key": " ".join(sshd.host_key.with_suffix(".pub").read_text().split()[:2]),
        "other": " ".join(sshd.user_key.with_suffix(".pub").read_text().split()[:2]),
    }
    text = lines.format(name=f"[127.0.0.1]:{sshd.port}", port=sshd.port, **keys)
    known = tmp_path / "known"
    known.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n")
    options = [f"UserKnownHostsFile={known}", f"IdentityFile={sshd.user_key}", "GlobalKnownHostsFile=/dev/null"]
    error = reach(sshd, transport, *options)
    if verdict == ACCEPTED:
        assert error is None
    else:
        assert error is not None and error.message.startswith(f"the host key of {sshd.login} {verdict}"), error


def test_hashed_names_are_known(sshd: Sshd, transport: str, tmp_path: Path) -> None:
    known = tmp_path / "known"
    shutil.copy(sshd.known_hosts, known)
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert known.read_text().startswith("|1|")
    assert reach(sshd, transport, f"UserKnownHostsFile={known}", f"IdentityFile={sshd.user_key}") is None


def test_a_file_of_known_hosts_replaces_the_users_own(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that the file contradicts is refused, although the user's own file knows it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    shutil.copy(sshd.known_hosts, tmp_path / ".ssh" / "known_hosts")
    assert reach(sshd, "paramiko", f"IdentityFile={sshd.user_key}") is None
    kind, other = sshd.user_key.with_suffix(".pub").read_text().split()[:2]
    (tmp_path / "file").write_text(f"[127.0.0.1]:{sshd.port} {kind} {other}\n")
    error = reach(sshd, "paramiko", f"IdentityFile={sshd.user_key}", f"UserKnownHostsFile={tmp_path}/file")
    assert error is not None and CHANGED in error.message


def test_options_mean_the_same_over_both_transports(sshd: Sshd, transport: str, tmp_path: Path) -> None:
    kind, key = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    (tmp_path / "global").write_text(f"web1 {kind} {key}\n")
    options = [
        f"IdentityFile {tmp_path}/missing",
        f"identityfile={sshd.user_key}",
        "IdentitiesOnly yes",
        f"UserKnownHostsFile={tmp_path}/none {tmp_path}/nothing",
        f"GlobalKnownHostsFile = {tmp_path}/global",
        "HostKeyAlias=web1",
        "ConnectTimeout=none",
        "HostName=127.0.0.1",
        f"Port={sshd.port}",
        "Port=1",  # the first counts
        f"User={sshd.user}",
    ]
    assert reach(sshd, transport, *options, source="anything:/x") is None


@pytest.mark.parametrize(
    "text",
    [
        "# caf\udce9\n{all}",
        "ConnectTimeout none\n{all}",
        "Compression yes\nServerAliveInterval 5\nForwardAgent no\nProxyCommand none\nProxyJump none\n{all}",
        "Include sub/*.conf\n",
        "Host other\n  Port 1\nInclude sub/*.conf\n",
        "Host backed*\n  Include {home}/.ssh/sub/a.conf\n",
        "Match host backed-up-host\n{all}",
        'Port = "{port}"  # a comment\nPort 1\n{all}',
        "UserKnownHostsFile {home}/none {known}\n{all}",
        "IdentityFile {home}/none\n{all}",
        "HostKeyAlias alias\nUserKnownHostsFile {home}/alias\n{all}",
    ],
)
def test_what_the_file_says_is_what_ssh_would_do(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh" / "sub").mkdir(parents=True)
    kind, key = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
    (tmp_path / "alias").write_text(f"alias {kind} {key}\n")
    every = (
        f"HostName 127.0.0.1\nPort {sshd.port}\nUser {sshd.user}\nIdentityFile {sshd.user_key}\n"
        f"UserKnownHostsFile {sshd.known_hosts}\n"
    )
    (tmp_path / ".ssh" / "sub" / "a.conf").write_text(every)
    said = text.format(all=every, port=sshd.port, home=tmp_path, known=sshd.known_hosts)
    if text.startswith("Host other"):
        said = said.replace("Include", "Host *\nInclude")
    (tmp_path / ".ssh" / "config").write_bytes(said.encode("utf-8", "surrogateescape"))
    assert reach(sshd, "paramiko", source="backed-up-host:/x") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ProxyJump bastion\n", "sets proxyjump, which paramiko's transport does not support"),
        ("ProxyCommand nc %h %p\n", "sets proxycommand, which"),
        ("Host *\n  Ciphers aes256-ctr\n", "sets ciphers, which"),
        ("CertificateFile ~/x\n", "sets certificatefile, which"),
        ("Bogus yes\n", "sets bogus, which"),
        ("Port 22x\n", "Port cannot be 22x"),
        ("ConnectTimeout soon\n", "ConnectTimeout cannot be soon"),
        ("Port\n", "cannot read {home}/.ssh/config: "),
        ("Match nonsense x\n", "cannot read {home}/.ssh/config: Match nonsense"),
        ("Include {home}/.ssh/config\n", "cannot read {home}/.ssh/config: "),
        ("Host a*\nInclude sub.conf\n", "cannot read {home}/.ssh/config: Include of conditions within a condition"),
    ],
)
def test_what_the_file_says_and_paramiko_cannot_do_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "sub.conf").write_text("Host x\n  Port 1\n")
    (tmp_path / ".ssh" / "config").write_text(text.format(home=tmp_path))
    with pytest.raises(TransportError) as caught:
        sshconfig.read(Address("web1", "/x"), ())
    assert words.format(home=tmp_path) in caught.value.message
    assert caught.value.hint is not None


def test_what_the_file_says_of_other_hosts_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host web2\n  ProxyJump bastion\nHost web1\n  Port 77\n")
    assert sshconfig.read(Address("web1", "/x"), ()).port == 77


@pytest.mark.parametrize("option", ["ProxyJump=x", "StrictHostKeyChecking=no", "Ciphers=x", "Prot=22"])
def test_an_option_that_paramiko_does_not_have_is_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match=f"paramiko has no option {option.split('=')[0]}"):
        sshconfig.read(Address("web1", "/x"), [option])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("Port=0", "Port cannot be 0"),
        ("Port=x", "Port cannot be x"),
        ("ConnectTimeout=1y", "ConnectTimeout cannot be 1y"),
        ("Port", "--ssh-option Port has no value"),
        ("IdentityFile=%d/x", "does not know the tokens in"),
        ('UserKnownHostsFile="x', "cannot understand the paths"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(option: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sshconfig.read(Address("web1", "/x"), [option])


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7.0), ("1m30s", 90.0), ("2H", 7200.0), ("none", None), ("0", None)]
)
def test_times_are_those_of_ssh(text: str, seconds: float | None) -> None:
    assert sshconfig.read(Address("web1", "/x"), [f"ConnectTimeout={text}"]).timeout_s == seconds


def test_a_private_key_that_is_none_is_refused_with_a_sentence(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n\xff\xfe\n-----END\n")
    options = [f"IdentityFile={tmp_path}/key", "IdentitiesOnly=yes", f"UserKnownHostsFile={sshd.known_hosts}"]
    error = reach(sshd, "paramiko", *options)
    assert error is not None and error.message.startswith(f"{sshd.login} refused the login: ")
