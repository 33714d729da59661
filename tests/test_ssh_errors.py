"""What goes wrong on the way to a host, over both transports: a sentence and a hint, exit 1, the chain as it was."""

import functools
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paramiko
import pytest

from blockdiff import backup
from blockdiff import transport as transports
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, TransportError
from blockdiff.transport import NAMES, address, advice, bundle, connection
from blockdiff.transport.paramiko_ssh import ParamikoConnection
from tests import chains, commands, processes
from tests.relay import CUT, SILENCE, Relay
from tests.sshd import Sshd


@pytest.fixture(params=NAMES)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chain(tmp_path: Path) -> chains.SmallChain:
    """A chain of one generation."""
    found = chains.new_chain(tmp_path)
    found.add(os.urandom(1 << 20), backup.Options(full=True))
    return found


def fails(chain: chains.SmallChain, *words: str | Path, status: int = 1, env: dict[str, str] | None = None) -> str:
    """Run a backup that must fail and leave the chain as it was; return what it said."""
    before = chain.files()
    result = commands.run("blockdiff", "backup", "--full", chain.name, *words, env=env)
    said = result.stderr.decode()
    assert (result.returncode, result.stdout) == (status, b""), said
    assert "Traceback" not in said and len(said.splitlines()) == 2, said  # a sentence and a hint
    assert chain.files() == before
    return said


def options(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in ("--ssh-option", f"{name}={value}")]


def test_without_an_ssh_program_paramiko_takes_over(sshd: Sshd, chain: chains.SmallChain, tmp_path: Path) -> None:
    words = ("blockdiff", "backup", "--full", chain.name, sshd.url(chain.source), *sshd.arguments)
    result = commands.run(*words, env={"PATH": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, b"")
    assert chain.restored(2) == chain.source.read_bytes()


def test_asking_for_a_missing_ssh_program_is_refused(chain: chains.SmallChain, tmp_path: Path) -> None:
    said = fails(chain, "host:/x", "--transport", "ssh", env={"PATH": str(tmp_path)})
    assert "there is no ssh program on this machine" in said
    assert "--transport paramiko" in said


def test_a_wrong_key_is_refused(sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    words = options(IdentityFile=tmp_path / "other", UserKnownHostsFile=sshd.known_hosts)
    said = fails(chain, sshd.url(chain.source), "--transport", transport, *words)
    assert f"{sshd.login} refused the login" in said
    assert f"`ssh -o BatchMode=yes -p {sshd.port} {sshd.login} true` must work" in said


def test_an_unknown_host_key_is_refused_and_the_hint_helps(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    known = tmp_path / "known_hosts"
    known.touch()
    settings = options(IdentityFile=sshd.user_key, UserKnownHostsFile=known)
    words = (sshd.url(chain.source), "--transport", transport, *settings)
    said = fails(chain, *words)
    assert f"the host key of {sshd.login} is not known" in said
    assert known.read_text() == ""
    show, add = re.findall("`(.*?)`", said)
    shown = subprocess.run(show, shell=True, capture_output=True, text=True, check=True).stdout
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", sshd.host_key.with_suffix(".pub")], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    assert fingerprint in shown
    assert add.endswith(f" >> {known}")
    subprocess.run(add, shell=True, check=True, stderr=subprocess.DEVNULL)
    assert commands.run("blockdiff", "backup", chain.name, *words, "--full").returncode == 0


def test_a_changed_host_key_is_refused_and_the_hint_helps(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    known = tmp_path / "known_hosts"
    kind, key = sshd.user_key.with_suffix(".pub").read_text().split()[:2]  # any key but the host's
    known.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    words = options(IdentityFile=sshd.user_key, UserKnownHostsFile=known)
    said = fails(chain, sshd.url(chain.source), "--transport", transport, *words)
    assert f"the host key of {sshd.login} has changed: the connection may be intercepted" in said
    (remove,) = re.findall("`(.*?)`", said)
    assert remove.startswith("ssh-keygen -R ")
    subprocess.run(f"{remove} -f '{known}'", shell=True, check=True, capture_output=True)
    assert known.read_text() == ""


def test_nobody_listening_is_said(transport: str, chain: chains.SmallChain) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
        port = sock.getsockname()[1]
        said = fails(chain, f"ssh://someone@127.0.0.1:{port}/x", "--transport", transport)
    assert "cannot reach someone@127.0.0.1: " in said
    assert re.search("refused|Unable to connect", said)
    assert "is it running" in said


def test_a_name_that_does_not_resolve_is_said(transport: str, chain: chains.SmallChain) -> None:
    said = fails(chain, "no-such-host.invalid:/x", "--transport", transport)
    assert "cannot reach no-such-host.invalid: " in said
    assert "the name right?" in said


def test_a_peer_that_accepts_and_says_nothing_is_given_up(transport: str, chain: chains.SmallChain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"ssh://127.0.0.1:{server.getsockname()[1]}/x"
        said = fails(chain, source, "--transport", transport, *options(ConnectTimeout=1))
    assert "cannot reach 127.0.0.1: " in said
    assert re.search("timed out|no SSH server answered|silent for 1 s", said)


def test_a_peer_that_speaks_no_ssh_is_said(transport: str, chain: chains.SmallChain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.0 400 Bad\x1b[2J request\r\n" * 2000)

        pool.submit(answer)
        said = fails(chain, f"ssh://127.0.0.1:{server.getsockname()[1]}/x", "--transport", transport)
    assert "127.0.0.1" in said
    assert "\x1b" not in said


def test_paramiko_says_nothing_of_its_own(sshd: Sshd, chain: chains.SmallChain) -> None:
    """It logs broken connections, with tracebacks, and Python prints what nobody handles."""
    with Relay(sshd.port, limit_down=10) as relay:
        sshd.trust(relay.port)
        said = fails(chain, sshd.url(chain.source, relay.port), "--transport", "paramiko", *sshd.arguments)
    assert "cannot reach" in said


def broken(
    chain: chains.SmallChain, sshd: Sshd, relay: Relay, transport: str, *words: str
) -> "BlockdiffError | backup.Result":
    """Run a full backup through a relay, in this process; return how it ended."""
    where = address.parse(sshd.url(chain.source, relay.port))
    settings = backup.Options(full=True, transport=transport, ssh_options=(*sshd.options, *words))
    try:
        return backup.backup(chain.name, where, settings)
    except BlockdiffError as error:
        return error


#: Bytes after which the connection breaks: into the handshake, the login, the start of the agent, the first frames.
_DOWN = (1, 30, 600, 1200, 1600, 1900, 2400, 2900, 3100, 3400, 3700, 5000, 200_000, 700_000, 1_050_000)
_UP = (1, 30, 1000, 1300, 1600, 2000, 2500, 3000, 4000, 9000, 18_000)


@pytest.mark.parametrize(("way", "limits"), [("limit_down", _DOWN), ("limit_up", _UP)], ids=["down", "up"])
def test_a_connection_that_is_cut_anywhere_fails_the_run_and_leaves_nothing(
    sshd: Sshd, transport: str, chain: chains.SmallChain, way: str, limits: tuple[int, ...]
) -> None:
    before = chain.files()
    for limit in limits:
        with Relay(sshd.port, act=CUT, **{way: limit}) as relay:  # type: ignore[arg-type]  # only the limits by name
            sshd.trust(relay.port)
            ended = broken(chain, sshd, relay, transport)
        assert relay.acted.is_set(), limit
        assert isinstance(ended, TransportError), (limit, ended)
        assert sshd.login in ended.message and ended.hint, (limit, ended)
        assert chain.files() == before, limit
        processes.wait_until_gone(sshd.mark)
    chain.assert_sound()


@pytest.mark.parametrize("error", [EOFError(), paramiko.SSHException("the connection ended")])
@pytest.mark.parametrize(("name", "verb"), [("sendall", "write"), ("recv", "read")])
def test_a_connection_that_breaks_within_a_call_of_paramiko_is_lost(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, verb: str
) -> None:
    """Reading sends as well: it tells the other side that there is room again."""

    def breaks(_data: object) -> None:
        raise error

    where = address.parse(sshd.url("/nothing"))
    with transports.connect(where, "paramiko", sshd.options) as connection:
        assert isinstance(connection, ParamikoConnection)
        monkeypatch.setattr(connection._channel, name, breaks)
        with pytest.raises(ConnectionLost, match=f"cannot {verb}: the connection ended"):
            if verb == "write":
                connection.write([b"x"])
            else:
                connection.readinto(memoryview(bytearray(1)), 10.0)


def test_a_connection_that_is_cut_within_its_last_bytes_never_gives_half_a_generation(
    sshd: Sshd, transport: str, chain: chains.SmallChain
) -> None:
    """Behind END there is little more than the exit status: a run may then be done, but only wholly."""
    with Relay(sshd.port) as relay:
        sshd.trust(relay.port)
        assert isinstance(broken(chain, sshd, relay, transport), backup.Result)
        whole = relay.passed[1]
    chain.images[2] = chain.source.read_bytes()
    for short in (20, 60, 100, 140, 180, 240, 300, 400):
        last = chain.last()
        with Relay(sshd.port, limit_down=whole - short) as relay:
            sshd.trust(relay.port)
            ended = broken(chain, sshd, relay, transport)
        if isinstance(ended, backup.Result):
            chain.images[ended.manifest.generation] = chain.source.read_bytes()
        else:
            assert isinstance(ended, TransportError), (short, ended)
            assert chain.last() == last
        chain.assert_sound()
    processes.wait_until_gone(sshd.mark)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Let both sides take the other for lost after a few seconds of silence, and say that they live every second."""
    silence_s = 5.0
    shortened = functools.partial(connection.push_agent, silence_s=silence_s)
    monkeypatch.setattr(connection, "push_agent", shortened)
    monkeypatch.setattr(connection, "EXIT_TIMEOUT_S", silence_s)
    monkeypatch.setattr(wire, "HEARTBEAT_S", 1.0)
    monkeypatch.setattr(bundle, "_source", _with_silence(bundle._source, silence_s))
    bundle._archive.cache_clear()
    yield silence_s
    bundle._archive.cache_clear()


def _with_silence(source: Callable[[str], str], silence_s: float) -> Callable[[str], str]:
    def changed(name: str) -> str:
        text = source(name)
        if name != "shared/wire.py":
            return text
        shorter = re.sub(r"^SILENCE_S = .*", f"SILENCE_S = {silence_s}", text, flags=re.MULTILINE)
        shorter = re.sub(r"^HEARTBEAT_S = .*", "HEARTBEAT_S = 1.0", shorter, flags=re.MULTILINE)
        assert shorter != text
        return shorter

    return changed


def test_a_connection_that_goes_silent_anywhere_fails_the_run(
    sshd: Sshd,
    transport: str,
    chain: chains.SmallChain,
    tmp_path: Path,
    impatient: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "push_agent", functools.partial(connection.push_agent, timeout_s=impatient))

    def silent_after(limit: int) -> None:
        mine = chain.copy_to(tmp_path / f"after-{limit}")
        with Relay(sshd.port, limit_down=limit, act=SILENCE) as relay:
            sshd.trust(relay.port)
            ended = broken(mine, sshd, relay, transport, "ConnectTimeout=4")
        assert isinstance(ended, TransportError), (limit, ended)
        # whose patience ends first, paramiko's with the greeting or ours with the whole, is left to the machine
        assert re.search("silent|in time|imed? ?out|Timeout|no SSH server answered|Channel closed", ended.message), (
            limit,
            ended,
        )
        assert mine.files() == chain.files()

    limits = (1, 600, 1500, 1700, 2000, 2500, 3500, 300_000)
    with ThreadPoolExecutor(len(limits)) as pool:  # they wait for most of their time
        list(pool.map(silent_after, limits))
    processes.wait_until_gone(sshd.mark)


def test_an_agent_whose_server_goes_silent_ends_by_itself(
    sshd: Sshd, transport: str, chain: chains.SmallChain, impatient: float
) -> None:
    """The relay keeps the host's side of the connection open: only the agent's own patience can end it."""
    image = os.urandom(16 << 20)  # more than fits in between: the agent is stuck in a write
    chain.source.write_bytes(image)
    with Relay(sshd.port, limit_down=300_000, act=SILENCE) as relay:
        sshd.trust(relay.port)
        ended = broken(chain, sshd, relay, transport)
        assert isinstance(ended, TransportError)
        processes.wait_until_gone(sshd.mark, timeout_s=60)


def test_paramiko_waits_for_a_started_command_no_longer_than_for_a_connection(
    sshd: Sshd, chain: chains.SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko itself would wait for ever where the answer to "run this" gets lost."""

    def unanswered(channel: paramiko.Channel, command: str) -> None:
        channel.event.wait()
        raise paramiko.SSHException("Channel closed.")

    execute = ParamikoConnection._execute

    def impatiently(self: ParamikoConnection, channel: paramiko.Channel, timeout_s: float) -> None:
        assert timeout_s == 29
        execute(self, channel, 0.5)

    monkeypatch.setattr(paramiko.Channel, "exec_command", unanswered)
    monkeypatch.setattr(ParamikoConnection, "_execute", impatiently)
    settings = backup.Options(full=True, transport="paramiko", ssh_options=(*sshd.options, "ConnectTimeout=29"))
    with pytest.raises(TransportError, match=r"cannot reach .*: Channel closed"):
        backup.backup(chain.name, address.parse(sshd.url(chain.source)), settings)
    chain.assert_sound()


def test_a_slow_connection_is_no_silent_one(
    sshd: Sshd, transport: str, chain: chains.SmallChain, impatient: float
) -> None:
    """One byte of data is slower than the patience: the heartbeats carry the run."""
    chain.source.write_bytes(os.urandom(1 << 17))
    with Relay(sshd.port) as relay:
        sshd.trust(relay.port)
        where = address.parse(sshd.url(chain.source, relay.port))
        slow = int((1 << 17) / (1.6 * impatient))
        settings = backup.Options(full=True, transport=transport, ssh_options=sshd.options, bandwidth=slow)
        backup.backup(chain.name, where, settings)
    chain.images[2] = chain.source.read_bytes()
    chain.assert_sound()


def test_the_commands_that_hints_show_are_quoted() -> None:
    place = advice.place(address.parse("me@a'b $(touch pwned):/x"))
    error = advice.failure(advice.Cause.UNKNOWN_KEY, place)
    assert error.hint is not None
    (show, _) = re.findall("`(.*?)`", error.hint)
    assert shlex.split(show)[:3] == ["ssh-keyscan", "a'b $(touch pwned)", "|"]
