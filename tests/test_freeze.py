"""The commands of --before and --after: their order, their deadlines, and that the second runs whatever happens."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdiff.host import freeze
from blockdiff.host.freeze import Freeze
from blockdiff.shared import process, wire
from blockdiff.shared.errors import Interrupted, SourceError
from tests import agents, processes
from tests.descriptors import all_closed
from tests.interpreters import INTERPRETERS

LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parent.parent

#: Freezes in a process of its own, says so, and waits to be killed.
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from blockdiff.host.freeze import Freeze
with Freeze(sys.argv[2], sys.argv[3]):
    print("frozen", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No process and no descriptor outlives the test; yields the mark by which the processes are known."""
    with all_closed(), processes.leaving_none(monkeypatch) as mark:
        yield mark


class Log:
    """A file to which commands append their words."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def command(self, word: str, more: str = "") -> str:
        return f"echo {word} >> '{self.path}'; {more}"

    def words(self) -> list[str]:
        return self.path.read_text().split()

    def wait_for(self, *words: str) -> None:
        wait_until(lambda: self.words() == list(words), lambda: str(self.words()))


def wait_until(condition: Callable[[], object], shown: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.005)


def waiting(directory: Path) -> str:
    """Return what waits for the file ``go``."""
    return f"while [ ! -e '{directory}/go' ]; do sleep 0.02; done"


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def test_one_runs_before_and_the_other_after(log: Log) -> None:
    with Freeze(log.command("before"), log.command("after")):
        assert log.words() == ["before"]
        log.path.write_text("before\nwithin\n")
    assert log.words() == ["before", "within", "after"]


def test_either_may_be_left_out(log: Log) -> None:
    with Freeze(None, None):
        pass
    with Freeze(log.command("before"), None):
        pass
    assert log.words() == ["before"]
    with Freeze(None, log.command("after")):
        assert log.words() == ["before"]
    assert log.words() == ["before", "after"]


def test_the_shell_has_its_way_with_both(log: Log) -> None:
    quoted = f"""X='a "b'; printf '%s\\n' "$X" | tr -d ' "' >> '{log.path}'"""
    with Freeze(quoted, quoted):
        pass
    assert log.words() == ["ab", "ab"]


def test_after_runs_where_the_body_raises(log: Log) -> None:
    with pytest.raises(ZeroDivisionError), Freeze(log.command("before"), log.command("after")):
        1 / 0  # noqa: B018
    assert log.words() == ["before", "after"]


def test_after_runs_where_before_fails(log: Log) -> None:
    with (
        pytest.raises(SourceError) as caught,
        Freeze(log.command("before", "echo one >&2; echo two >&2; exit 3"), log.command("after")),
    ):
        pytest.fail("it is not frozen")
    assert re.fullmatch(
        r"the command of --before failed: /bin/sh -c echo before .* exited with status 3: two", caught.value.message
    )
    assert caught.value.hint == "run it by hand on the host to see why"
    assert log.words() == ["before", "after"]


def test_an_after_that_fails_is_a_failure_and_tried_once(log: Log) -> None:
    with (
        pytest.raises(SourceError, match=r"^the command of --after failed: .* died of signal 9 \(SIGKILL\)$") as caught,
        Freeze(None, log.command("after", "kill -9 $$")),
    ):
        pass
    assert caught.value.hint == "run it by hand on the host to see why"
    assert log.words() == ["after"]


@pytest.mark.parametrize("hint", [None, "a hint"])
def test_what_failed_first_is_the_headline(log: Log, hint: str | None) -> None:
    with pytest.raises(SourceError, match=r"^no snapshot$") as caught, Freeze(None, log.command("after", "exit 5")):
        raise SourceError("no snapshot", hint)
    found = str(caught.value.hint)
    assert found.startswith("a hint; the command of --after failed: " if hint else "the command of --after failed: ")
    assert found.endswith("exited with status 5")
    with pytest.raises(SourceError, match=r"^the command of --before failed:") as caught, Freeze("exit 1", "exit 5"):
        pytest.fail("it is not frozen")
    assert "; the command of --after failed: /bin/sh -c exit 5 exited with status 5" in str(caught.value.hint)


def give_no_time(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Let this command take 0.2 s, and all others as long as they may."""
    run_shell = process.run_shell

    def run(command: str, timeout_s: float, held: int | None = None) -> process.Completed:
        assert timeout_s == freeze.COMMAND_TIMEOUT_S
        return run_shell(command, 0.2 if command == slow else timeout_s, held)

    monkeypatch.setattr(process, "run_shell", run)


@pytest.mark.parametrize("option", ["--before", "--after"])
def test_what_a_command_leaves_behind_is_let_be(log: Log, tmp_path: Path, option: str) -> None:
    """Though it holds all that the command had open; its end is not waited for, by the guard neither."""
    pid = tmp_path / "pid"
    leaving = log.command(option, f"sleep 600 & echo $! > '{pid}'")
    before, after = (leaving, log.command("--after")) if option == "--before" else (log.command("--before"), leaving)
    with Freeze(before, after):
        assert log.words() == ["--before"]
    assert log.words() == ["--before", "--after"]
    os.kill(int(pid.read_text()), signal.SIGKILL)  # it was there still
    while process._LEFT_OPEN:
        process._LEFT_OPEN.pop().close()


@pytest.mark.parametrize("option", ["--before", "--after"])
def test_a_command_that_does_not_end_is_stopped_with_all_that_it_started(
    log: Log, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    slow = "sleep 100; echo never"
    give_no_time(monkeypatch, slow)
    before, after = (slow, log.command("after")) if option == "--before" else (None, slow)
    with (
        pytest.raises(SourceError, match=rf"^the command of {option} failed: .* did not end within 0\.2 s$"),
        Freeze(before, after),
    ):
        assert option == "--after"
    assert log.words() == (["after"] if option == "--before" else [])
    # that nothing is left of it is seen to by the fixture


def test_a_command_that_ignores_to_be_stopped_is_killed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "trap '' TERM; (sleep 100); sleep 100"
    give_no_time(monkeypatch, stubborn)
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.2)
    with pytest.raises(SourceError, match="did not end within"), Freeze(stubborn, log.command("after")):
        pytest.fail("it is not frozen")
    assert log.words() == ["after"]


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_signal_does_not_keep_after_from_being_done(log: Log, where: str) -> None:
    """Its handler raises in the main thread, whatever that waits for just then."""
    me = os.getpid()
    once = f"mkdir '{log.path}.sent' 2>/dev/null && kill -USR1 {me}; sleep 0.3; "
    with (
        processes.interrupting(signal.SIGUSR1),
        pytest.raises(Interrupted),
        Freeze(
            log.command("before", once if where == "before" else ""),
            log.command("after", (once if where == "after" else "") + f"echo done >> '{log.path}'"),
        ),
    ):
        if where == "within":
            os.kill(me, signal.SIGUSR1)
    assert log.words() == ["before", "after", "done"]


def test_after_runs_once_where_the_process_is_killed(log: Log) -> None:
    with started(log.command("before"), log.command("after")) as child:
        assert child.stdout is not None and child.stdout.readline() == b"frozen\n"
        child.kill()
        child.wait(LIMIT_S)
        log.wait_for("before", "after")


def test_after_runs_where_the_whole_process_group_is_killed(log: Log) -> None:
    with started(log.command("before"), log.command("after")) as child:
        assert child.stdout is not None and child.stdout.readline() == b"frozen\n"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(LIMIT_S)
        log.wait_for("before", "after")


def test_after_waits_for_the_end_of_a_before_whose_process_was_killed(log: Log, tmp_path: Path) -> None:
    """To thaw before the freeze is done is to stay frozen for good."""
    before = log.command("before", f"{waiting(tmp_path)}; {log.command('frozen')}")
    with started(before, log.command("after")) as child:
        log.wait_for("before")
        child.kill()
        child.wait(LIMIT_S)
        (tmp_path / "go").touch()
        log.wait_for("before", "frozen", "after")


def started(before: str, after: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD, ROOT, before, after], stdout=subprocess.PIPE, start_new_session=True
    )


def test_a_guard_that_cannot_be_started_is_a_failure_before_anything_is_held(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*arguments: object, **keywords: object) -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(SourceError, match=r"^cannot start /bin/sh: .*Resource temporarily unavailable"):
        Freeze(log.command("before"), log.command("after")).__enter__()
    assert log.words() == []


def test_a_guard_that_was_killed_is_no_failure(log: Log, nothing_left: str) -> None:
    with Freeze(log.command("before"), log.command("after")):
        wait_until(lambda: guards(nothing_left))
        for pid in guards(nothing_left):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not guards(nothing_left))
    assert log.words() == ["before", "after"]


def guards(mark: str) -> list[int]:
    return [pid for pid, command in processes.marked(mark).items() if "blockdiff-guard" in command]


def test_the_guard_does_not_wait_for_what_before_has_left_behind(log: Log, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    leaving = f"sleep 600 & echo $! > '{pid}'"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), leaving, log.command("after")], stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == b"frozen\n"
        child.kill()
    log.wait_for("after")
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_signal_while_the_guard_is_started_runs_neither(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not begun need not be ended: `after` may start what was stopped on purpose."""
    start_guard = freeze._start_guard

    def start(after: str) -> "subprocess.Popen[bytes]":
        guard = start_guard(after)
        os.kill(os.getpid(), signal.SIGTERM)
        return guard

    monkeypatch.setattr(freeze, "_start_guard", start)
    with processes.interrupting(signal.SIGTERM), pytest.raises(Interrupted):
        Freeze(log.command("before"), log.command("after")).__enter__()
    assert log.words() == []


# --- through the agent, as it is shipped


@pytest.fixture(params=[name for name in INTERPRETERS if name in ("3.6", "3.11")])
def command(request: pytest.FixtureRequest) -> list[str]:
    return agents.command(INTERPRETERS[request.param])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"content")
    return path


def test_the_agent_runs_both_around_the_reading_and_tells_how_long_that_took(
    command: list[str], image: Path, log: Log
) -> None:
    """Of a source that is read as it is. Who is held still waits for the agent, which then yields to nobody."""
    image.write_bytes(bytes(range(1, 256)) * (64 << 10))  # more than the pipe holds
    with agents.conversation(command) as talk:
        more: dict[str, object] = {"low_priority": True}
        talk.request(image, before=log.command("before", "sleep 0.2"), after=log.command("after"), **more)
        talk.link.read_json(talk.expect(wire.SOURCE))
        assert os.getpriority(os.PRIO_PROCESS, talk.child._child.pid) == os.nice(0)
        frame = talk.next()
        assert frame.kind == wire.DATA
        assert log.words() == ["before"]
        while frame.kind != wire.TOTALS:
            talk.link.read_bytes(frame, wire.MAX_PAYLOAD)
            frame = talk.next()
        talk.link.read_json(frame)
        held = talk.link.read_json(talk.expect(wire.END))["held_us"]
        assert log.words() == ["before", "after"]
        assert isinstance(held, int) and 200_000 <= held < LIMIT_S * 1e6


@pytest.mark.parametrize("option", ["before", "after"])
def test_the_agent_reports_which_command_failed(command: list[str], image: Path, log: Log, option: str) -> None:
    error = agents.failure(image, command, **{option: "exit 7"})
    assert type(error) is SourceError
    assert error.message == f"host: the command of --{option} failed: /bin/sh -c exit 7 exited with status 7"


@pytest.mark.parametrize("how", ["cut", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_after_runs_where_the_agent_ends_while_before_is_at_work(
    command: list[str], image: Path, log: Log, tmp_path: Path, how: str, nothing_left: str
) -> None:
    with agents.conversation(command) as talk:
        talk.request(image, before=log.command("before", f"{waiting(tmp_path)}"), after=log.command("after"))
        log.wait_for("before")
        end_agent(talk, how)
        if how == "SIGKILL":
            assert log.words() == ["before"]
            (tmp_path / "go").touch()
        log.wait_for("before", "after")
        assert talk.child.wait(LIMIT_S) not in (None, (0,))
    processes.wait_until_gone(nothing_left)
    assert log.words() == ["before", "after"]


@pytest.mark.parametrize("how", ["cut", "SIGTERM", "SIGKILL"])
def test_after_is_done_where_the_agent_ends_meanwhile(
    command: list[str], image: Path, log: Log, tmp_path: Path, how: str, nothing_left: str
) -> None:
    """Killed, it leaves the one that runs to itself, and the guard runs it again: that is better than not at all."""
    after = log.command("after", f"{waiting(tmp_path)}; {log.command('done')}")
    with agents.conversation(command) as talk:
        talk.request(image, after=after)
        log.wait_for("after")
        end_agent(talk, how)
        if how == "SIGKILL":
            log.wait_for("after", "after")
        else:  # it must not be done before it knows of the end
            wait_until(lambda: ignores(talk.child._child.pid, signal.SIGTERM))
        (tmp_path / "go").touch()
        wait_until(lambda: "done" in log.words())
        assert talk.child.wait(LIMIT_S) not in (None, (0,))
    if how != "SIGKILL":
        processes.wait_until_gone(nothing_left)
        assert log.words() == ["after", "done"]


def ignores(pid: int, number: signal.Signals) -> bool:
    """Return whether a process ignores a signal: ours do once they have begun to unwind."""
    ignored = re.search(r"^SigIgn:\s*([0-9a-f]+)$", Path("/proc", str(pid), "status").read_text(), re.MULTILINE)
    assert ignored is not None
    return bool(int(ignored[1], 16) >> (number - 1) & 1)


def end_agent(talk: agents.Conversation, how: str) -> None:
    """Let the agent end: by a signal, or by the end of its connection, as the death of the server makes it."""
    if how == "cut":
        talk.child._input.close()
    else:
        os.kill(talk.child._child.pid, getattr(signal, how))
