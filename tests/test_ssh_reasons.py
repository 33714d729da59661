"""Why there is no agent, with a real sshd: each cause has its sentence and its hint, whatever the host prints."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.session.session import Session
from blockdiff.shared import wire
from blockdiff.shared.errors import TransportError
from blockdiff.transport import NAMES, address, connection
from blockdiff.transport.address import Address
from blockdiff.transport.advice import Place
from blockdiff.transport.child import ChildConnection
from tests import chains, commands
from tests.conftest import require, require_program
from tests.fake_agent import FakeConnection, Wire
from tests.mariadb import wait_for
from tests.sshd import Sshd

#: What takes longer than this was not told at once, in seconds; the time for a start is far longer.
AT_ONCE_S = 60


@pytest.fixture
def chain(tmp_path: Path) -> chains.SmallChain:
    found = chains.new_chain(tmp_path)
    found.source.write_bytes(b"x" * 70_000)
    return found


@pytest.fixture(params=NAMES)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def said_by(
    chain: chains.SmallChain,
    source: str,
    options: list[str],
    *words: str,
    status: int = 1,
    env: dict[str, str] | None = None,
) -> str:
    """Return what a backup says that must fail: a sentence and a hint. It has no terminal."""
    given = [word for option in options for word in ("--ssh-option", option)]
    result = commands.run(
        "blockdiff", "backup", chain.name, source, *given, *words, env=env, timeout_s=AT_ONCE_S, under=["setsid", "-w"]
    )
    said = result.stderr.decode()
    assert (result.returncode, result.stdout) == (status, b""), said
    assert len(said.splitlines()) == 2, said
    assert chain.last() == 0
    return said


def through(sshd: Sshd, transport: str, script: str) -> list[str]:
    options = sshd.login_through(f"#!/bin/sh\n{script}\n")
    return [option for option in options if transport == "ssh" or not option.startswith("IdentitiesOnly")]


@pytest.mark.parametrize(
    "words",
    [
        "me@host: Permission denied (publickey).",
        "Host key verification failed.",
        "ssh: connect to host web1 port 22: Connection refused",
        "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @",
        "Unable to negotiate with 1.2.3.4 port 22: no matching cipher found. Their offer: x",
        "kex_exchange_identification: Connection closed by remote host",
    ],
)
@pytest.mark.parametrize("end", ["exit 255", "kill -KILL $PPID"])
def test_what_the_host_prints_is_not_taken_for_what_ssh_says(
    sshd: Sshd, chain: chains.SmallChain, words: str, end: str
) -> None:
    options = through(sshd, "ssh", f"echo '{words}' >&2; {end}")
    said = said_by(chain, sshd.url(chain.source), options)
    assert (
        f"lost the agent on {sshd.login}: the connection ended before the agent began (ssh exited with status 255)"
        in said
    )
    if end == "exit 255":  # else sshd may not have sent it
        assert words in said


@pytest.mark.parametrize(
    ("option", "setting", "what"),
    [
        ("Ciphers", "Ciphers aes256-ctr", "cipher"),
        ("KexAlgorithms", "KexAlgorithms diffie-hellman-group14-sha256", "key exchange method"),
        ("HostKeyAlgorithms", "HostKeyAlgorithms ssh-ed25519", "host key type"),
    ],
)
def test_nothing_in_common_is_said_with_what_the_host_offers(
    tmp_path: Path, chain: chains.SmallChain, option: str, setting: str, what: str
) -> None:
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    ours = {"Ciphers": "aes128-ctr", "KexAlgorithms": "curve25519-sha256", "HostKeyAlgorithms": "rsa-sha2-512"}[option]
    (tmp_path / "sshd").mkdir()
    with Sshd(tmp_path / "sshd", [setting]) as server:
        said = said_by(chain, server.url(chain.source), [f"{option}={ours}", *server.options])
        offer = setting.split()[1]
        assert f"ssh and {server.login} have no {what} in common; it offers {offer}" in said
        assert f"--ssh-option {option}=+NAME" in said
        given = [f"{option}=+{offer}", *server.options]
        words = [word for value in given for word in ("--ssh-option", value)]
        commands.done("blockdiff", "backup", chain.name, *words, server.url(chain.source))


def config_of(tmp_path: Path, text: str) -> dict[str, str]:
    """Return an environment whose `ssh` reads its settings from a file with `text`."""
    (tmp_path / "config").write_text(text)
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {require_program("ssh")} -F {tmp_path}/config "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    return {"PATH": f"{tmp_path}:{commands.PATH}"}


def test_the_ciphers_of_the_users_settings_hold(tmp_path: Path, chain: chains.SmallChain) -> None:
    """The fast one comes first only where it is among them: an old host may have none that is a default."""
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    (tmp_path / "sshd").mkdir()
    with Sshd(tmp_path / "sshd", ["Ciphers aes256-cbc"]) as server:
        env = config_of(tmp_path, "Ciphers +aes256-cbc\n")
        commands.done("blockdiff", "backup", chain.name, *server.arguments, server.url(chain.source), env=env)


def test_settings_that_would_keep_the_agent_away_are_overridden(
    sshd: Sshd, tmp_path: Path, chain: chains.SmallChain
) -> None:
    settings = "RemoteCommand ls\nSessionType none\nForkAfterAuthentication yes\nStdinNull yes\nRequestTTY force\n"
    env = config_of(tmp_path, settings)
    commands.done("blockdiff", "backup", chain.name, *sshd.arguments, sshd.url(chain.source), env=env)
    assert chain.restored() == chain.source.read_bytes()


@pytest.mark.parametrize(
    "option", ["RemoteCommand=ls", "sessiontype none", "ForkAfterAuthentication=yes", "StdinNull=yes"]
)
def test_options_that_would_keep_the_agent_away_are_refused(sshd: Sshd, chain: chains.SmallChain, option: str) -> None:
    said = said_by(chain, sshd.url(chain.source), [option, *sshd.options], status=2)
    assert f"--ssh-option {re.split('[= ]', option)[0]} cannot be used with the agent" in said


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("BtachMode=yes", "Bad configuration option: btachmode"),
        ("Port=x", "Bad port 'x'"),
        ("Ciphers=rot13", "Bad SSH2 cipher spec 'rot13'"),
        ("Compression", "no argument"),
    ],
)
def test_an_option_that_ssh_does_not_take_is_a_mistake_of_usage(
    sshd: Sshd, chain: chains.SmallChain, option: str, why: str
) -> None:
    said = said_by(chain, sshd.url(chain.source), [*sshd.options, option], status=2)
    assert "ssh does not accept the command line: " in said
    assert why in said
    assert "correct --ssh-option" in said


def test_a_fault_in_the_settings_file_names_the_file(sshd: Sshd, tmp_path: Path, chain: chains.SmallChain) -> None:
    said = said_by(chain, sshd.url(chain.source), sshd.options, env=config_of(tmp_path, "Host *\nBogus yes\n"))
    assert f"ssh cannot use its settings: {tmp_path}/config: line 2: Bad configuration option: bogus" in said


@pytest.mark.parametrize(
    ("script", "why", "words"),
    [
        ("echo This account is currently not available.; exit 1", "exited with status 1", "not available."),
        ("echo Your password has expired >&2; exit 1", "exited with status 1", "Your password has expired"),
        ("exit 0", "exited with status 0", "it said nothing"),
        ('exec bash -r -c "$SSH_ORIGINAL_COMMAND"', "exited with status 1", "restricted"),
    ],
    ids=["nologin", "expired password", "a start file that exits", "restricted shell"],
)
def test_a_login_that_runs_no_command_is_said_at_once(
    sshd: Sshd, transport: str, chain: chains.SmallChain, script: str, why: str, words: str
) -> None:
    said = said_by(chain, sshd.url(chain.source), through(sshd, transport, script), "--transport", transport)
    assert f"the command on {sshd.login} {why} before the agent began: " in said
    assert words in said
    assert "look at the account, its login shell and the shell's start files" in said


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "csh", "tcsh"])
def test_a_shell_that_takes_the_place_of_the_command_ends_at_once(
    sshd: Sshd, transport: str, chain: chains.SmallChain, shell: str
) -> None:
    """`exec bash` in a start file: it reads its commands from where the agent is sent."""
    options = through(sshd, transport, f"exec {require_program(shell)}")
    said = said_by(chain, sshd.url(chain.source), options, "--transport", transport)
    assert f"the login shell on {sshd.login} was replaced by another one, which did not run the agent" in said
    assert "look there for an `exec` in the shell's start files" in said


@pytest.mark.parametrize(
    "words", ["sudo: sorry, you must have a tty to run sudo", "sudo: a password is required"], ids=["tty", "password"]
)
def test_a_sudo_that_wants_more_is_named(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path, words: str
) -> None:
    (tmp_path / "sudo").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    (tmp_path / "sudo").chmod(0o755)
    env = {"SSH_BLOCKDIFF_PREFIX": f"{tmp_path}/sudo -n"}
    said = said_by(chain, sshd.url(chain.source), sshd.options, "--transport", transport, env=env)
    assert f"`{tmp_path}/sudo -n`, from SSH_BLOCKDIFF_PREFIX, exited with status 1 on {sshd.login}" in said
    assert words in said
    assert "NOPASSWD, and no requiretty, in its sudoers" in said


@pytest.mark.parametrize("module", ["json", "selectors"], ids=["of the loader", "of the agent"])
def test_a_python_without_all_of_its_library_is_named(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path, module: str
) -> None:
    """As with Debian's python3-minimal."""
    python = tmp_path / "python3"
    real = require_program("python3")
    start = f"import sys;sys.modules['{module}']=None;exec(bytes.fromhex(sys.argv[2]))"
    python.write_text(
        f'#!/bin/sh\ncase "$3" in *version_info*) exit 0;; esac\nshift 3; exec {real} -I -c "{start}" "$@"\n'
    )
    python.chmod(0o755)
    options = through(sshd, transport, f'PATH={tmp_path}:$PATH exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"')
    said = said_by(chain, sshd.url(chain.source), options, "--transport", transport)
    assert f"python3 on {sshd.login} is not complete: " in said
    assert module in said
    assert "install the package python3 there: python3-minimal is not enough" in said


def test_an_unknown_key_of_a_jump_host_is_named(sshd: Sshd, chain: chains.SmallChain) -> None:
    jump = f"someone@127.0.0.1:{sshd.port}"
    said = said_by(chain, sshd.url(chain.source), [f"ProxyJump={jump}", *sshd.options])
    assert "the host key of the jump host someone@127.0.0.1 is not known" in said
    assert f"ssh-keyscan -p {sshd.port} 127.0.0.1" in said


def test_a_jump_host_that_is_down_is_named(sshd: Sshd, chain: chains.SmallChain) -> None:
    said = said_by(chain, sshd.url(chain.source), ["ProxyJump=127.0.0.1:1", *sshd.options])
    assert "cannot reach the jump host 127.0.0.1: ssh: connect to host 127.0.0.1 port 1: Connection refused" in said


def test_a_proxy_command_that_fails_is_told_with_its_words(sshd: Sshd, chain: chains.SmallChain) -> None:
    said = said_by(chain, sshd.url(chain.source), ["ProxyCommand=sh -c 'echo no way >&2'", *sshd.options])
    assert f"cannot reach {sshd.login} through its ProxyCommand: no way" in said


def test_the_port_of_the_settings_is_in_the_hint(sshd: Sshd, tmp_path: Path, chain: chains.SmallChain) -> None:
    known = tmp_path / "known_hosts"
    known.touch()
    options = [f"Port={sshd.port}", f"UserKnownHostsFile={known}", "HostKeyAlias=web1"]
    said = said_by(chain, f"{sshd.login}:{chain.source}", options)
    show, add = re.findall("`(.*?)`", said)
    assert show.startswith(f"ssh-keyscan -p {sshd.port} 127.0.0.1 | sed ")
    assert os.system(add + " 2>/dev/null") == 0
    words = [word for option in [*options, *sshd.options[:1]] for word in ("--ssh-option", option)]
    commands.done("blockdiff", "backup", chain.name, *words, f"{sshd.login}:{chain.source}")


def test_a_start_file_that_never_runs_the_command_is_given_up_soon(
    sshd: Sshd, transport: str, chain: chains.SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `exec fish`, which reads its input to the end before it does anything."""
    monkeypatch.setattr(connection, "SHELL_TIMEOUT_S", 0.5)
    options = through(sshd, transport, "exec cat >/dev/null")
    with pytest.raises(TransportError) as caught:
        backup.backup(
            chain.name, address.parse(sshd.url(chain.source)), backup.Options(transport=transport, ssh_options=options)
        )
    why = f"no agent began on {sshd.login} in time (the login shell did not run the command for 0.5 s): it said nothing"
    assert caught.value.message == why
    assert caught.value.hint is not None and "look at the login shell and its start files there" in caught.value.hint


def test_a_start_that_drips_is_given_up_in_time(tmp_path: Path) -> None:
    """A byte now and then is no agent, and must not hold the chain."""
    drips = ["sh", "-c", f"printf x; touch '{tmp_path}/begun'; while :; do printf x; sleep 0.05; done"]
    with ChildConnection(drips, Place("host", "host")) as child, pytest.raises(TransportError) as caught:
        wait_for((tmp_path / "begun").exists, "the first byte")
        connection.push_agent(child, timeout_s=0.5)
    assert caught.value.message.startswith("no agent began on host in time (waited for 0.5 s): x")


@pytest.mark.parametrize("drip", ["alive", "a part of a frame"])
def test_an_agent_that_never_says_who_it_is_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, drip: str) -> None:
    monkeypatch.setattr(connection, "START_TIMEOUT_S", 0.5)

    def drips(agent: Wire) -> int:
        agent.begin()
        if drip != "alive":
            agent.raw(wire.HEADER.pack(wire.HELLO, 200, 0, 0, 0)[:12])
        while True:
            if drip == "alive":
                agent.frame(wire.ALIVE)
            else:
                agent.raw(b"\0")
            time.sleep(0.05)

    begun = FakeConnection(drips)
    with pytest.raises(TransportError) as caught, Session(Address("host", "/x"), begun=begun):
        pass
    assert caught.value.message == "lost the agent on host: the expected data did not come in time"


def test_however_much_ssh_logs_a_run_goes_on(sshd: Sshd, chain: chains.SmallChain, tmp_path: Path) -> None:
    """As in a long run with LogLevel=DEBUG3."""
    real = shutil.which("ssh")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nif [ "$1" = -E ]; then yes debug3 | head -c 1000000 >"$2"; fi\nexec {real} "$@"\n')
    ssh.chmod(0o755)
    env = {"PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    commands.done("blockdiff", "backup", chain.name, *sshd.arguments, sshd.url(chain.source), env=env)
    assert chain.last() == 1
