"""The start of the agent: through every login shell, with every Python, past every noise; and why it did not start."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from blockdiff.host import loader
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, TransportError
from blockdiff.transport import bundle
from blockdiff.transport.advice import Place
from blockdiff.transport.child import ChildConnection
from blockdiff.transport.connection import NOISE_LIMIT, push_agent
from tests.conftest import require_program
from tests.descriptors import all_closed
from tests.interpreters import INTERPRETERS

SHELLS = ("sh", "bash", "dash", "csh", "tcsh", "fish")


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


def hello(arguments: Sequence[str], prefix: Sequence[str] = ()) -> dict[str, object]:
    """Start the agent by `arguments` and return what it says of itself."""
    with ChildConnection(arguments, Place("host", "host")) as child:
        link = push_agent(child, prefix, timeout_s=60)
        frame = link.receive()
        assert frame.kind == wire.HELLO
        return link.read_json(frame)


def failure(arguments: Sequence[str], prefix: Sequence[str] = (), timeout_s: float = 60) -> BlockdiffError:
    """Return why no agent starts by `arguments`."""
    with ChildConnection(arguments, Place("host", "host")) as child, pytest.raises(TransportError) as caught:
        push_agent(child, prefix, timeout_s)
    return caught.value


def host(directory: Path, **programs: str) -> list[str]:
    """Return the remote command on a host that has only `programs`, each a script for sh, on its PATH."""
    for name, script in programs.items():
        path = directory / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    # what lies at fixed places is out of the way as well
    command = bundle.remote_command()
    for fixed in ("/usr/libexec/platform-python", "/usr/bin/python3", "/usr/local/bin/python3"):
        assert f" {fixed} " in command
        command = command.replace(f" {fixed} ", " ")
    return ["/usr/bin/env", f"PATH={directory}", "/bin/sh", "-c", command]


REAL = f'exec "{sys.executable}" "$@"'
TOO_OLD = "exit 1"  # what the version probe gives
#: A Python that is there and cannot be used: the probe never gets to run.
BROKEN = 'echo "error while loading shared libraries" >&2; exit 127'


@pytest.mark.parametrize("shell", SHELLS)
def test_the_remote_command_starts_the_agent_through_a_login_shell(shell: str, tmp_path: Path) -> None:
    path = require_program(shell)
    environment = ["env", f"HOME={tmp_path}"]  # no start files of this user
    assert hello([*environment, path, "-c", bundle.remote_command()])["protocol"] == wire.PROTOCOL


@pytest.mark.parametrize("shell", SHELLS)
def test_the_remote_command_keeps_its_exit_status_through_a_login_shell(shell: str, tmp_path: Path) -> None:
    path = require_program(shell)
    remote = host(tmp_path)[-1]
    error = failure(["env", f"HOME={tmp_path}", f"PATH={tmp_path}", path, "-c", remote])
    assert error.message == "host has no python3"


def test_the_remote_command_is_a_constant_that_every_shell_reads_alike() -> None:
    command = bundle.remote_command()
    assert command == bundle.remote_command()
    assert command.count("'") == 2
    assert not set(command) & set("\\!\n`")
    assert command.isascii()
    assert len(command) < 1024  # the longest word of old csh


def test_a_host_without_python(tmp_path: Path) -> None:
    error = failure(host(tmp_path))
    assert (error.message, error.hint) == (
        "host has no python3",
        "install python3 (3.6 or newer) there; nothing else is needed",
    )


@pytest.mark.parametrize("script", [TOO_OLD, BROKEN], ids=["too old", "broken"])
def test_a_host_whose_python_is_too_old(tmp_path: Path, script: str) -> None:
    error = failure(host(tmp_path, python3=script))
    assert (error.message, error.hint) == (
        "host has no python3 of version 3.6 or newer",
        "install a newer python3 there",
    )


@pytest.mark.parametrize("name", ["python3_13", "python3_9", "python3_6"])
def test_a_newer_python_is_found_under_another_name(tmp_path: Path, name: str) -> None:
    assert hello(host(tmp_path, python3=TOO_OLD, **{name: REAL}))["protocol"] == wire.PROTOCOL


def test_a_python_that_reads_its_input_takes_nothing_from_the_next(tmp_path: Path) -> None:
    """The agent comes on standard input; a wrapper that drains it must not get it."""
    assert hello(host(tmp_path, python3="while read -r line; do :; done; exit 1", python3_9=REAL))


def test_the_version_is_really_asked_for(tmp_path: Path) -> None:
    """A Python 2 under the name python3 is no Python 3."""
    ancient = 'exec "{}" "$@"'.format(sys.executable.replace('"', ""))
    recorded = tmp_path / "probe"
    script = f'[ -e {recorded} ] || {{ printf "%s " "$@" >{recorded}; exit 1; }}; {ancient}'
    failure(host(tmp_path, python3=script))
    words = recorded.read_text()
    assert words == "-I -c import sys;sys.exit(sys.version_info<(3,6)) "


def test_the_loader_refuses_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 5, 9, "final", 0))
    with pytest.raises(SystemExit) as caught:
        loader.start()
    assert caught.value.code == loader.TOO_OLD


def damaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    original = bundle.startup
    monkeypatch.setattr(bundle, "startup", lambda *given: change(original(*given)))


@pytest.mark.parametrize("place", [-1, -1000])
def test_an_agent_that_arrives_damaged_is_not_started(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    damaged(monkeypatch, flip)
    error = failure(bundle.local_command())
    assert (error.message, error.hint) == (
        "the agent arrived damaged at host",
        "run again; if it happens again, suspect the network, or what reads input in the shell's start files there",
    )


@pytest.mark.parametrize("count", [4, 500, 5000, 15000])
def test_an_agent_of_which_only_a_part_arrives_is_not_started(count: int) -> None:
    """Wherever the bytes end: in the loader's length, the loader, the header, or the archive."""
    startup = bundle.startup(bytes(bundle.NONCE_SIZE))
    assert count < len(startup)
    result = subprocess.run(bundle.local_command(), input=startup[:count], capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (loader.DAMAGED, b"")


@pytest.mark.parametrize("prefix", [["env"], ["env", "A=b c'\"$()"], ["nice", "-n", "3"], ["nice", "env"]])
def test_the_agent_runs_under_a_prefix(prefix: list[str]) -> None:
    for word in prefix:
        if word.isalpha():
            require_program(word)
    assert hello(bundle.local_command(), prefix)["protocol"] == wire.PROTOCOL


def test_a_prefix_works_through_the_remote_command(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    wrapper = tmp_path / "wrap per"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >"{mark}"\nshift\nexec "$@"\n')
    wrapper.chmod(0o755)
    said = hello(["/bin/sh", "-c", bundle.remote_command()], [str(wrapper), 'it\'s "$HOME"'])
    assert said["protocol"] == wire.PROTOCOL
    assert mark.read_text() == 'it\'s "$HOME"\n'


def test_a_prefix_that_is_missing(tmp_path: Path) -> None:
    error = failure(bundle.local_command(), [str(tmp_path / "nothing")])
    assert error.message == (
        f"host cannot run the agent with SSH_BLOCKDIFF_PREFIX: cannot run {tmp_path}/nothing: No such file or directory"
    )
    assert error.hint == "correct the command"


def test_a_prefix_that_fails() -> None:
    error = failure(bundle.local_command(), ["sh", "-c", "echo no >&2; exit 5"])
    assert "exited with status 5" in error.message
    assert error.message.endswith(": no")


NOISE = "import os,sys;n=int(sys.argv[1])\nwhile n: n-=os.write(1,b'#'*min(n,4096))\nos.execv(sys.argv[2],sys.argv[2:])"


def noisy(count: int) -> list[str]:
    """Return a command that prints `count` bytes and then becomes the agent."""
    return [sys.executable, "-I", "-c", NOISE, str(count), *bundle.local_command()]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 10 << 10, NOISE_LIMIT - bundle.NONCE_SIZE])
def test_noise_before_the_agent_is_skipped(count: int) -> None:
    assert hello(noisy(count))["protocol"] == wire.PROTOCOL


@pytest.mark.parametrize("count", [NOISE_LIMIT - bundle.NONCE_SIZE + 1, 10 << 20])
def test_too_much_noise_is_refused(count: int) -> None:
    error = failure(noisy(count))
    assert error.message == "host printed more than 64 KiB before the agent began"
    assert error.hint == "look at what `ssh host true` prints, and at the shell's start files there"


def test_noise_that_looks_like_the_nonce_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    nonce = b"aab" * 5 + b"c"
    monkeypatch.setattr(secrets, "token_bytes", lambda count: nonce)
    start = f"import os,sys;os.write(1,{nonce[:-1] + nonce[:-1] + b'aaab'!r});os.execv(sys.argv[1],sys.argv[1:])"
    assert hello([sys.executable, "-I", "-c", start, *bundle.local_command()])["protocol"] == wire.PROTOCOL


def test_a_command_that_prints_without_end_is_refused_in_bounded_memory() -> None:
    tracemalloc.start()
    try:
        error = failure(["sh", "-c", "while :; do echo Welcome to this host; echo Welcome >&2; done"])
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert error.message == "host printed more than 64 KiB before the agent began"


def test_a_command_that_stays_silent_is_given_up() -> None:
    error = failure(["sleep", "1000"], timeout_s=0.05)
    assert error.message == "no agent began on host in time (waited for 0.05 s): it said nothing"


def test_a_command_that_fails_at_once_is_told_with_its_last_words() -> None:
    error = failure(["sh", "-c", "echo first >&2; printf 'This account is \\033[31mclosed\\n\\n' >&2; exit 3"])
    said = "first; This account is \\x1b[31mclosed"
    assert error.message == f"the command on host exited with status 3 before the agent began: {said}"
    assert error.hint is not None and error.hint.startswith("`ssh -o BatchMode=yes host true` must work")


def test_a_command_that_ends_is_told_soon_though_what_it_left_behind_holds_its_pipe(tmp_path: Path) -> None:
    """It has the time for the whole start otherwise."""
    script = f"exec 3<&0; sleep 600 <&3 2>/dev/null & echo $! >'{tmp_path}/left'; echo closed; exit 3"
    begun = time.monotonic()
    try:
        error = failure(["sh", "-c", script], timeout_s=200)
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)
    assert error.message == "the command on host exited with status 3 before the agent began: closed"
    assert time.monotonic() - begun < 60


def test_a_command_that_ends_well_without_an_agent_is_an_error() -> None:
    error = failure(["true"])
    assert error.message == "the command on host exited with status 0 before the agent began: it said nothing"


def test_a_command_that_dies_of_a_signal_is_told_so() -> None:
    error = failure(["sh", "-c", "kill -KILL $$"])
    assert error.message.startswith("the command on host died of signal 9 (SIGKILL) before the agent began")


def test_a_program_that_is_missing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"cannot start .*/nothing: No such file or directory"):
        ChildConnection([str(tmp_path / "nothing")], Place("host", "host"))


def test_nothing_runs_once_the_connection_is_closed() -> None:
    """Even where the program does not listen to SIGTERM, and a thread of ours waits in a write to it."""
    stubborn = "import os,signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(1, b'ready')\nsignal.pause()"
    child = ChildConnection([sys.executable, "-I", "-c", stubborn], Place("host", "host"), stop_timeout_s=0.1)
    assert child.readinto(memoryview(bytearray(5)), 30) > 0
    failed: list[BlockdiffError] = []

    def write() -> None:
        try:
            child.write([bytes(8 << 20)])
        except BlockdiffError as error:
            failed.append(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    child.close()
    child.close()
    writer.join(30)
    assert not writer.is_alive()
    assert len(failed) == 1
    assert child.wait(0) is not None


@pytest.mark.parametrize("version", INTERPRETERS)
def test_every_python_becomes_the_agent(version: str) -> None:
    command = [str(INTERPRETERS[version]), *bundle.local_command()[1:]]
    for prefix in ([], ["env"]):
        assert str(hello(command, prefix)["python"]).startswith(f"{version}.")
