"""LVCREATE_PREFIX: any command line that executes what it is given, and what becomes of those that do not."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdiff.original import lockcommand
from blockdiff.shared import process
from blockdiff.shared.errors import Interrupted, ProcessError, SourceError
from tests import processes
from tests.descriptors import all_closed

LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parent.parent
SECRET = "hush-4711"

#: Takes under the lock command in a process of its own, and waits to be killed.
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from blockdiff.original import lockcommand
def take():
    print("taking", flush=True)
    time.sleep(100)
lockcommand.around(sys.argv[2], take)
"""


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """No process, no descriptor and no temporary file outlives the test; yields the mark of the processes."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with all_closed(), processes.leaving_none(monkeypatch) as mark:
        yield mark
    assert list(temporary.iterdir()) == []


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A lock script of the kind that users have: it writes down what it does to the file ``log``."""
    path = tmp_path / "lo ck.sh"
    path.write_text(
        f"""#!/bin/sh
say() {{ echo "$@" >> '{tmp_path}/log'; }}
say "locked FOO=$FOO $1 $2"
shift 2
"$@"
status=$?
say "unlocked $status"
exit $status
"""
    )
    path.chmod(0o755)
    return path


def words(script: Path) -> list[str]:
    return (script.parent / "log").read_text().splitlines()


def take() -> float:
    return 1.5


def refused(command: str, taking: Callable[[], float] = take) -> ProcessError:
    with pytest.raises(ProcessError) as caught:
        lockcommand.around(command, taking)
    assert SECRET not in caught.value.message + str(caught.value.hint)
    return caught.value


@pytest.mark.parametrize(
    "command", ["env", "nice", "nice -n 5", "env -i", "exec", "A=1 B=' ' env --", "true && nice", "sh -c '\"$@\"' x"]
)
def test_a_command_that_executes_what_it_is_given_does(command: str) -> None:
    taken: list[int] = []

    def taking() -> float:
        taken.append(1)
        return 1.5

    took_s, held_s = lockcommand.around(command, taking)
    assert took_s == 1.5 and 0 < held_s < LIMIT_S
    assert taken == [1]


def test_the_lock_is_held_while_it_is_taken(script: Path) -> None:
    def taking() -> float:
        assert words(script) == ["locked FOO=1 -x a  b"]
        return 0.0

    lockcommand.around(f"FOO=1 '{script}' -x \"a  b\"", taking)
    assert words(script) == ["locked FOO=1 -x a  b", "unlocked 0"]


def test_what_it_prints_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    lockcommand.around("echo out; echo err >&2; env", take)
    assert capfd.readouterr() == ("", "out\nerr\n")


def test_it_reads_nothing_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    lockcommand.around("wc -c; env", take)
    assert capfd.readouterr().err == "0\n"


@pytest.mark.parametrize(
    ("command", "how"),
    [
        (f"true {SECRET} #", "exited with status 0"),
        (f"echo {SECRET}", "exited with status 0"),
        (f"false {SECRET}", "exited with status 1"),
        (f"exit 3; {SECRET}", "exited with status 3"),
        (f"kill -9 $$ {SECRET};", "died of signal 9 (SIGKILL)"),
        (f"/no/such/command {SECRET}", "exited with status 127"),
        (f'unclosed "{SECRET}', "exited with status 2"),
    ],
)
def test_a_command_that_does_not_execute_what_it_is_given_is_refused(command: str, how: str) -> None:
    error = refused(command, lambda: pytest.fail("nothing is locked"))
    assert error.message == f"the command in LVCREATE_PREFIX {how} without executing what it was given"
    assert error.hint == "it must execute the command line that follows it, as `nice` does"


@pytest.mark.parametrize(
    ("end", "how"), [("exit 4", "exited with status 4"), ("kill -9 $$", "died of signal 9 (SIGKILL)")]
)
def test_a_command_that_fails_afterwards_proves_nothing(end: str, how: str) -> None:
    error = refused(f'run() {{ "$@"; : {SECRET}; {end}; }}; run')
    unknown = "whether it held its lock while the snapshot was made is not known"
    assert error.message == f"the command in LVCREATE_PREFIX {how}: {unknown}"


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("exit 0", "exited with status 0"),
        ("kill $!; wait; exit 0", "exited with status 0"),
        ("kill $!; exit 9", "exited with status 9"),
    ],
)
def test_a_command_that_does_not_wait_for_the_end_of_what_it_executes_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, how: str
) -> None:
    """It has let go of its lock by then, whatever status it ends with."""
    accept, pids = lockcommand._accept, []

    def accepting(listener: socket.socket, child: "subprocess.Popen[bytes]") -> socket.socket:
        pids.append(child.pid)
        return accept(listener, child)

    def taking() -> float:
        (tmp_path / "go").touch()
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        return 0.0

    monkeypatch.setattr(lockcommand, "_accept", accepting)

    error = refused(f"run() {{ \"$@\" & while [ ! -e '{tmp_path}/go' ]; do sleep 0.02; done; {end}; }}; run", taking)
    unknown = "whether it held its lock while the snapshot was made is not known"
    assert error.message == f"the command in LVCREATE_PREFIX {how} before the snapshot was made: {unknown}"


def test_a_command_that_executes_it_twice_takes_once(capfd: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []

    def taking() -> float:
        taken.append(1)
        return 0.0

    error = refused('run() { "$@"; "$@"; }; run', taking)
    assert "exited with status 1: whether it held its lock" in error.message
    assert taken == [1]


def test_a_command_that_never_executes_anything_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockcommand, "LOCK_TIMEOUT_S", 0.2)
    error = refused(f"sleep 100; : {SECRET}", lambda: pytest.fail("nothing is locked"))
    assert error.message == "the command in LVCREATE_PREFIX was not ready after 0.2 s"


def test_a_command_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockcommand, "END_TIMEOUT_S", 0.2)
    error = refused(f'run() {{ "$@"; sleep 100; : {SECRET}; }}; run')
    assert error.message == "the command in LVCREATE_PREFIX did not end within 0.2 s of the snapshot"


def test_a_command_that_ignores_to_be_stopped_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockcommand, "LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.2)
    refused("trap '' TERM; (sleep 100); sleep 100; env", lambda: pytest.fail("nothing is locked"))


@pytest.mark.parametrize("error", [SourceError("no snapshot"), Interrupted("a signal"), ZeroDivisionError("x")])
def test_a_failure_goes_on_after_the_command_has_unlocked(script: Path, error: BaseException) -> None:
    def taking() -> float:
        raise error

    with pytest.raises(type(error)) as caught:
        lockcommand.around(f"'{script}' -x y", taking)
    assert caught.value is error
    assert words(script) == ["locked FOO= -x y", "unlocked 1"]


def test_a_failure_goes_on_although_the_command_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockcommand, "END_TIMEOUT_S", 0.2)

    def taking() -> float:
        raise SourceError("no snapshot")

    with pytest.raises(SourceError, match="no snapshot"):
        lockcommand.around('run() { "$@"; sleep 100; }; run', taking)


def test_a_signal_while_the_lock_is_waited_for_stops_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(*_arguments: object) -> socket.socket:
        raise Interrupted("a signal")

    monkeypatch.setattr(lockcommand, "_accept", accept)
    with pytest.raises(Interrupted):
        lockcommand.around("sleep 100; env", take)


@pytest.mark.parametrize("when", ["while it takes", "while the lock is waited for"])
def test_the_command_unlocks_where_our_process_is_killed(script: Path, tmp_path: Path, when: str) -> None:
    command = f"'{script}' -x y"
    if when == "while the lock is waited for":
        command = f"echo > '{tmp_path}/waiting'; while [ ! -e '{tmp_path}/go' ]; do sleep 0.02; done; {command}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what was killed cleans up nothing
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD, ROOT, command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        if when == "while it takes":
            assert child.stdout.readline() == b"taking\n"
        else:
            wait_until((tmp_path / "waiting").exists)
        child.kill()
        child.wait(LIMIT_S)
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "log").exists() and words(script) == ["locked FOO= -x y", "unlocked 1"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_directory_too_deep_for_a_socket_names_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    error = refused("env", lambda: pytest.fail("nothing is locked"))
    assert error.message.startswith(f"cannot make the socket {deep}/blockdiff-")
    assert error.message.endswith("/go for the command in LVCREATE_PREFIX: AF_UNIX path too long")
    assert error.hint == "TMPDIR in the environment names another directory"
    assert list(deep.iterdir()) == []


def test_a_shell_that_cannot_be_started_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*arguments: object, **keywords: object) -> object:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", popen)
    error = refused("env", lambda: pytest.fail("nothing is locked"))
    assert error.message == "cannot start /bin/sh for the command in LVCREATE_PREFIX: Cannot allocate memory"


def test_nobody_else_can_say_that_the_lock_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    bind = socket.socket.bind

    def watched(self: socket.socket, address: str) -> None:
        seen.append(os.stat(os.path.dirname(address)).st_mode & 0o777)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", watched)
    lockcommand.around("env", take)
    assert seen == [0o700]
