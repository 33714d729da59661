"""BLOCKDIFF_TRACE=FILE: what a run does, from both ends, without a secret in it, and without a change of the run."""

import os
import re
import socket
import stat
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from blockdiff.shared import trace, tracewriter, wire
from blockdiff.shared.errors import ConnectionLost, ProtocolError
from blockdiff.transport import bundle
from blockdiff.transport.advice import Place
from blockdiff.transport.child import ChildConnection
from tests import agents, commands
from tests.interpreters import INTERPRETERS
from tests.mariadb import MariaDB
from tests.sshd import Sshd

LINE = re.compile(r"(\S+Z) (\d+) (server|server \d+|agent \d+): (.*)")
SECRET = b"the bytes of this block are nobody's business;"
PASSWORD = "correct-horse-battery"


def traced(file: Path, *arguments: str | Path, **env: str) -> "subprocess.CompletedProcess[bytes]":
    return commands.run(*arguments, env={"BLOCKDIFF_TRACE": str(file), **env})


def read(file: Path) -> list[tuple[str, str]]:
    """Return who says what, of a trace whose times go forward."""
    first, *lines = file.read_text().splitlines()
    assert first + "\n" == tracewriter.MAGIC
    found = [match.groups() for line in lines if (match := LINE.fullmatch(line))]
    assert len(found) == len(lines)
    times = [time for time, _pid, _who, _what in found]
    assert times == sorted(times)
    return [(who, what) for _time, _pid, who, what in found]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image"
    file.write_bytes(SECRET * 3000 + os.urandom(200000))
    return file


def frames(said: list[tuple[str, str]], who: str, verb: str) -> list[str]:
    """Return the kinds of frames that one end sent or received, in order."""
    return [what.split(f"{verb} ")[1].split(",")[0] for by, what in said if by == who and f"{verb} " in what]


def check_both_ends(said: list[tuple[str, str]]) -> None:
    for sender, receiver, some in (
        ("server 1", "agent 1", ["REQUEST", "TAKE", "SCAN"]),
        # and END, behind which nobody waits for long for the agent's last line
        ("agent 1", "server 1", ["HELLO", "READY", "TAKEN", "SOURCE", "TOTALS"]),
    ):
        for who, verb in ((sender, "sent"), (receiver, "received")):
            assert [kind for kind in frames(said, who, verb) if kind in some] == some
    own_s = [float(what.split(" s: ")[0]) for who, what in said if who == "agent 1"]
    assert own_s == sorted(own_s)
    phases = [what for who, what in said if who == "server" and what.startswith("phase: ")]
    assert phases[0] == "phase: lock the chain and plan" and phases[-1] == "phase: commit"
    assert said[-1] == ("server", "exit status 0")


def test_a_local_run_is_traced_from_both_ends(tmp_path: Path, image: Path) -> None:
    result = traced(tmp_path / "trace", "blockdiff", "backup", tmp_path / "chain", image)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    said = read(tmp_path / "trace")
    check_both_ends(said)
    (began,) = [what for who, what in said if who == "server" and " began: " in what]
    number = began.split()[1]
    assert ("server", f"child {number} ended: 0") in said
    assert stat.S_IMODE((tmp_path / "trace").stat().st_mode) == 0o600


def test_a_run_over_ssh_is_traced_from_both_ends(tmp_path: Path, image: Path, sshd: Sshd) -> None:
    options = [*sshd.arguments, "--transport", "ssh"]
    for _ in range(2):
        result = traced(tmp_path / "trace", "blockdiff", "backup", tmp_path / "chain", sshd.url(image), *options)
        assert (result.returncode, result.stderr) == (0, b"")
    said = read(tmp_path / "trace")
    end = said.index(("server", "exit status 0"))
    for run in (said[: end + 1], said[end + 1 :]):
        check_both_ends(run)
        assert any(what.endswith(" began: ssh") for who, what in run if who == "server")
    assert any("sent DATA x " in what for who, what in said[:end] if who == "agent 1")


def test_a_restore_and_a_verify_have_their_phases(tmp_path: Path, image: Path) -> None:
    (tmp_path / "out").mkdir()
    commands.done("blockdiff", "backup", tmp_path / "chain", image)
    traced(tmp_path / "restore", "blockdiff", "restore", tmp_path / "chain", tmp_path / "out" / "image")
    traced(tmp_path / "verify", "blockdiff", "verify", tmp_path / "chain")
    assert ("server", "phase: apply generation 1") in read(tmp_path / "restore")
    assert ("server", "phase: verify generation 1") in read(tmp_path / "verify")


def test_a_trace_has_no_password_and_no_bytes_of_a_block(tmp_path: Path, image: Path, sshd: Sshd) -> None:
    """Not in the command, not in the environment, not where the run fails with it."""
    file = tmp_path / "trace"
    before = ["--before", f"echo {PASSWORD} >/dev/null", "--after", f"true {PASSWORD}"]
    options = [*sshd.arguments, "--transport", "ssh", *before]
    assert traced(file, "blockdiff", "backup", tmp_path / "c", sshd.url(image), *options).returncode == 0
    failing = ["--before", f"echo {PASSWORD} >&2; exit 1", "--after", "true"]
    options = [*sshd.arguments, "--transport", "ssh", *failing]
    assert traced(file, "blockdiff", "backup", tmp_path / "c", sshd.url(image), *options).returncode == 1
    text = file.read_bytes()
    assert PASSWORD.encode() not in text
    assert SECRET[:8] not in text
    assert sshd.user_key.read_bytes().splitlines()[1][:16] not in text
    assert b"ended by ProcessError" in text or b"ended by SourceError" in text


def test_a_trace_has_no_password_of_a_database(tmp_path: Path, mariadb: MariaDB) -> None:
    mariadb.run(f"CREATE USER traced@localhost IDENTIFIED BY '{PASSWORD}'")
    mariadb.run("GRANT RELOAD, PROCESS ON *.* TO traced@localhost")
    try:
        given = ["--user", "traced", "--socket", str(mariadb.socket)]
        for word, status in ((PASSWORD, 0), (PASSWORD + "-not", 1)):
            options = tmp_path / "my.cnf"
            options.touch(0o600)
            options.write_text(f"[client]\npassword={word}\n")
            command = ["mysqllock", *given, "--defaults-file", str(options), "true"]
            assert traced(tmp_path / "trace", *command).returncode == status
    finally:
        mariadb.run("DROP USER traced@localhost")
    said = [what for _who, what in read(tmp_path / "trace")]
    assert "phase: the database is locked" in said and "ended by DatabaseError" in said
    assert PASSWORD not in "\n".join(said)


def test_an_unforeseen_error_is_traced_without_its_words(tmp_path: Path) -> None:
    script = (
        "import sys, click\nfrom blockdiff.cli.outcome import run\n@click.command()\ndef broken():\n"
        f"    raise ValueError('{PASSWORD}')\nsys.argv[1:] = []\nrun(broken, 'broken')"
    )
    environment = {**os.environ, "BLOCKDIFF_TRACE": str(tmp_path / "trace"), "PYTHONPATH": str(commands.BIN.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    said = [what for _who, what in read(tmp_path / "trace")]
    assert "ended by ValueError" in said and any("in _outcome" in what for what in said)
    assert PASSWORD not in "\n".join(said)


def unwritable(place: Path) -> Mapping[str, Path]:
    (place / "other").write_text("a file of somebody's\n")
    (place / "directory").mkdir()
    return {
        "no directory": place / "none" / "trace",
        "a directory": place / "directory",
        "not a trace": place / "other",
        "full": Path("/dev/full"),
    }


@pytest.mark.parametrize("kind", ["no directory", "a directory", "not a trace", "full"])
def test_a_trace_that_cannot_be_written_changes_nothing_and_is_said_once(
    tmp_path: Path, image: Path, kind: str
) -> None:
    file = unwritable(tmp_path)[kind]
    result = traced(file, "blockdiff", "backup", tmp_path / "chain", image)
    assert (result.returncode, result.stdout) == (0, b"")
    (said,) = result.stderr.decode().splitlines()
    assert said.startswith(f"blockdiff: warning: cannot write the trace to {file}: ")
    assert traced(file, "blockdiff", "list", tmp_path / "none").returncode == 1
    assert (tmp_path / "other").read_text() == "a file of somebody's\n"


@pytest.mark.parametrize("value", ["", "1"])
def test_one_and_nothing_are_not_the_names_of_files(tmp_path: Path, value: str) -> None:
    env = {"BLOCKDIFF_TRACE": value}
    commands.run("blockdiff", "list", tmp_path / "none", cwd=tmp_path, env=env)
    assert list(tmp_path.iterdir()) == []


def test_without_a_trace_nothing_that_writes_one_is_imported() -> None:
    script = "import blockdiff.backup, blockdiff.cli.outcome, sys; print('blockdiff.shared.tracewriter' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(commands.BIN.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"False\n"
    assert (trace.report, trace.link) == (None, None)


@pytest.fixture
def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this very process write a trace."""
    file = tracewriter.TraceFile(str(tmp_path / "trace"))
    monkeypatch.setattr(trace, "report", file.add)
    monkeypatch.setattr(trace, "link", file.link)
    return tmp_path / "trace"


def agents_words(command: Sequence[str], file: Path) -> list[str]:
    """Start an agent, ask it for nothing sensible, and return what it says of itself until its end."""
    child = ChildConnection(command, Place("host", "host"))
    with child:
        conversation = agents.Conversation(child)
        conversation.link.send_json(wire.REQUEST, {})
        with pytest.raises(ProtocolError):
            conversation.next()
        with pytest.raises(ConnectionLost):
            conversation.next()
    return [what.partition(" s: ")[2].partition(",")[0] for who, what in read(file) if who == "agent 1"]


@pytest.mark.parametrize("version", INTERPRETERS)
def test_an_agent_on_any_python_says_what_it_does(asked_for: Path, version: str) -> None:
    said = agents_words([str(INTERPRETERS[version]), *bundle.local_command()[1:]], asked_for)
    assert said[0].startswith(f"python {version}.")
    # a thread of its own receives: it may be faster
    assert set(said[1:]) == {"sent HELLO", "received REQUEST", "sent ERROR"}


def test_an_agent_that_a_key_is_pinned_to_says_what_it_does(asked_for: Path) -> None:
    said = agents_words(["sh", "-c", f"exec {bundle.pinned_command(['/x'])}"], asked_for)
    assert set(said[1:]) == {"sent HELLO", "received REQUEST", "sent ERROR"}


def test_what_an_agent_says_is_made_harmless(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        file = tracewriter.TraceFile(str(tmp_path / "trace"))
        link = file.link(wire.Pipe(ours.fileno(), ours.fileno()), 60, 60, zlib.crc32)
        agent = wire.Link(wire.Pipe(theirs.fileno(), theirs.fileno()))
        agent.send(wire.TRACE, b"\x1b[31mred\n2026 1 server: phase: forged" + b"x" * 100000)
        agent.send(wire.TAKE)
        assert link.receive().kind == wire.TAKE
        (who, what), _server = read(tmp_path / "trace")
        assert who == "agent 1" and what.startswith("\\x1b[31mred\\n2026") and len(what) == 500
        with pytest.raises(ProtocolError, match="unknown frame 17"):
            agent.send(wire.TRACE, b"")
            wire.Link(wire.Pipe(ours.fileno(), ours.fileno())).receive()


def test_every_kind_of_frame_has_its_name() -> None:
    assert all(getattr(wire, wire.kind_name(kind)) == kind for kind in range(wire.ALIVE, wire.TRACE + 1))
