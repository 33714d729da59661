"""The real sshd on loopback, over both transports: whatever the path, the login shell and the host's Python are."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from blockdiff.transport import NAMES, address, bundle, openssh
from tests import chains, commands, processes
from tests.conftest import require, require_program
from tests.sshd import Sshd

IMAGE = b"".join(bytes([letter]) * 70_000 for letter in b"abcdefgh") + b"tail"


@pytest.fixture(params=NAMES)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chain(tmp_path: Path) -> chains.SmallChain:
    """A chain whose source holds `IMAGE`."""
    found = chains.new_chain(tmp_path)
    found.source.write_bytes(IMAGE)
    return found


def run(
    chain: chains.SmallChain,
    source: str | bytes,
    *words: str,
    env: dict[str, str] | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    return commands.run("blockdiff", "backup", chain.name, *words, "--", source, env=env)


def options(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--ssh-option", value)]


def assert_backed_up(result: "subprocess.CompletedProcess[bytes]", chain: chains.SmallChain, image: bytes) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert chain.restored() == image


def assert_refused(result: "subprocess.CompletedProcess[bytes]", chain: chains.SmallChain, *words: str) -> None:
    """The run has failed with these words, without a traceback, and the chain is as it was: empty."""
    said = result.stderr.decode()
    assert result.returncode == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert [name for name in chain.files() if not name.endswith(".lock")] == []


def test_every_generation_of_a_growing_and_shrinking_image_is_restored_exactly(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    days = [
        IMAGE,
        IMAGE[:100_000] + b"changed" + IMAGE[100_007:],
        IMAGE + os.urandom(200_001),
        IMAGE[:65_537],
    ]
    for day in days:
        chain.source.write_bytes(day)
        result = run(chain, sshd.url(chain.source), "--transport", transport, *sshd.arguments)
        assert (result.returncode, result.stderr) == (0, b"")
    assert commands.done("blockdiff", "verify", chain.name) == b""
    for number, day in enumerate(days, 1):
        commands.done("blockdiff", "restore", f"{chain.name}@{number}", tmp_path / f"day{number}")
        assert (tmp_path / f"day{number}").read_bytes() == day
    processes.wait_until_gone(sshd.mark)


def test_an_unchanged_image_costs_no_data(sshd: Sshd, transport: str, chain: chains.SmallChain) -> None:
    chain.source.write_bytes(os.urandom(1 << 20))
    for _ in range(2):
        result = run(chain, sshd.url(chain.source), "--transport", transport, *sshd.arguments)
        assert_backed_up(result, chain, chain.source.read_bytes())
    assert len(chain.files()["disk.1.gz"]) > 1 << 20
    assert len(chain.files()["disk.2.gz"]) < 1000


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device that holds `IMAGE`, rounded down to sectors."""
    require(os.getuid() == 0 and Path("/dev/loop-control").exists(), "root and loop devices")
    require_program("losetup")
    file = tmp_path / "device"
    file.write_bytes(IMAGE[: len(IMAGE) - len(IMAGE) % 512])
    found = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=False)
    require(found.returncode == 0, f"loop devices ({found.stderr.strip()})")
    try:
        yield Path(found.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


def test_a_block_device_is_backed_up(sshd: Sshd, transport: str, chain: chains.SmallChain, loop_device: Path) -> None:
    result = run(chain, sshd.url(loop_device), "--transport", transport, *sshd.arguments)
    assert_backed_up(result, chain, IMAGE[: len(IMAGE) - len(IMAGE) % 512])


@pytest.mark.parametrize(
    "name",
    [
        b"'single' \"double\" `touch pwned` $(touch pwned);touch pwned&touch pwned|*?!%20",
        b"back\\slash and new\nline \xff\xfe\xe4",
        b"--help",
    ],
)
def test_a_path_of_any_bytes_reaches_the_host_unharmed(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path, name: bytes
) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(IMAGE)
    as_url = sshd.url(quote(path))
    result = run(chain, as_url, "--transport", transport, *sshd.arguments)
    assert_backed_up(result, chain, IMAGE)
    plain = sshd.login.encode() + b":" + path
    other = chains.SmallChain(chain.directory, chain.source, "other")
    result = run(other, plain, "--transport", transport, "--ssh-option", f"Port={sshd.port}", *sshd.arguments)
    assert_backed_up(result, other, IMAGE)
    assert (
        not list(tmp_path.rglob("pwned")) and not Path("pwned").exists() and not Path("~/pwned").expanduser().exists()
    )


@pytest.mark.parametrize(
    "noise",
    [
        "echo Welcome to this host; echo 'last login: today' >&2",
        f"printf '%0{10 << 10}d' 7",
        f"printf '%0{60 << 10}d' 7; printf '%060000d' 7 >&2",
        r"printf '\000\001\377\033[2J\r\n'",
    ],
    ids=["greeting", "10 KB", "almost too much", "binary"],
)
def test_what_the_login_shell_prints_first_is_skipped(
    sshd: Sshd, transport: str, chain: chains.SmallChain, noise: str
) -> None:
    login = sshd.login_through(f'#!/bin/sh\n{noise}\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_backed_up(result, chain, IMAGE)


@pytest.mark.parametrize("noise", [f"printf '%0{70 << 10}d' 7; sleep 60", "exec yes"], ids=["70 KB", "endless"])
def test_a_login_shell_that_prints_too_much_is_refused(
    sshd: Sshd, transport: str, chain: chains.SmallChain, noise: str
) -> None:
    login = sshd.login_through(f"#!/bin/sh\n{noise}\n")
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_refused(result, chain, f"{sshd.login} printed more than 64 KiB before the agent began", "start files")
    # what prints without end gets SIGPIPE; the sleeper never notices, as any command of a lost connection
    if "yes" in noise:
        processes.wait_until_gone(sshd.mark)
    else:
        processes.end(sshd.mark)


_PRINTS_10_KB = "printf '%010240d\\n' 7"


@pytest.mark.parametrize(
    ("shell", "start_file"),
    [("bash", ".bashrc"), ("dash", None), ("fish", ".config/fish/config.fish"), ("csh", ".cshrc"), ("tcsh", ".tcshrc")],
)
def test_any_login_shell_with_noisy_start_files_will_do(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path, shell: str, start_file: str | None
) -> None:
    program = require_program(shell)
    home = tmp_path / "home"
    home.mkdir()
    marker = home / "started"
    if start_file is not None:
        file = home / start_file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{_PRINTS_10_KB}\ntouch {marker}\n")
    login = sshd.login_through(
        f'#!/bin/sh\nexport HOME={home} BASH_ENV={home / ".bashrc"}\nexec {program} -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_backed_up(result, chain, IMAGE)
    assert marker.exists() == (start_file is not None)


def _only_pythons_in(directory: Path) -> str:
    """Return a login shell that finds no Python but those in a directory."""
    return (
        "#!/bin/sh\n"
        "command=$(printf %s \"$SSH_ORIGINAL_COMMAND\" | sed 's|/usr/|/nowhere/|g')\n"
        f'PATH={directory} exec /bin/sh -c "$command"\n'
    )


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_host_without_python_is_refused(sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path) -> None:
    login = sshd.login_through(_only_pythons_in(tmp_path))
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_refused(result, chain, f"{sshd.login} has no python3\n", "install python3 (3.6 or newer) there")


def test_a_host_with_a_python_that_is_too_old_is_refused(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    _program(tmp_path / "python3", "exit 1")  # what the probe says for 3.5
    login = sshd.login_through(_only_pythons_in(tmp_path))
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_refused(result, chain, f"{sshd.login} has no python3 of version 3.6 or newer", "install a newer python3")


def test_a_newer_python_is_found_behind_one_that_is_too_old(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    _program(tmp_path / "python3", "exit 1")
    _program(tmp_path / "python3.7", f'exec {sys.executable} "$@"')
    login = sshd.login_through(_only_pythons_in(tmp_path))
    result = run(chain, sshd.url(chain.source), "--transport", transport, *_for(transport, login))
    assert_backed_up(result, chain, IMAGE)


def _for(transport: str, login: list[str]) -> list[str]:
    """Return the options of a login as arguments; paramiko has no use for one of them."""
    return options([value for value in login if transport == "ssh" or not value.startswith("IdentitiesOnly")])


def test_the_agent_runs_under_the_prefix(sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path) -> None:
    prefix = tmp_path / "a prefix"
    _program(prefix, f'printf %s "$1" >"{tmp_path}/seen"; shift; exec "$@"')
    env = {"SSH_BLOCKDIFF_PREFIX": f"nice -n 3 '{prefix}' 'two words; $(touch pwned)'"}
    result = run(chain, sshd.url(chain.source), "--transport", transport, *sshd.arguments, env=env)
    assert_backed_up(result, chain, IMAGE)
    assert (tmp_path / "seen").read_text() == "two words; $(touch pwned)"


def test_a_prefix_that_the_host_does_not_have_is_named(sshd: Sshd, transport: str, chain: chains.SmallChain) -> None:
    env = {"SSH_BLOCKDIFF_PREFIX": "no-such-program -x"}
    result = run(chain, sshd.url(chain.source), "--transport", transport, *sshd.arguments, env=env)
    assert_refused(result, chain, "cannot run the agent with SSH_BLOCKDIFF_PREFIX", "no-such-program", "No such file")


def test_bwlimit_holds_the_average_rate(sshd: Sshd, transport: str, chain: chains.SmallChain) -> None:
    chain.source.write_bytes(os.urandom(3 << 20))
    begun = time.monotonic()
    result = run(chain, sshd.url(chain.source), "--transport", transport, "--bwlimit", "1M", *sshd.arguments)
    assert time.monotonic() - begun >= 3 * 0.95
    assert_backed_up(result, chain, chain.source.read_bytes())


def test_an_alias_stands_for_host_port_user_and_key(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    settings = {
        "HostName": "127.0.0.1",
        "Port": str(sshd.port),
        "User": sshd.user,
        "IdentityFile": str(sshd.user_key),
        "UserKnownHostsFile": str(sshd.known_hosts),
    }
    source = f"backed-up-host:{chain.source}"
    if transport == "ssh":  # which finds ~/.ssh/config in the passwd file's home, where tests must not write
        words = options([f"{name}={value}" for name, value in settings.items()])
        result = run(chain, source, "--transport", transport, *words)
    else:
        (tmp_path / ".ssh").mkdir()
        lines = ["Host other-host", "  Port 1", "Host backed-up-host", *map(" ".join, settings.items())]
        (tmp_path / ".ssh" / "config").write_text("\n".join(lines) + "\n")
        result = run(chain, source, "--transport", transport, env={"HOME": str(tmp_path)})
    assert_backed_up(result, chain, IMAGE)


def test_what_the_source_says_wins_over_the_settings(
    sshd: Sshd, transport: str, chain: chains.SmallChain, tmp_path: Path
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  Port 1\n  User nobody\n")
    result = run(chain, sshd.url(chain.source), "--transport", transport, *sshd.arguments, env={"HOME": str(tmp_path)})
    assert_backed_up(result, chain, IMAGE)


def test_the_systems_ssh_is_the_default(sshd: Sshd, chain: chains.SmallChain, tmp_path: Path) -> None:
    real = require_program("ssh")
    (tmp_path / "bin").mkdir()
    _program(tmp_path / "bin" / "ssh", f'touch "{tmp_path}/used"; exec {real} "$@"')
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert_backed_up(run(chain, sshd.url(chain.source), *sshd.arguments, env=env), chain, IMAGE)
    assert (tmp_path / "used").exists()


def test_the_old_command_takes_the_same_way(sshd: Sshd, chain: chains.SmallChain, tmp_path: Path) -> None:
    """`ssh_blockdiff_dump` knows no port: it is ssh's settings that do."""
    real = require_program("ssh")
    (tmp_path / "bin").mkdir()
    settings = " ".join(f"-o {option}" for option in [f"Port={sshd.port}", *sshd.options])
    _program(tmp_path / "bin" / "ssh", f'exec {real} {settings} "$@"')
    env = {"PATH": f"{tmp_path / 'bin'}:{commands.BIN}:{os.environ['PATH']}", "BLOCKSIZE": "4096"}
    for day in (IMAGE, IMAGE[:200_000] + b"!" + IMAGE[200_001:]):
        chain.source.write_bytes(day)
        words = (sys.executable, commands.BIN / "ssh_blockdiff_dump", "-z", sshd.login, chain.source)
        result = commands.run("blockdiff_backup", chain.name, *words, env=env)
        assert (result.returncode, result.stderr) == (0, b"backup completed successfully\n")
        assert chain.restored() == day


def test_ssh_gets_each_word_as_an_argument_of_its_own(tmp_path: Path, chain: chains.SmallChain) -> None:
    seen = tmp_path / "seen"
    script = f"[ $1 != -G ] || exit 0\nfor word; do printf '%s\\0' \"$word\"; done >'{seen}'; exit 255"
    _program(tmp_path / "ssh", script)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = run(chain, "$(touch pwned) 'x':/dev/null", "--ssh-option", "User=`touch pwned`", env=env)
    assert_refused(result, chain, "lost the agent on $(touch pwned) 'x'")
    words = seen.read_text().split("\0")[:-1]
    assert words[2:4] == ["-o", "User=`touch pwned`"]
    assert words[-3:] == ["--", "$(touch pwned) 'x'", bundle.remote_command()]
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_the_users_options_come_first_and_ours_hold_otherwise() -> None:
    words = openssh.arguments(address.parse("ssh://me@host:77/x"), ["ServerAliveInterval=1"], {})
    settings = [value for flag, value in itertools.pairwise(words) if flag == "-o"]
    assert settings[0] == "ServerAliveInterval=1"
    for needed in ("BatchMode=yes", "StrictHostKeyChecking=yes", "ClearAllForwardings=yes", "ServerAliveInterval=15"):
        assert needed in settings
    assert words[-8:] == ["-p", "77", "-l", "me", "-T", "--", "host", bundle.remote_command()]


@pytest.mark.parametrize(
    "source",
    [
        "-oProxyCommand=touch pwned:/x",
        "ssh://-oProxyCommand=touch pwned/x",
        "me@-oProxyCommand=touch pwned:/x",
        "-lroot@host:/x",
        "[-oProxyCommand]:/x",
    ],
)
def test_a_host_or_user_that_looks_like_an_option_is_refused(
    transport: str, chain: chains.SmallChain, source: str
) -> None:
    result = run(chain, source, "--transport", transport)
    assert result.returncode == 2
    assert b"cannot" in result.stderr and b"SOURCE" not in result.stderr
    assert chain.files() == {}
    assert not Path("pwned").exists()


def test_paramiko_names_an_option_that_it_does_not_have(sshd: Sshd, chain: chains.SmallChain) -> None:
    result = run(chain, sshd.url(chain.source), "--transport", "paramiko", "--ssh-option", "ProxyJump=x")
    assert result.returncode == 2
    assert b"paramiko has no option ProxyJump" in result.stderr
    assert b"IdentityFile" in result.stderr


@pytest.mark.parametrize("transport", NAMES)
@pytest.mark.parametrize("held", ["", ">/dev/null", "2>/dev/null"])
def test_what_a_start_file_has_begun_may_hold_the_connection_open(
    sshd: Sshd, tmp_path: Path, transport: str, held: str
) -> None:
    """As a `.bashrc` does that starts an agent for keys: it stays, and the run is done all the same."""
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(b"content")
    left = f"{tmp_path}/left"
    start = f"sleep 600 </dev/null {held} & echo $! > '{left}'"
    options = sshd.login_through(f'#!/bin/sh\n{start}\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    known = [option for option in options if transport == "ssh" or option != "IdentitiesOnly=yes"]
    words = [word for option in known for word in ("--ssh-option", option)]
    commands.done("blockdiff", "backup", "--transport", transport, *words, chain.name, sshd.url(chain.source))
    os.kill(int(Path(left).read_text()), signal.SIGKILL)  # it was there still
    assert chain.restored(1) == b"content"
    processes.wait_until_gone(sshd.mark)
