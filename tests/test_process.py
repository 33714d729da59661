"""Child processes: deadlines, children that are never killed, and signals that end the caller but not its child."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff.shared import process
from blockdiff.shared.errors import Interrupted, ProcessError
from tests import processes

LIMIT_S = 30.0

#: Notes each signal in a file, and ends after the one that is named (0: never, until the file `go` appears).
NOTING = """
import os, signal, sys, time
directory, last, status = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
seen = []
def note(number, frame):
    seen.append(number)
    with open(directory + "/signals", "a") as file:
        file.write(signal.Signals(number).name + " ")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
open(directory + "/begun", "w").write(str(os.getpid()))
while last not in seen and not os.path.exists(directory + "/go"):
    time.sleep(0.005)
os.write(1, b"told")
open(directory + "/done", "w")
sys.exit(status)
"""


def noting(directory: Path, last: int = 0, status: int = 0) -> list[str]:
    return [sys.executable, "-ISc", NOTING, str(directory), str(last), str(status)]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.002)


@pytest.fixture
def blocked() -> Iterator[None]:
    """SIGINT and SIGTERM wait until a child lets them in, however late it is: children inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_failed_command_is_told_with_its_last_words_unless_it_is_not_checked() -> None:
    command = ["sh", "-c", "echo first >&2; echo '  last ' >&2; echo out; exit 3"]
    with pytest.raises(ProcessError, match=r"exited with status 3: last$"):
        process.run(command, LIMIT_S)
    completed = process.run(command, LIMIT_S, check=False)
    assert completed == (b"out\n", b"first\n  last \n", 3)
    assert process.run_gently(command, LIMIT_S, check=False) == completed
    with pytest.raises(ProcessError, match=r"exited with status 3: last$"):
        process.run_gently(command, LIMIT_S)


@pytest.mark.parametrize("run", [process.run, process.run_gently])
def test_a_command_that_is_not_there_is_named(run: object) -> None:
    assert callable(run)
    with pytest.raises(ProcessError, match="cannot start blockdiff-none: No such file"):
        run(["blockdiff-none"], LIMIT_S)


def test_a_command_that_is_not_done_in_time_is_stopped() -> None:
    mark = processes.new_mark()
    with pytest.raises(process.DeadlineError, match=r"did not end within 0\.5 s$"):
        process.run(["sleep", "600"], 0.5, env={**os.environ, **processes.environment(mark)})
    assert processes.marked(mark) == {}


@pytest.mark.usefixtures("blocked")
def test_a_gentle_child_gets_sigint_first(tmp_path: Path) -> None:
    with pytest.raises(process.DeadlineError, match=r"did not end within 0\.5 s$") as caught:
        process.run_gently(noting(tmp_path, signal.SIGINT, 5), 0.5)
    assert (tmp_path / "signals").read_text() == "SIGINT "
    assert caught.value.more == ""


@pytest.mark.usefixtures("blocked")
def test_a_gentle_child_that_succeeds_after_all_was_not_late(tmp_path: Path) -> None:
    assert process.run_gently(noting(tmp_path, signal.SIGINT, 0), 0.5).stdout == b"told"


@pytest.mark.usefixtures("blocked")
def test_a_gentle_child_that_waits_on_gets_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GENTLE_TIMEOUT_S", 0.3)
    with pytest.raises(process.DeadlineError):
        process.run_gently(noting(tmp_path, signal.SIGTERM, 5), 0.5)
    wait_for(tmp_path / "done")
    # one that was late takes both at once, in any order, and is left alone
    assert sorted((tmp_path / "signals").read_text().split()) == ["SIGINT", "SIGTERM"]
    for child in process.LEFT_ALONE:
        child.communicate(timeout=LIMIT_S)
    process.LEFT_ALONE.clear()


@pytest.mark.usefixtures("blocked")
def test_a_gentle_child_is_never_killed_and_can_finish_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GENTLE_TIMEOUT_S", 0.2)
    script = "trap '' INT TERM; while [ ! -e go ]; do sleep 0.01; done; echo told; touch done"
    try:
        with pytest.raises(process.DeadlineError, match=r"and process \d+ is still running") as caught:
            process.run_gently(["sh", "-c", f"cd {tmp_path}; {script}"], 0.2)
        child = process.LEFT_ALONE.pop()
        assert child.poll() is None and f"process {child.pid} " in caught.value.more
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()  # as when we end: what it prints now must not be its death
        child.stderr.close()
    finally:
        (tmp_path / "go").touch()
    assert child.wait(LIMIT_S) == 0
    assert (tmp_path / "done").exists()


def test_a_gentle_child_has_a_session_of_its_own() -> None:
    found = process.run_gently([sys.executable, "-ISc", "import os; print(os.getsid(0) == os.getpid())"], LIMIT_S)
    assert found.stdout == b"True\n"


def test_a_signal_to_the_caller_does_not_end_a_gentle_child(tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_for(tmp_path / "begun")
        processes.interrupt_main_thread(signal.SIGUSR1)
        (tmp_path / "go").touch()

    helper = threading.Thread(target=interrupt)
    with processes.interrupting(signal.SIGUSR1):
        helper.start()
        with pytest.raises(Interrupted):
            process.run_gently(noting(tmp_path), LIMIT_S)
        assert (tmp_path / "done").exists()
        assert not (tmp_path / "signals").exists()
        helper.join(LIMIT_S)


@pytest.mark.parametrize("how", ["run", "run_shell", "run_gently", "stream"])
def test_what_a_child_leaves_behind_with_its_output_open_is_not_waited_for_and_let_be(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not ended for what it says later, either."""
    monkeypatch.setattr(process, "LINGER_S", 0.2)
    later = "(until [ -e go ]; do sleep 0.01; done; echo more; echo more >&2; touch done) & echo told; echo said >&2"
    script = f"cd '{tmp_path}'; {later}"
    taken: list[bytes] = []
    try:
        if how == "run":
            completed = process.run(["sh", "-c", script], LIMIT_S)
        elif how == "run_shell":
            completed = process.run_shell(script, LIMIT_S)
        elif how == "run_gently":
            completed = process.run_gently(["sh", "-c", script], LIMIT_S)
        else:
            completed = process.feed(["sh", "-c", script], LIMIT_S, taken.append, never)
    finally:
        (tmp_path / "go").touch()
    assert completed == (b"" if how == "stream" else b"told\n", b"said\n", 0)
    assert how != "stream" or b"".join(taken) == b"told\n"
    wait_for(tmp_path / "done")
    for pipe in process._LEFT_OPEN:
        pipe.close()
    process._LEFT_OPEN.clear()


def test_a_child_that_leaves_nothing_behind_is_heard_to_its_end_although_we_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time for what others hold open is over before anything of it was read."""
    monkeypatch.setattr(process, "LINGER_S", -1.0)
    with process.started(lambda: process._start(["sh", "-c", "echo told; echo said >&2"], None)) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        output = process.Output(child)
        assert output.wait(LIMIT_S)
    assert (output.completed(), output.is_held) == ((b"told\n", b"said\n", 0), False)


def never() -> bool:
    return False


def test_a_stream_is_consumed_while_it_comes() -> None:
    taken: list[bytes] = []
    script = "head -c 300000 /dev/zero; seq 1 100000 >&2; echo end; echo sorry >&2; exit 2"
    ended = process.feed(["sh", "-c", script], LIMIT_S, taken.append, never)
    assert b"".join(taken) == bytes(300000) + b"end\n"
    assert ended.returncode == 2
    assert ended.stderr.endswith(b"100000\nsorry\n") and len(ended.stderr) <= 1 << 16


@pytest.mark.parametrize("closed", ["", "exec >&- 2>&-;"])
def test_a_stream_that_does_not_end_is_stopped(closed: str) -> None:
    mark = processes.new_mark()
    env = {**os.environ, **processes.environment(mark)}
    with pytest.raises(process.DeadlineError, match=r"did not end within 0\.5 s"):
        process.feed(["sh", "-c", f"{closed} exec sleep 600"], 0.5, lambda data: None, never, env)
    assert processes.marked(mark) == {}


def not_permitted(*_arguments: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_child_that_we_may_not_end_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that has become another user's, through sudo."""
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "send_signal", not_permitted)
        with pytest.raises(process.DeadlineError, match=r"did not end within 0\.1 s"):
            process.run(["sleep", "600"], 0.1)
    child = process.LEFT_ALONE.pop()
    assert child.poll() is None and child.stdout is not None and not child.stdout.closed
    child.kill()
    child.communicate(timeout=LIMIT_S)
    assert child.returncode == -signal.SIGKILL


def test_a_session_that_we_may_not_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it freezes must not be thawed before, whatever it has to say until then."""

    def refuse(*_arguments: object) -> None:
        (tmp_path / "go").touch()
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", refuse)
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.1)
    script = f"cd '{tmp_path}'; until [ -e go ]; do sleep 0.01; done; sleep 0.3; head -c 300000 /dev/zero; touch done"
    with pytest.raises(process.DeadlineError, match=r"did not end within 0\.1 s"):
        process.run_shell(script, 0.1)
    assert (tmp_path / "done").exists()


def test_what_a_shell_has_started_as_another_user_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell itself can be ended, and is."""
    killpg = os.killpg

    def kill(group: int, number: int) -> None:
        (tmp_path / "go").touch()
        if number != signal.SIGTERM:
            raise PermissionError(1, "Operation not permitted")
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", kill)
    script = f"cd '{tmp_path}'; (trap '' TERM; until [ -e go ]; do sleep 0.01; done; sleep 0.3; touch done); true"
    with pytest.raises(process.DeadlineError, match=r"did not end within 1 s"):
        process.run_shell(script, 1)
    assert (tmp_path / "done").exists()


def test_a_failure_while_a_session_is_listened_to_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = processes.new_mark()
    for name, value in processes.environment(mark).items():
        monkeypatch.setenv(name, value)

    def fail(*_arguments: object, **_keywords: object) -> None:
        raise MemoryError

    monkeypatch.setattr(process.Output, "wait", fail)
    with pytest.raises(MemoryError):
        process.run_shell("sleep 600; sleep 600", LIMIT_S)
    processes.wait_until_gone(mark)


def test_a_stream_is_stopped_when_told_to(tmp_path: Path) -> None:
    with pytest.raises(process.DeadlineError):
        script = f"echo $$ >{tmp_path}/pid; exec sleep 600"
        process.feed(["sh", "-c", script], LIMIT_S, lambda data: None, (tmp_path / "pid").exists)
    wait_for(tmp_path / "pid")


def test_a_stream_that_cannot_be_consumed_is_stopped(tmp_path: Path) -> None:
    def refuse(data: bytes) -> None:
        raise ProcessError("no " + data.decode().strip())

    with pytest.raises(ProcessError, match="no thanks"):
        script = f"echo $$ >{tmp_path}/pid; echo thanks; exec sleep 600"
        process.feed(["sh", "-c", script], LIMIT_S, refuse, never)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
