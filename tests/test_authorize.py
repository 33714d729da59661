"""A key that may do one thing: this very agent, for some sources, through a real sshd, and behind sudo."""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from blockdiff.host import loader
from blockdiff.session.requests import RunRequest, SourceRequest
from blockdiff.session.session import Session
from blockdiff.transport import address, bundle
from tests import chains, commands, loop
from tests.chains import DAYS, SmallChain
from tests.conftest import require, require_program
from tests.sshd import Sshd


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(DAYS[0])
    chain.images[1] = DAYS[0]
    return chain


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)
    return path


def authorize(key: Path, *granted: str | Path) -> str:
    result = commands.run("blockdiff", "authorize", "--key", key.with_suffix(".pub"), *granted)
    assert result.returncode == 0, result
    return os.fsdecode(result.stdout)


def options(sshd: Sshd, key: Path) -> list[str]:
    return [f"IdentityFile={key}", f"UserKnownHostsFile={sshd.known_hosts}"]


def backup(sshd: Sshd, key: Path, chain: SmallChain, *more: str) -> "subprocess.CompletedProcess[bytes]":
    words = [word for option in options(sshd, key) for word in ("--ssh-option", option)]
    return commands.run("blockdiff", "backup", chain.name, sshd.url(chain.source), *words, *more)


def refused(result: "subprocess.CompletedProcess[bytes]", *words: str) -> None:
    assert (result.returncode, result.stdout) == (1, b""), result
    said = result.stderr.decode()
    assert said.startswith("blockdiff: ") and all(word in said for word in words), said


@pytest.mark.parametrize("transport", ["ssh", "paramiko"])
def test_a_pinned_key_backs_up_its_source(sshd: Sshd, key: Path, chain: SmallChain, transport: str) -> None:
    line = authorize(key, chain.source)
    assert line.startswith('restrict,command="') and line.endswith("\n") and line.count("\n") == 1
    sshd.allow(line)
    result = backup(sshd, key, chain, "--transport", transport)
    assert (result.returncode, result.stderr) == (0, b"")
    chain.assert_sound()


def test_a_pinned_key_reads_nothing_else_and_runs_nothing(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    other = chain.source.with_name('it\'s "other"')
    other.write_bytes(DAYS[1])
    sshd.allow(authorize(key, other, "mysql:/nowhere/mysqld.sock"))
    refused(backup(sshd, key, chain), f"this key may not read {chain.source}", "blockdiff authorize")
    refused(backup(sshd, key, chain, "--lvm"), f"this key may not read {chain.source}")
    command = ["ssh", "-F", "none", *(word for option in options(sshd, key) for word in ("-o", option))]
    marker = chain.source.with_name("marker")
    login = [*command, "-p", str(sshd.port), sshd.login, f"touch {shlex.quote(str(marker))}"]
    assert subprocess.run(login, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode != 0
    assert not marker.exists()
    chain.source = other
    chain.images[1] = DAYS[1]
    assert backup(sshd, key, chain).returncode == 0
    chain.assert_sound()


def test_a_pinned_key_takes_no_command_and_no_prefix(
    sshd: Sshd, key: Path, chain: SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sshd.allow(authorize(key, chain.source))
    marker = chain.source.with_name("marker")
    refused(backup(sshd, key, chain, "--lvm", "--before", f"touch {marker}"), "this key may not run commands: touch")
    monkeypatch.setenv("SSH_BLOCKDIFF_PREFIX", f"sh -c 'touch {marker}'")
    refused(backup(sshd, key, chain), "this key runs nothing but the agent")
    assert not marker.exists()


def test_a_pinned_key_connects_to_no_other_socket(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    sshd.allow(authorize(key, chain.source, "mysql:/nowhere/mysqld.sock"))
    for url in ("mysql+ssh://root@/?socket=/run/other.sock", "ssh"):
        refused(backup(sshd, key, chain, "--lvm", "--mysql", url), "this key may not connect to a database there")
    result = backup(sshd, key, chain, "--lvm", "--mysql", "mysql+ssh://root@/?socket=/nowhere/mysqld.sock")
    refused(result, "there is no database socket: /nowhere/mysqld.sock")


@pytest.mark.parametrize("name", [b"by-label\\x20of udev", b'quoted\\"', b"ends in \\", b"\xff\xfe", "\u20ac".encode()])
def test_a_source_of_any_name_is_granted_as_it_is(sshd: Sshd, key: Path, chain: SmallChain, name: bytes) -> None:
    chain.source = chain.source.with_name(os.fsdecode(name))
    chain.source.write_bytes(DAYS[0])
    sshd.allow(authorize(key, chain.source))
    source = sshd.url("") + quote(os.fsencode(chain.source))
    words = [word for option in options(sshd, key) for word in ("--ssh-option", option)]
    commands.done("blockdiff", "backup", chain.name, source, *words)
    chain.assert_sound()


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_source_with_a_line_end_is_refused_when_it_is_granted(key: Path, end: str) -> None:
    result = commands.run("blockdiff", "authorize", "--key", key.with_suffix(".pub"), f"/srv/a{end}b")
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"cannot be granted: it contains a line end" in result.stderr and result.stderr.count(b"\n") == 2


def test_what_a_link_means_is_told_where_others_than_root_may_make_one(key: Path) -> None:
    result = commands.run(
        "blockdiff", "authorize", "--key", key.with_suffix(".pub"), "/dev/vg/a", "/srv/b c", "mysql:1"
    )
    assert result.returncode == 0
    assert b"symbolic link" in result.stderr and result.stderr.endswith(b"readlink -f '/srv/b c'\n")
    commands.done("blockdiff", "authorize", "--key", key.with_suffix(".pub"), "/dev/vg/a", "mysql:/srv/sock")


def test_a_key_that_is_pinned_to_another_agent_says_so(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    line = authorize(key, chain.source)
    sshd.allow(line.replace(bundle.agent_id(), "0" * 64))
    refused(backup(sshd, key, chain), "accepts only the agent of another version of blockdiff", "blockdiff authorize")


def test_a_forged_agent_is_not_run() -> None:
    """The loader that comes with it neither: the first bytes are passed over."""
    command = ["sh", "-c", f"exec {bundle.pinned_command(['/x'])}"]
    forged = bundle.startup(bytes(16)).replace(b"import hashlib", b"open('/forged'", 1)
    forged = forged[:-1] + bytes([forged[-1] ^ 1])
    done = subprocess.run(command, input=forged, capture_output=True, timeout=60, check=False)
    assert done.returncode != 0 and not Path("/forged").exists()
    harmless = bundle.startup(bytes(16))
    other = harmless.replace(b"def load", b"def lood", 1)  # of the same length: not looked at, not run
    done = subprocess.run(command, input=other, capture_output=True, timeout=60, check=False)
    assert done.stdout.startswith(loader.BEGUN + bytes(16))


def places(sshd: Sshd, identity: Path, source: Path, *directories: str) -> list[tuple[str, int | None]]:
    """Return what the agent tells of directories on the host, by a key."""
    where = address.parse(sshd.url(source))
    with Session(where, "ssh", options(sshd, identity)) as session:
        return session.prepare(RunRequest([SourceRequest(os.fsencode(source))], directories=directories)).places


def test_a_pinned_key_learns_nothing_of_directories_elsewhere(sshd: Sshd, key: Path, tmp_path: Path) -> None:
    """Whether they exist, or on which device they are; of those on what it may read all the same as any other key."""
    backing, mounted = tmp_path / "backing", tmp_path / "mounted"
    with backing.open("wb") as file:
        file.truncate(8 << 20)
    mounted.mkdir()
    with loop.device(backing) as device:
        subprocess.run([require_program("mkfs.ext4"), "-q", device], check=True, timeout=60)
        mount = subprocess.run(["mount", device, mounted], capture_output=True, timeout=60, check=False)
        require(mount.returncode == 0, "the right to mount")
        try:
            sshd.allow(authorize(key, device))
            asked = ("/etc", "/nowhere", str(mounted))
            unlimited = places(sshd, sshd.user_key, device, *asked)
            pinned = places(sshd, key, device, *asked)
        finally:
            subprocess.run(["umount", mounted], check=True, timeout=60)
    assert unlimited[0][0] not in ("", "?") and unlimited[1] == ("", None) and unlimited[2][1] == 0
    assert pinned == [("?", None), ("?", None), unlimited[2]]


def test_a_pinned_key_neither_lists_nor_removes_snapshots(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    sshd.allow(authorize(key, chain.source))
    words = [word for option in options(sshd, key) for word in ("--ssh-option", option)]
    for more in ((), ("--remove", "vg/bd_1")):
        result = commands.run("blockdiff", "snapshots", sshd.url("/"), *words, *more)
        refused(result, "this key may not list or remove snapshots", "with another key")


def test_a_link_that_a_pinned_key_follows_is_noted(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    link = chain.source.with_name("link")
    link.symlink_to(chain.source)
    sshd.allow(authorize(key, link))
    real, chain.source = chain.source, link
    result = backup(sshd, key, chain, "--json")
    assert result.returncode == 0, result
    assert json.loads(result.stdout)["notes"] == [f"{link} leads to {real} through a symbolic link: grant that instead"]


@pytest.mark.parametrize(
    "sent",
    [
        b"00000000" + b"x" * (4 << 20),
        b"99999999",
        b"-0000001",
        b"00000000not JSON\n",
        b'00000000{"prefix": [], "size": "1", "nonce": ""}\n',
        b"00000000" + b"[" * 100_000 + b"\n",
        b'00000000{"prefix": [], "size": 3, "nonce": ""}\nabc',
    ],
    ids=["endless header", "loader of 100 MB", "negative", "garbage", "size that is text", "nested", "not zlib"],
)
def test_what_a_pinned_key_sends_in_place_of_an_agent_ends_it_at_once(sent: bytes) -> None:
    """4 MiB of a header took quarter of an hour of root's CPU."""
    command = ["sh", "-c", f"exec {bundle.pinned_command(['/x'])}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, input=loader.FOR_SHELLS + sent, capture_output=True, timeout=250, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr) == (loader.DAMAGED, loader.BEGUN, b"")
    assert after.ru_utime - before.ru_utime < 20


def test_a_script_serves_an_unprivileged_user_behind_sudo(sshd: Sshd, key: Path, chain: SmallChain) -> None:
    """A user that may run one command line as root reads with it what it is for, and could not read itself."""
    require(os.getuid() == 0, "root")
    sudo, unshare = require_program("sudo"), require_program("unshare")
    script = chain.source.with_name("blockdiff-agent")
    script.write_bytes(commands.done("blockdiff", "authorize", "--script"))
    script.write_text(script.read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}", 1))
    script.chmod(0o755)
    chain.source.chmod(0o600)
    rules = chain.source.with_name("sudoers")
    rules.write_text(f"nobody ALL=(root) NOPASSWD: {script} {chain.source}\n")
    rules.chmod(0o440)
    for granted, does in ((str(chain.source), True), ("/etc/shadow", False)):
        within = f"mount --bind {rules} /etc/sudoers; exec setpriv --reuid nobody --regid nogroup --clear-groups "
        within += f"{sudo} -n {script} {granted}"
        login = chain.source.with_name("login")
        login.write_text(f"#!/bin/sh\nexec {unshare} -m sh -c {shlex.quote(within)}\n")
        login.chmod(0o755)
        keys = sshd.directory / "authorized_keys"
        before = keys.read_bytes()
        sshd.allow(f'restrict,command="{login}" {key.with_suffix(".pub").read_text()}')
        result = backup(sshd, key, chain)
        keys.write_bytes(before)
        assert result.returncode == (0 if does else 1), result
    chain.assert_sound()


def test_what_is_not_asked_for_sensibly_is_a_usage_error(key: Path) -> None:
    public = key.with_suffix(".pub")
    keyed: list[str | Path] = ["--key", public]
    for words in ([], ["--script", "/x"], keyed, [*keyed, "--script"]):
        result = commands.run("blockdiff", "authorize", *words)
        assert result.returncode == 2 and b"Traceback" not in result.stderr
    for word in ("vg/lv", "3306", "mysql:", "mysql:name"):
        result = commands.run("blockdiff", "authorize", *keyed, word)
        assert result.returncode == 2 and b"Traceback" not in result.stderr


def test_the_loader_knows_its_label() -> None:
    assert loader.PINNED in bundle.pinned_command(["/x"])
